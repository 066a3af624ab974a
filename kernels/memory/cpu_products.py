"""Products of matrices whose entries are vectors with one lane per row, and sums of such vectors.

Nearly all the time of the CPU kernels over sequences is spent here.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import CHUNK, LANES, NONE, ONE, TILE, ZERO
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, load, multiply_add, prefetch, store, zero


@function
def product(scratch, out, out_i, out_j, num_i, num_j, reach, a, a_i, a_k, b, b_j, b_k, count, initial, factor, ahead):
    """Compute ``out[i, j] = factor initial[i, j] + sum over k of a[i, k] b[j, k]``, lane by lane.

    ``initial`` is laid out like ``out``; if negative, there is none. Two values of i and four of j are taken at a time,
    enough sums to hide the latency of each; where they are no multiples, what follows is read and written as well. Of
    the columns from j on, i stays below ``j + reach``: 4 leaves out what lies below the diagonal. With ``ahead`` every
    pair of i asks for a part of what the next four j read of b, for a b that does not fit the nearest caches.
    """
    part, line = (count * 2 + num_i - 1) // num_i * ahead, 2 if b_k == WIDTH else 1
    for j in range(0, num_j, 4):
        for i in range(0, min(num_i, j + reach), 2):
            for k in range(i // 2 * part, i // 2 * part + part, line):
                at = b + (j + 4) * b_j + k * b_k
                prefetch(scratch, at)
                prefetch(scratch, at + 2 * b_j)
                if line > 1:
                    prefetch(scratch, at + b_j)
                    prefetch(scratch, at + 3 * b_j)
            p, q = a + i * a_i, b + j * b_j
            x_0 = x_1 = x_2 = x_3 = y_0 = y_1 = y_2 = y_3 = factor * 0.0
            at = out + i * out_i + j * out_j
            if initial >= 0:
                start = initial + i * out_i + j * out_j
                x_0 = load(scratch, start) * factor
                x_1 = load(scratch, start + out_j) * factor
                x_2 = load(scratch, start + 2 * out_j) * factor
                x_3 = load(scratch, start + 3 * out_j) * factor
                start += out_i
                y_0 = load(scratch, start) * factor
                y_1 = load(scratch, start + out_j) * factor
                y_2 = load(scratch, start + 2 * out_j) * factor
                y_3 = load(scratch, start + 3 * out_j) * factor
            for _ in range(count):
                left, lower = load(scratch, p), load(scratch, p + a_i)
                right = load(scratch, q)
                x_0, y_0 = multiply_add(left, right, x_0), multiply_add(lower, right, y_0)
                right = load(scratch, q + b_j)
                x_1, y_1 = multiply_add(left, right, x_1), multiply_add(lower, right, y_1)
                right = load(scratch, q + 2 * b_j)
                x_2, y_2 = multiply_add(left, right, x_2), multiply_add(lower, right, y_2)
                right = load(scratch, q + 3 * b_j)
                x_3, y_3 = multiply_add(left, right, x_3), multiply_add(lower, right, y_3)
                p += a_k
                q += b_k
            store(scratch, at, x_0)
            store(scratch, at + out_j, x_1)
            store(scratch, at + 2 * out_j, x_2)
            store(scratch, at + 3 * out_j, x_3)
            at += out_i
            store(scratch, at, y_0)
            store(scratch, at + out_j, y_1)
            store(scratch, at + 2 * out_j, y_2)
            store(scratch, at + 3 * out_j, y_3)


@inline
def scaled(scratch, at, factor):
    """Return eight neighbouring vectors times one."""
    return (
        load(scratch, at) * factor,
        load(scratch, at + WIDTH) * factor,
        load(scratch, at + 2 * WIDTH) * factor,
        load(scratch, at + 3 * WIDTH) * factor,
        load(scratch, at + 4 * WIDTH) * factor,
        load(scratch, at + 5 * WIDTH) * factor,
        load(scratch, at + 6 * WIDTH) * factor,
        load(scratch, at + 7 * WIDTH) * factor,
    )


@inline
def add_multiples(scratch, sums, coefficients, step, vectors, stride, count):
    """Add ``coefficients[i] vectors[i]`` to eight sums: of eight neighbours, enough to hide the latency of each."""
    a, b, c, d, e, f, g, h = sums
    for i in range(count):
        x, v = load(scratch, coefficients + i * step), vectors + i * stride
        a = multiply_add(x, load(scratch, v), a)
        b = multiply_add(x, load(scratch, v + WIDTH), b)
        c = multiply_add(x, load(scratch, v + 2 * WIDTH), c)
        d = multiply_add(x, load(scratch, v + 3 * WIDTH), d)
        e = multiply_add(x, load(scratch, v + 4 * WIDTH), e)
        f = multiply_add(x, load(scratch, v + 5 * WIDTH), f)
        g = multiply_add(x, load(scratch, v + 6 * WIDTH), g)
        h = multiply_add(x, load(scratch, v + 7 * WIDTH), h)
    return a, b, c, d, e, f, g, h


@inline
def store_sums(scratch, at, sums):
    a, b, c, d, e, f, g, h = sums
    store(scratch, at, a)
    store(scratch, at + WIDTH, b)
    store(scratch, at + 2 * WIDTH, c)
    store(scratch, at + 3 * WIDTH, d)
    store(scratch, at + 4 * WIDTH, e)
    store(scratch, at + 5 * WIDTH, f)
    store(scratch, at + 6 * WIDTH, g)
    store(scratch, at + 7 * WIDTH, h)


@function
def combine(scratch, out, first, factor, coefficients, vectors, stride, count, size):
    """Compute ``out = factor first + sum over i of coefficients[i] vectors[i]``, up to the next multiple of eight."""
    for j in range(0, size, 8 * WIDTH):
        sums = scaled(scratch, first + j, factor)
        sums = add_multiples(scratch, sums, coefficients, LANES, vectors + j, stride, count)
        store_sums(scratch, out + j, sums)


@function
def inner_product(scratch, a, b, size):
    """Return the sum of the products of two stretches."""
    whole = size // (4 * WIDTH) * (4 * WIDTH)
    s = t = u = v = zero(scratch)
    for j in range(0, whole, 4 * WIDTH):
        s = multiply_add(load(scratch, a + j), load(scratch, b + j), s)
        t = multiply_add(load(scratch, a + j + WIDTH), load(scratch, b + j + WIDTH), t)
        u = multiply_add(load(scratch, a + j + 2 * WIDTH), load(scratch, b + j + 2 * WIDTH), u)
        v = multiply_add(load(scratch, a + j + 3 * WIDTH), load(scratch, b + j + 3 * WIDTH), v)
    for j in range(whole, size, WIDTH):
        s = multiply_add(load(scratch, a + j), load(scratch, b + j), s)
    return (s + t) + (u + v)


@inline
def multiply(scratch, out, rows, num_rows, memory, layout, num_slots, dim):
    """Compute ``S w`` of many vectors w over features."""
    product(
        scratch,
        out,
        layout.slots,
        WIDTH,
        num_rows,
        num_slots,
        num_rows,
        rows,
        layout.dims,
        WIDTH,
        memory,
        layout.width,
        WIDTH,
        dim,
        NONE,
        zero(scratch),
        ONE,
    )


@inline
def multiply_transposed(scratch, out, vectors, num_vectors, memory, layout, num_slots, dim):
    """Compute ``S^T r`` of many vectors r over slots."""
    product(
        scratch,
        out,
        layout.dims,
        WIDTH,
        num_vectors,
        dim,
        num_vectors,
        vectors,
        layout.slots,
        WIDTH,
        memory,
        WIDTH,
        layout.width,
        num_slots,
        NONE,
        zero(scratch),
        ONE,
    )


@inline
def inner_products(scratch, out, a, b, n, stride, count):
    """Compute the inner products of two lists of n vectors, ``a[i] . b[j]`` for i <= j, into rows of ``2 CHUNK``."""
    product(
        scratch,
        out,
        2 * CHUNK * WIDTH,
        WIDTH,
        n,
        n,
        TILE,
        a,
        stride,
        WIDTH,
        b,
        stride,
        WIDTH,
        count,
        NONE,
        zero(scratch),
        ZERO,
    )


@inline
def add_outer_products(scratch, to, memory, factor, vectors, rows, count, layout, num_slots, dim):
    """Compute ``factor S + sum of r w^T``; a negative ``memory`` stands for zero."""
    product(
        scratch,
        to,
        layout.width,
        WIDTH,
        num_slots,
        dim,
        num_slots,
        vectors,
        WIDTH,
        layout.slots,
        rows,
        WIDTH,
        layout.dims,
        count,
        memory,
        factor,
        ZERO,
    )


@inline
def fill_zero(scratch, to, size):
    for j in range(0, size, WIDTH):
        store(scratch, to + j, zero(scratch))
