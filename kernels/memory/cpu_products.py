"""Products of matrices whose entries are vectors with one lane per row, and sums of such vectors.

Nearly all the time of the CPU kernels over sequences is spent here.
"""

from __future__ import annotations

from trellis_ts.kernels.memory.cpu_functions import function, inline
from trellis_ts.kernels.memory.cpu_layout import CHUNK, NONE
from trellis_ts.kernels.memory.cpu_vectors import WIDTH, load, multiply_add, store, zero


@function
def product(scratch, out, out_i, out_j, num_i, num_j, a, a_i, a_k, b, b_j, b_k, count, initial, factor):
    """Compute ``out[i, j] = factor initial[i, j] + sum over k of a[i, k] b[j, k]``, lane by lane.

    ``initial`` is laid out like ``out``; if negative, there is none. Two values of i and four of j are taken at a time,
    enough sums to hide the latency of each; where they are no multiples, what follows is read and written as well.
    """
    for j in range(0, num_j, 4):
        for i in range(0, num_i, 2):
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


@function
def combine(scratch, out, first, factor, coefficients, step, vectors, stride, count, size):
    """Compute ``out = factor first + sum over i of coefficients[i] vectors[i]``, four numbers at a time."""
    for j in range(0, size, 4 * WIDTH):
        a, b = load(scratch, first + j) * factor, load(scratch, first + j + WIDTH) * factor
        c, d = load(scratch, first + j + 2 * WIDTH) * factor, load(scratch, first + j + 3 * WIDTH) * factor
        for i in range(count):
            x, v = load(scratch, coefficients + i * step), vectors + i * stride + j
            a, b = multiply_add(x, load(scratch, v), a), multiply_add(x, load(scratch, v + WIDTH), b)
            c = multiply_add(x, load(scratch, v + 2 * WIDTH), c)
            d = multiply_add(x, load(scratch, v + 3 * WIDTH), d)
        store(scratch, out + j, a)
        store(scratch, out + j + WIDTH, b)
        store(scratch, out + j + 2 * WIDTH, c)
        store(scratch, out + j + 3 * WIDTH, d)


@function
def inner_product(scratch, a, b, size):
    """Return the sum of the products of two stretches."""
    total = zero(scratch)
    for j in range(0, size, WIDTH):
        total = multiply_add(load(scratch, a + j), load(scratch, b + j), total)
    return total


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
        rows,
        layout.dims,
        WIDTH,
        memory,
        layout.width,
        WIDTH,
        dim,
        NONE,
        zero(scratch),
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
        vectors,
        layout.slots,
        WIDTH,
        memory,
        WIDTH,
        layout.width,
        num_slots,
        NONE,
        zero(scratch),
    )


@inline
def inner_products(scratch, out, a, num_a, b, num_b, stride, count):
    """Compute all inner products of two lists of vectors, into rows of ``2 CHUNK``."""
    product(
        scratch,
        out,
        2 * CHUNK * WIDTH,
        WIDTH,
        num_a,
        num_b,
        a,
        stride,
        WIDTH,
        b,
        stride,
        WIDTH,
        count,
        NONE,
        zero(scratch),
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
        vectors,
        WIDTH,
        layout.slots,
        rows,
        WIDTH,
        layout.dims,
        count,
        memory,
        factor,
    )


@inline
def fill_zero(scratch, to, size):
    for j in range(0, size, WIDTH):
        store(scratch, to + j, zero(scratch))
