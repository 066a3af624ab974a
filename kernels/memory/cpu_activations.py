"""Activations of the memory and their derivatives, over vectors of slots; README.md beside this file derives them.

The kernels hold slots in two ways. A long sequence has independent rows side by side in the lanes, so that a vector
is one slot of eight rows; one token of one row has its slots in the lanes. Only sums over slots tell the two apart,
so everything here is built twice, by ``activations(over_rows)`` and ``activations(over_lanes)``, around what turns a
sum of vectors into a sum over slots.

Every argument that names a place, such as ``z``, is an offset into ``scratch``; ``size`` is the length of all slots
there, in numbers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba.extending import overload

from trellis_ts.kernels.memory.cpu_functions import INLINE, function, inline
from trellis_ts.kernels.memory.cpu_vectors import (
    WIDTH,
    add_exponent,
    clamp,
    largest_lane,
    load,
    maximum,
    multiply_add,
    repeat,
    scale_by_power,
    square_root,
    store,
    sum_lanes,
    zero,
    zero_below,
)

READ_EPSILON = 1e-6
LOG2_E = math.log2(math.e)

# Write and read activations, in the order of their Literals in types.py.
IDENTITY, SILU, LN_SILU = range(3)
READ_LN_SILU, READ_L2_SILU, READ_SOFTMAX = range(3)


class Activations(NamedTuple):
    """The four things the kernels ask for."""

    write_gradient: Any
    write_gradient_backward: Any
    read: Any
    read_backward: Any


@inline
def over_rows(total):
    """Sum over slots where every vector is one slot: the sum of the vectors is it."""
    return total


@inline
def over_lanes(total):
    """Sum over slots where a vector is eight of them."""
    return repeat(sum_lanes(total))


@inline
def largest_over_rows(largest):
    return largest


@inline
def largest_over_lanes(largest):
    return repeat(largest_lane(largest))


def exponential(x):
    """Return exp of every lane to an ulp or two, with its limits at both infinities, and nan from nan."""


@overload(exponential, jit_options=INLINE)
def _exponential(x):
    # exp(x) = 2 ** n exp(r) with |r| <= log(2) / 2, and exp(r) by its Taylor series up to the last term that counts.
    # log(2) comes in two parts, the first so short that n times it is exact; adding and taking away magic rounds.
    if x.scalar.bitwidth == 32:
        lowest, highest, magic = -105.0, 90.0, 1.5 * 2**23
        minus_log_2_high, minus_log_2_low = -0.693359375, 2.12194440e-4
        a, b, c, d, e, f = (1 / math.factorial(k) for k in (7, 6, 5, 4, 3, 2))

        def run(x):
            x = clamp(x, lowest, highest)
            shifted = multiply_add(x, LOG2_E, magic)
            n = shifted - magic
            r = multiply_add(n, minus_log_2_low, multiply_add(n, minus_log_2_high, x))
            p = multiply_add(multiply_add(multiply_add(r, a, b), r, c), r, d)
            p = multiply_add(multiply_add(multiply_add(p, r, e), r, f), r, 1.0)
            return scale_by_power(multiply_add(p, r, 1.0), shifted, magic)

    else:
        lowest, highest, magic = -750.0, 720.0, 1.5 * 2**52
        minus_log_2_high, minus_log_2_low = -6.93145751953125e-1, -1.42860682030941723212e-6
        series = tuple(1 / math.factorial(k) for k in range(13, -1, -1))

        def run(x):
            x = clamp(x, lowest, highest)
            shifted = multiply_add(x, LOG2_E, magic)
            n = shifted - magic
            r = multiply_add(n, minus_log_2_low, multiply_add(n, minus_log_2_high, x))
            p = multiply_add(r, series[0], series[1])
            for k in range(2, 14):
                p = multiply_add(p, r, series[k])
            return scale_by_power(p, shifted, magic)

    return run


def sigmoid(z):
    """Return the logistic function of every lane to an ulp or two, and 0 below -87 in float32, where it is 1e-38."""


@overload(sigmoid, jit_options=INLINE)
def _sigmoid(z):
    # As exponential, for exp(-z), but kept where 2 ** n is a normal number, and by Estrin's scheme, whose sums wait
    # less for each other; 1 + exp(-z) forgives more than exp itself would.
    if z.scalar.bitwidth == 32:
        lowest, highest, magic = -87.0, 87.0, 1.5 * 2**23
        log_2_high, log_2_low = 0.693359375, -2.12194440e-4
        b, c, d, e, f, g = ((-1) ** k / math.factorial(k) for k in range(2, 8))

        def run(z):
            x = clamp(z, lowest, highest)
            shifted = multiply_add(x, -LOG2_E, magic)
            n = shifted - magic
            r = multiply_add(n, log_2_low, multiply_add(n, log_2_high, x))  # exp(-z) = 2 ** n exp(-r)
            square = r * r
            low = multiply_add(multiply_add(r, c, b), square, 1.0 - r)
            high = multiply_add(multiply_add(r, g, f), square, multiply_add(r, e, d))
            p = multiply_add(high, square * square, low)
            return zero_below(lowest, z, 1.0 / (add_exponent(p, shifted) + 1.0))

    else:

        def run(z):
            return 1.0 / (exponential(z * -1.0) + 1.0)

    return run


@inline
def silu_slope(z, gate):
    """Return the derivative of silu, given ``gate = sigmoid(z)``."""
    return multiply_add(z * gate, 1.0 - gate, gate)


@inline
def silu_curvature(z, gate):
    """Return the second derivative of silu, given ``gate = sigmoid(z)``."""
    return gate * (1.0 - gate) * multiply_add(z, multiply_add(gate, -2.0, 1.0), 2.0)


def activations(over_slots, largest_over_slots):
    """Build all four around what finishes a sum, and a maximum, over slots."""

    @function
    def centre_silu(scratch, z_at, gate_at, centred, size, per_slot, epsilon):
        """Put ``silu(z) - mean`` into ``centred`` and return the inverse of its standard deviation."""
        total = zero(scratch)
        for j in range(0, size, WIDTH):
            total = multiply_add(load(scratch, z_at + j), load(scratch, gate_at + j), total)
        mean = over_slots(total) * per_slot
        total = zero(scratch)
        for j in range(0, size, WIDTH):
            c = multiply_add(load(scratch, z_at + j), load(scratch, gate_at + j), mean * -1.0)
            store(scratch, centred + j, c)
            total = multiply_add(c, c, total)
        return 1.0 / square_root(over_slots(total) * per_slot + epsilon)

    @inline
    def mean_residuals(scratch, centred, target, size, per_slot, rho):
        """Return the means of ``e`` and ``e n`` over slots."""
        total, along = zero(scratch), zero(scratch)
        for j in range(0, size, WIDTH):
            n = load(scratch, centred + j) * rho
            e = n - load(scratch, target + j)
            total += e
            along = multiply_add(e, n, along)
        return over_slots(total) * per_slot, over_slots(along) * per_slot

    @function
    def write_gradient(scratch, z_at, gate_at, target, u_at, centred, size, per_slot, activation, epsilon):
        """Compute u from z and the target, and the sigmoid of z that its backward pass needs again."""
        if activation == IDENTITY:
            for j in range(0, size, WIDTH):
                store(scratch, u_at + j, load(scratch, z_at + j) - load(scratch, target + j))
            return
        for j in range(0, size, WIDTH):
            z = load(scratch, z_at + j)
            gate = sigmoid(z)
            store(scratch, gate_at + j, gate)
            store(scratch, u_at + j, silu_slope(z, gate) * (z * gate - load(scratch, target + j)))
        if activation == LN_SILU:
            rho = centre_silu(scratch, z_at, gate_at, centred, size, per_slot, epsilon)
            mean, p = mean_residuals(scratch, centred, target, size, per_slot, rho)
            for j in range(0, size, WIDTH):
                n = load(scratch, centred + j) * rho
                h = n - load(scratch, target + j) - mean - n * p
                slope = silu_slope(load(scratch, z_at + j), load(scratch, gate_at + j))
                store(scratch, u_at + j, slope * rho * h)

    @function
    def write_gradient_backward(
        scratch, z_at, gate_at, target, gw, step, zbar_at, abar_at, centred, weighted, size, per_slot, phi, epsilon
    ):
        """Turn ``ubar = -step G w`` into zbar, and add to abar."""
        if phi == IDENTITY:
            for j in range(0, size, WIDTH):
                ubar = load(scratch, gw + j) * step * -1.0
                store(scratch, zbar_at + j, ubar)
                store(scratch, abar_at + j, load(scratch, abar_at + j) - ubar)
        elif phi == SILU:
            for j in range(0, size, WIDTH):
                z, gate = load(scratch, z_at + j), load(scratch, gate_at + j)
                ubar = load(scratch, gw + j) * step * -1.0
                slope = silu_slope(z, gate)
                residual = z * gate - load(scratch, target + j)
                store(scratch, zbar_at + j, ubar * multiply_add(silu_curvature(z, gate), residual, slope * slope))
                store(scratch, abar_at + j, load(scratch, abar_at + j) - ubar * slope)
        else:
            rho = centre_silu(scratch, z_at, gate_at, centred, size, per_slot, epsilon)
            ln_silu_backward(
                scratch, z_at, gate_at, target, gw, step, zbar_at, abar_at, centred, weighted, size, per_slot, rho
            )

    @function
    def ln_silu_backward(
        scratch, z_at, gate_at, target, gw, step, zbar_at, abar_at, centred, weighted, size, per_slot, rho
    ):
        mean, p = mean_residuals(scratch, centred, target, size, per_slot, rho)
        total, along, sum_xh = zero(scratch), zero(scratch), zero(scratch)
        for j in range(0, size, WIDTH):
            n = load(scratch, centred + j) * rho
            ubar = load(scratch, gw + j) * step * -1.0
            x = silu_slope(load(scratch, z_at + j), load(scratch, gate_at + j)) * ubar
            h = n - load(scratch, target + j) - mean - n * p
            total += x
            along = multiply_add(x, n, along)
            sum_xh = multiply_add(x, h, sum_xh)
            store(scratch, weighted + j, x)
        mean_hbar = rho * over_slots(total) * per_slot
        pbar_per_slot = rho * over_slots(along) * (-per_slot)
        total, along = zero(scratch), zero(scratch)
        for j in range(0, size, WIDTH):
            c = load(scratch, centred + j)
            n = c * rho
            hbar = load(scratch, weighted + j) * rho
            ebar = hbar - mean_hbar + n * pbar_per_slot
            nbar = ebar - hbar * p + (n - load(scratch, target + j)) * pbar_per_slot
            store(scratch, abar_at + j, load(scratch, abar_at + j) - ebar)
            store(scratch, weighted + j, nbar)
            total += nbar
            along = multiply_add(nbar, c, along)
        # c sums to zero, so the mean of cbar is rho times that of nbar.
        rhobar, mean_cbar = over_slots(sum_xh + along), rho * over_slots(total) * per_slot
        for j in range(0, size, WIDTH):
            z, gate, c = load(scratch, z_at + j), load(scratch, gate_at + j), load(scratch, centred + j)
            n = c * rho
            h = n - load(scratch, target + j) - mean - n * p
            cbar = load(scratch, weighted + j) * rho - c * (rho * rho * rho * rhobar * per_slot)
            ubar = load(scratch, gw + j) * step * -1.0
            zbar = silu_slope(z, gate) * (cbar - mean_cbar) + silu_curvature(z, gate) * rho * h * ubar
            store(scratch, zbar_at + j, zbar)

    @function
    def softmax(scratch, yhat, r_at, size):
        """Put ``softmax(yhat)`` into r and return the inverse of the sum it took."""
        largest = load(scratch, yhat)
        for j in range(WIDTH, size, WIDTH):
            largest = maximum(load(scratch, yhat + j), largest)
        largest = largest_over_slots(largest)
        total = zero(scratch)
        for j in range(0, size, WIDTH):
            weight = exponential(load(scratch, yhat + j) - largest)
            store(scratch, r_at + j, weight)
            total += weight
        scale = 1.0 / over_slots(total)
        for j in range(0, size, WIDTH):
            store(scratch, r_at + j, load(scratch, r_at + j) * scale)
        return scale

    @function
    def read(scratch, yhat, gate_at, r_at, size, per_slot, activation):
        """Compute ``r = f(yhat)`` and return what f scaled by: the inverse of a standard deviation, length or sum."""
        if activation == READ_SOFTMAX:
            return softmax(scratch, yhat, r_at, size)
        squares = zero(scratch)
        for j in range(0, size, WIDTH):
            z = load(scratch, yhat + j)
            gate = sigmoid(z)
            store(scratch, gate_at + j, gate)
            squares = multiply_add(z * gate, z * gate, squares)
        if activation == READ_L2_SILU:
            scale = 1.0 / square_root(over_slots(squares) + READ_EPSILON)
            for j in range(0, size, WIDTH):
                store(scratch, r_at + j, load(scratch, yhat + j) * load(scratch, gate_at + j) * scale)
        else:
            scale = centre_silu(scratch, yhat, gate_at, r_at, size, per_slot, READ_EPSILON)
            for j in range(0, size, WIDTH):
                store(scratch, r_at + j, load(scratch, r_at + j) * scale)
        return scale

    @function
    def read_backward(scratch, yhat, gate_at, r_at, rbar_at, yhatbar, scale, size, per_slot, activation):
        """Turn the gradient of r into that of yhat."""
        total, along = zero(scratch), zero(scratch)
        for j in range(0, size, WIDTH):
            rbar = load(scratch, rbar_at + j)
            total += rbar
            along = multiply_add(rbar, load(scratch, r_at + j), along)
        dot = over_slots(along)
        if activation == READ_SOFTMAX:
            for j in range(0, size, WIDTH):
                store(scratch, yhatbar + j, load(scratch, r_at + j) * (load(scratch, rbar_at + j) - dot))
            return
        mean = zero(scratch)
        if activation == READ_LN_SILU:
            mean, dot = over_slots(total) * per_slot, dot * per_slot
        for j in range(0, size, WIDTH):
            sbar = (load(scratch, rbar_at + j) - mean - load(scratch, r_at + j) * dot) * scale
            slope = silu_slope(load(scratch, yhat + j), load(scratch, gate_at + j))
            store(scratch, yhatbar + j, slope * sbar)

    return Activations(write_gradient, write_gradient_backward, read, read_backward)
