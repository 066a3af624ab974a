"""The compiled part of the CPU implementation; README.md beside this file derives formulas and layout.

A row's memories lie transposed, ``[dim, slot]``, both axes filled up with zeros to multiples of ``WIDTH``: the vectors
run over slots, and a key, value or query enters number by number. Everything a thread works on, one row at a time,
lies in one flat array, ``scratch``; what would be a pointer is an offset into it. Padding stays zero: vectors and
targets are zero there, and where a formula would not keep it so the mask does.

Numba decides by this file's date whether its cache is valid: after a change to ``cpu_vectors.py`` alone, touch it.
"""

from __future__ import annotations

import math

from numba import njit, types
from numba.extending import overload

from trellis_ts.kernels.memory.cpu_vectors import (
    WIDTH,
    clamp,
    largest_lane,
    load,
    load_one,
    maximum,
    multiply_add,
    pointer,
    prefetch,
    repeat,
    scale_by_power,
    square_root,
    store,
    store_halves,
    store_one,
    sum_each,
    sum_lanes,
    transpose,
)

READ_EPSILON = 1e-6
LOG2_E = math.log2(math.e)

# Write and read activations, in the order of their Literals in types.py.
IDENTITY, SILU, LN_SILU = range(3)
READ_LN_SILU, READ_L2_SILU, READ_SOFTMAX = range(3)

# At the start of scratch, vectors over slots: 1 where there is a slot and 0 in padding, and the same divided by their
# number; then what one token needs.
MASK, MEAN, ABAR, CENTRED, WEIGHTED, KEY_SCALED, VALUE_SCALED, KEY_ZBAR, VALUE_ZBAR, KEY_GW, VALUE_GW = range(11)
NUM_WORK_SLOT_FIELDS = 11
# After those, gradients over dim: of query, key and value, and one that nothing asks for.
NUM_WORK_DIM_FIELDS = 4

# A record holds one token: four vectors over dim, then vectors over slots, then two scalars.
QUERY, KEY, VALUE, OUTPUT = range(4)
NUM_DIM_FIELDS = 4
TARGET, KEY_Z, VALUE_Z, KEY_GATE, VALUE_GATE, KEY_U, VALUE_U, YHAT, YHAT_GATE, YHATBAR, R, RBAR = range(12)
NUM_SLOT_FIELDS = 12
FORGET, STEP = range(2)

# The gradient of a forget gate is carried from token to token by a recursion; this often, and where the gate is below
# this, it is taken from the memories instead, since the recursion keeps errors where the gradient fades.
INNER_PERIOD = 16
INNER_FORGET = 0.9
# How many tokens ahead the inputs are asked for.
PREFETCH_DISTANCE = 4

# Small parts disappear into their callers; the larger ones stay functions, or compiling would take a minute.
inline = njit(forceinline=True, error_model="numpy")
function = njit(error_model="numpy")


def build(scalar, *, cache=True):
    """Compile both passes for ``numba.float32`` or ``numba.float64``, or find them in Numba's cache."""
    array, matrix = types.Array(scalar, 1, "C"), types.Array(types.int64, 2, "C")
    pair, six, counts = types.UniTuple(array, 2), types.UniTuple(array, 6), types.UniTuple(types.int64, 4)
    inputs = (six, matrix, pair, matrix)
    settings = (counts, types.UniTuple(types.int64, 2), types.boolean, scalar, types.int64)
    work = (array, types.int64, types.int64)
    options = {"cache": cache, "nogil": True, "error_model": "numpy"}
    forward = types.void(*inputs, array, pair, *settings, *work)
    backward = types.void(*inputs, array, matrix, pair, matrix, six, pair, *settings, *work)
    return njit(forward, **options)(forward_rows), njit(backward, **options)(backward_rows)


def padded(size: int) -> int:
    """Return ``size`` filled up to whole vectors."""
    return (size + WIDTH - 1) // WIDTH * WIDTH


def work_size(slots, dims):
    return NUM_WORK_SLOT_FIELDS * slots + NUM_WORK_DIM_FIELDS * dims


def record_size(slots, dims):
    return NUM_DIM_FIELDS * dims + NUM_SLOT_FIELDS * slots + WIDTH


def states_size(num_slots: int, dim: int) -> int:
    """Return how many numbers both memories of a row are, with their padding."""
    return 2 * padded(num_slots) * padded(dim)


def forward_scratch_size(num_slots: int, dim: int) -> int:
    """Return how many numbers a thread needs in the forward pass: both memories, and two tokens."""
    slots, dims = padded(num_slots), padded(dim)
    return work_size(slots, dims) + 2 * slots * dims + 2 * record_size(slots, dims)


def backward_scratch_size(num_slots: int, dim: int, num_tokens: int, segment: int) -> int:
    """Return how many numbers a thread needs in the backward pass.

    Both memories at the start of every segment, before every token of one segment and after its last, and their
    gradients; the tokens of a segment, one of zeros before and one after them.
    """
    slots, dims = padded(num_slots), padded(dim)
    num_segments = (num_tokens + segment - 1) // segment
    num_memories = 2 * (num_segments + segment + 1 + 1)
    return work_size(slots, dims) + num_memories * slots * dims + (segment + 2) * record_size(slots, dims)


_padded, _work_size, _record_size = inline(padded), inline(work_size), inline(record_size)


@inline
def work_field(field, slots):
    return field * slots


@inline
def dim_field(record, field, dims):
    return record + field * dims


@inline
def slot_field(record, field, slots, dims):
    return record + NUM_DIM_FIELDS * dims + field * slots


@inline
def scalar_field(record, field, slots, dims):
    return record + NUM_DIM_FIELDS * dims + NUM_SLOT_FIELDS * slots + field


# Copying between tensors and scratch


@inline
def copy(destination, to, source, start, count):
    whole = count // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        store(destination, to + i, load(source, start + i))
    for i in range(whole, count):
        store_one(destination, to + i, load_one(source, start + i))


@inline
def fill(scratch, to, count, value):
    for i in range(to, to + count):
        store_one(scratch, i, value)


@function
def load_memory(scratch, to, tensor, strides, batch, head, shape):
    num_slots, dim, slots, dims = shape
    start = batch * strides[0] + head * strides[1]
    if num_slots < slots or dim < dims:
        fill_zero(scratch, to, slots * dims)
    elif strides[2] == 0 and strides[3] == 0:  # one number expanded: no state was given, or no gradient of it
        number = repeat(load_one(tensor, start))
        for i in range(0, slots * dims, WIDTH):
            store(scratch, to + i, number)
        return
    elif strides[3] == 1:
        for m in range(0, slots, WIDTH):
            for d in range(0, dims, WIDTH):
                transpose_block(scratch, to + d * slots + m, slots, tensor, start + m * strides[2] + d, strides[2])
        return
    for d in range(dim):
        for m in range(num_slots):
            number = load_one(tensor, start + m * strides[2] + d * strides[3])
            store_one(scratch, to + d * slots + m, number)


@function
def save_memory(scratch, source, tensor, row, shape):
    num_slots, dim, slots, dims = shape
    start = row * num_slots * dim
    if num_slots == slots and dim == dims:
        for m in range(0, slots, WIDTH):
            for d in range(0, dims, WIDTH):
                transpose_block(tensor, start + m * dim + d, dim, scratch, source + d * slots + m, slots)
        return
    for d in range(dim):
        for m in range(num_slots):
            store_one(tensor, start + m * dim + d, load_one(scratch, source + d * slots + m))


@inline
def transpose_block(destination, to, to_stride, source, start, stride):
    """Copy eight rows of eight numbers to eight columns."""
    columns = transpose(
        load(source, start),
        load(source, start + stride),
        load(source, start + 2 * stride),
        load(source, start + 3 * stride),
        load(source, start + 4 * stride),
        load(source, start + 5 * stride),
        load(source, start + 6 * stride),
        load(source, start + 7 * stride),
    )
    for i in range(WIDTH):
        store(destination, to + i * to_stride, columns[i])


@inline
def prefetch_stretch(tensor, start, count):
    for i in range(0, count, 2 * WIDTH):
        prefetch(tensor, start + i)


@function
def prefetch_token(tokens, strides, batch, time, head, shape):
    """Ask for a token that comes later: the next one of a row lies a whole row of heads away."""
    num_slots, dim, _, _ = shape
    for i in range(3):
        prefetch_stretch(tokens[i], place(strides, i, batch, time, head), dim)
    prefetch_stretch(tokens[3], place(strides, 3, batch, time, head), num_slots)


@inline
def place(strides, tensor, batch, time, head):
    return strides[tensor, 0] * batch + strides[tensor, 1] * time + strides[tensor, 2] * head


@function
def load_token(scratch, record, tokens, strides, batch, time, head, shape):
    """Copy one token of query, key, value, target, forget gate and step size into a record."""
    num_slots, dim, slots, dims = shape
    query, key, value, target, log_forget, step_size = tokens
    prefetch_token(tokens, strides, batch, time + PREFETCH_DISTANCE, head, shape)
    copy(scratch, dim_field(record, QUERY, dims), query, place(strides, 0, batch, time, head), dim)
    copy(scratch, dim_field(record, KEY, dims), key, place(strides, 1, batch, time, head), dim)
    copy(scratch, dim_field(record, VALUE, dims), value, place(strides, 2, batch, time, head), dim)
    copy(scratch, slot_field(record, TARGET, slots, dims), target, place(strides, 3, batch, time, head), num_slots)
    forget = exponential(repeat(load_one(log_forget, place(strides, 4, batch, time, head))))
    store(scratch, scalar_field(record, FORGET, slots, dims), forget)
    step = load_one(step_size, place(strides, 5, batch, time, head))
    store_one(scratch, scalar_field(record, STEP, slots, dims), step)


# Activations


def exponential(x):
    """Return exp of every lane to an ulp or two, with its limits at both infinities, and nan from nan."""


@overload(exponential, jit_options={"forceinline": True, "error_model": "numpy"})
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


@inline
def sigmoid(z):
    return 1.0 / (exponential(z * -1.0) + 1.0)


@inline
def silu_slope(z, gate):
    """Return the derivative of silu, given ``gate = sigmoid(z)``."""
    return multiply_add(z * gate, 1.0 - gate, gate)


@inline
def silu_curvature(z, gate):
    """Return the second derivative of silu, given ``gate = sigmoid(z)``."""
    return gate * (1.0 - gate) * multiply_add(z, multiply_add(gate, -2.0, 1.0), 2.0)


@inline
def zero(scratch):
    return repeat(load_one(scratch, 0)) * 0.0


@function
def centre_silu(scratch, z_at, gate_at, slots, epsilon):
    """Put ``silu(z) - mean`` into CENTRED and return the inverse of its standard deviation."""
    total = zero(scratch)
    for j in range(0, slots, WIDTH):
        total = multiply_add(load(scratch, z_at + j), load(scratch, gate_at + j), total)
    per_slot = load_one(scratch, work_field(MEAN, slots))
    mean = sum_lanes(total) * per_slot
    total = zero(scratch)
    for j in range(0, slots, WIDTH):
        c = multiply_add(load(scratch, z_at + j), load(scratch, gate_at + j), -mean) * load(scratch, j)
        store(scratch, work_field(CENTRED, slots) + j, c)
        total = multiply_add(c, c, total)
    return 1.0 / square_root(repeat(sum_lanes(total) * per_slot) + epsilon)


@function
def mean_residuals(scratch, target, slots, rho):
    """Return the means of ``e`` and ``e n`` over slots, from CENTRED."""
    total, along = zero(scratch), zero(scratch)
    for j in range(0, slots, WIDTH):
        n = load(scratch, work_field(CENTRED, slots) + j) * rho
        e = n - load(scratch, target + j)
        total += e
        along = multiply_add(e, n, along)
    per_slot = load_one(scratch, work_field(MEAN, slots))
    return sum_lanes(total) * per_slot, sum_lanes(along) * per_slot


@function
def write_gradient(scratch, z_at, gate_at, target, u_at, shape, write_activation, epsilon):
    """Compute u from z and the target, and the sigmoid of z that its backward pass needs again."""
    _, _, slots, _ = shape
    if write_activation == IDENTITY:
        for j in range(0, slots, WIDTH):
            store(scratch, u_at + j, load(scratch, z_at + j) - load(scratch, target + j))
        return
    for j in range(0, slots, WIDTH):
        z = load(scratch, z_at + j)
        gate = sigmoid(z)
        store(scratch, gate_at + j, gate)
        store(scratch, u_at + j, silu_slope(z, gate) * (z * gate - load(scratch, target + j)))
    if write_activation == LN_SILU:
        rho = centre_silu(scratch, z_at, gate_at, slots, epsilon)
        mean, p = mean_residuals(scratch, target, slots, rho)
        for j in range(0, slots, WIDTH):
            n = load(scratch, work_field(CENTRED, slots) + j) * rho
            h = (n - load(scratch, target + j) - mean - n * p) * load(scratch, j)
            slope = silu_slope(load(scratch, z_at + j), load(scratch, gate_at + j))
            store(scratch, u_at + j, slope * rho * h)


@function
def write_gradient_backward(
    scratch, z_at, gate_at, target, gw, step, zbar_at, shape, write_activation, second_order, epsilon
):
    """Turn ``ubar = -g G w`` into zbar, and add to ABAR."""
    _, _, slots, _ = shape
    abar_at = work_field(ABAR, slots)
    if write_activation == IDENTITY:
        for j in range(0, slots, WIDTH):
            ubar = load(scratch, gw + j) * -step
            store(scratch, zbar_at + j, ubar)
            store(scratch, abar_at + j, load(scratch, abar_at + j) - ubar)
    elif write_activation == SILU:
        for j in range(0, slots, WIDTH):
            z, gate = load(scratch, z_at + j), load(scratch, gate_at + j)
            ubar = load(scratch, gw + j) * -step
            slope = silu_slope(z, gate)
            residual = z * gate - load(scratch, target + j)
            zbar = ubar * multiply_add(silu_curvature(z, gate), residual, slope * slope)
            store(scratch, zbar_at + j, zbar)
            store(scratch, abar_at + j, multiply_add(ubar * -1.0, slope, load(scratch, abar_at + j)))
    else:
        ln_silu_backward(scratch, z_at, gate_at, target, gw, step, zbar_at, slots, epsilon)
    if not second_order:
        fill(scratch, zbar_at, slots, 0)


@function
def ln_silu_backward(scratch, z_at, gate_at, target, gw, step, zbar_at, slots, epsilon):
    abar_at, centred, weighted = (
        work_field(ABAR, slots),
        work_field(CENTRED, slots),
        work_field(WEIGHTED, slots),
    )
    rho = centre_silu(scratch, z_at, gate_at, slots, epsilon)
    mean, p = mean_residuals(scratch, target, slots, rho)
    total, along, sum_xh = zero(scratch), zero(scratch), zero(scratch)
    for j in range(0, slots, WIDTH):
        n = load(scratch, centred + j) * rho
        x = silu_slope(load(scratch, z_at + j), load(scratch, gate_at + j)) * (load(scratch, gw + j) * -step)
        h = n - load(scratch, target + j) - mean - n * p
        total += x
        along = multiply_add(x, n, along)
        sum_xh = multiply_add(x, h, sum_xh)
        store(scratch, weighted + j, x)
    per_slot = load_one(scratch, work_field(MEAN, slots))
    mean_hbar, pbar_per_slot = rho * (sum_lanes(total) * per_slot), rho * (sum_lanes(along) * -per_slot)
    total, along = zero(scratch), zero(scratch)
    for j in range(0, slots, WIDTH):
        mask, c = load(scratch, j), load(scratch, centred + j)
        n = c * rho
        hbar = load(scratch, weighted + j) * rho
        ebar = (hbar - mean_hbar + n * pbar_per_slot) * mask
        nbar = ebar - hbar * p + (n - load(scratch, target + j)) * pbar_per_slot
        store(scratch, abar_at + j, load(scratch, abar_at + j) - ebar)
        store(scratch, weighted + j, nbar)
        total += nbar
        along = multiply_add(nbar, c, along)
    # c sums to zero, so the mean of cbar is rho times that of nbar.
    rhobar, mean_cbar = sum_lanes(sum_xh) + sum_lanes(along), rho * (sum_lanes(total) * per_slot)
    for j in range(0, slots, WIDTH):
        z, gate, c = load(scratch, z_at + j), load(scratch, gate_at + j), load(scratch, centred + j)
        n = c * rho
        h = n - load(scratch, target + j) - mean - n * p
        cbar = load(scratch, weighted + j) * rho - c * (rho * rho * rho * (rhobar * per_slot))
        zbar = silu_slope(z, gate) * (cbar - mean_cbar)
        zbar += silu_curvature(z, gate) * rho * h * (load(scratch, gw + j) * -step)
        store(scratch, zbar_at + j, zbar * load(scratch, j))


@function
def read(scratch, record, shape, read_activation):
    """Compute ``r = f(yhat)`` and return what f scaled by: the inverse of a standard deviation, length or sum."""
    _, _, slots, dims = shape
    yhat, gate_at, r_at = (
        slot_field(record, YHAT, slots, dims),
        slot_field(record, YHAT_GATE, slots, dims),
        slot_field(record, R, slots, dims),
    )
    if read_activation == READ_SOFTMAX:
        scale = softmax(scratch, yhat, r_at, slots)
        for j in range(0, slots, WIDTH):
            store(scratch, r_at + j, load(scratch, r_at + j) * scale)
        return scale
    squares = zero(scratch)
    for j in range(0, slots, WIDTH):
        z = load(scratch, yhat + j)
        gate = sigmoid(z)
        store(scratch, gate_at + j, gate)
        squares = multiply_add(z * gate, z * gate, squares)
    if read_activation == READ_L2_SILU:
        scale = 1.0 / square_root(repeat(sum_lanes(squares)) + READ_EPSILON)
        for j in range(0, slots, WIDTH):
            store(scratch, r_at + j, load(scratch, yhat + j) * load(scratch, gate_at + j) * scale)
    else:
        scale = centre_silu(scratch, yhat, gate_at, slots, READ_EPSILON)
        for j in range(0, slots, WIDTH):
            store(scratch, r_at + j, load(scratch, work_field(CENTRED, slots) + j) * scale)
    return scale


@function
def softmax(scratch, yhat, r_at, slots):
    """Put the exponentials into r and return what makes their sum 1."""
    # Padding holds zeros, which may join the search: the maximum only guards against overflow, and any upper bound
    # near it serves unless all exponentials underflow; so padding takes the first slot's place instead.
    largest = repeat(load_one(scratch, yhat))
    for j in range(0, slots, WIDTH):
        mask = load(scratch, j)
        candidates = load(scratch, yhat + j) * mask + (1.0 - mask) * load_one(scratch, yhat)
        largest = maximum(candidates, largest)
    top = largest_lane(largest)
    total = zero(scratch)
    for j in range(0, slots, WIDTH):
        weight = exponential(load(scratch, yhat + j) - top) * load(scratch, j)
        store(scratch, r_at + j, weight)
        total += weight
    return 1.0 / repeat(sum_lanes(total))


@function
def read_backward(scratch, record, scale, shape, read_activation):
    """Turn the gradient of r into that of yhat."""
    _, _, slots, dims = shape
    yhat, gate_at, r_at, rbar_at, yhatbar = (
        slot_field(record, YHAT, slots, dims),
        slot_field(record, YHAT_GATE, slots, dims),
        slot_field(record, R, slots, dims),
        slot_field(record, RBAR, slots, dims),
        slot_field(record, YHATBAR, slots, dims),
    )
    total, along = zero(scratch), zero(scratch)
    for j in range(0, slots, WIDTH):
        rbar = load(scratch, rbar_at + j)
        total += rbar
        along = multiply_add(rbar, load(scratch, r_at + j), along)
    dot = sum_lanes(along)
    if read_activation == READ_SOFTMAX:
        for j in range(0, slots, WIDTH):
            store(scratch, yhatbar + j, load(scratch, r_at + j) * (load(scratch, rbar_at + j) - dot))
        return
    mean = dot - dot
    if read_activation == READ_LN_SILU:
        per_slot = load_one(scratch, work_field(MEAN, slots))
        mean, dot = sum_lanes(total) * per_slot, dot * per_slot
    for j in range(0, slots, WIDTH):
        sbar = (load(scratch, rbar_at + j) - mean - load(scratch, r_at + j) * dot) * scale
        slope = silu_slope(load(scratch, yhat + j), load(scratch, gate_at + j))
        store(scratch, yhatbar + j, slope * sbar * load(scratch, j))


# Sweeps over a memory: everything that costs M D operations. Each loads and stores a memory once.


@function
def multiply(scratch, memory, w, to, slots, dims):
    """Compute ``S w``."""
    for j in range(0, slots, WIDTH):
        total = zero(scratch)
        for d in range(dims):
            total = multiply_add(load(scratch, memory + d * slots + j), load_one(scratch, w + d), total)
        store(scratch, to + j, total)


@inline
def scale_to(scratch, vector, factor, to, slots):
    for j in range(0, slots, WIDTH):
        store(scratch, to + j, load(scratch, vector + j) * factor)


@function
def write_and_multiply(scratch, memory, to, forget, scaled, w, x, sx, next_w, next_z, slots, dims):
    """Compute ``S' = b S + scaled w^T`` and, while it is at hand, ``S' x`` and the next token's ``S' w``.

    Two vectors of slots at a time, and two numbers of w: enough sums at once to hide the latency of each.
    """
    pairs = slots // (2 * WIDTH) * (2 * WIDTH)
    for j in range(0, pairs, 2 * WIDTH):
        g, h = load(scratch, scaled + j), load(scratch, scaled + j + WIDTH)
        gx_0 = gx_1 = gz_0 = gz_1 = hx_0 = hx_1 = hz_0 = hz_1 = zero(scratch)
        for d in range(0, dims, 2):
            at = d * slots + j
            gx_0, gz_0 = write_one(scratch, memory + at, to + at, forget, g, w + d, x + d, next_w + d, gx_0, gz_0)
            at += WIDTH
            hx_0, hz_0 = write_one(scratch, memory + at, to + at, forget, h, w + d, x + d, next_w + d, hx_0, hz_0)
            at += slots
            e = d + 1
            hx_1, hz_1 = write_one(scratch, memory + at, to + at, forget, h, w + e, x + e, next_w + e, hx_1, hz_1)
            at -= WIDTH
            gx_1, gz_1 = write_one(scratch, memory + at, to + at, forget, g, w + e, x + e, next_w + e, gx_1, gz_1)
        store(scratch, sx + j, gx_0 + gx_1)
        store(scratch, next_z + j, gz_0 + gz_1)
        store(scratch, sx + j + WIDTH, hx_0 + hx_1)
        store(scratch, next_z + j + WIDTH, hz_0 + hz_1)
    for j in range(pairs, slots, WIDTH):
        g = load(scratch, scaled + j)
        x_0 = x_1 = z_0 = z_1 = zero(scratch)
        for d in range(0, dims, 2):
            at = d * slots + j
            x_0, z_0 = write_one(scratch, memory + at, to + at, forget, g, w + d, x + d, next_w + d, x_0, z_0)
            at += slots
            e = d + 1
            x_1, z_1 = write_one(scratch, memory + at, to + at, forget, g, w + e, x + e, next_w + e, x_1, z_1)
        store(scratch, sx + j, x_0 + x_1)
        store(scratch, next_z + j, z_0 + z_1)


@inline
def write_one(scratch, at, to, forget, g, w, x, next_w, sx, z):
    s = multiply_add(g, load_one(scratch, w), load(scratch, at) * forget)
    store(scratch, to, s)
    return multiply_add(s, load_one(scratch, x), sx), multiply_add(s, load_one(scratch, next_w), z)


@function
def write_and_read(scratch, memory, forget, scaled, w, r, y, next_w, next_z, slots, dims):
    """Compute ``S = b S + scaled w^T`` in place and, while it is at hand, ``S^T r`` and the next token's ``S w``."""
    fill_zero(scratch, next_z, slots)
    for d in range(0, dims, WIDTH):
        y_0 = y_1 = y_2 = y_3 = y_4 = y_5 = y_6 = y_7 = zero(scratch)
        for j in range(0, slots, WIDTH):
            at = memory + d * slots + j
            g, r_j, z = load(scratch, scaled + j), load(scratch, r + j), load(scratch, next_z + j)
            y_0, z = write_and_read_one(scratch, at, forget, g, w + d, r_j, y_0, next_w + d, z)
            y_1, z = write_and_read_one(scratch, at + slots, forget, g, w + d + 1, r_j, y_1, next_w + d + 1, z)
            y_2, z = write_and_read_one(scratch, at + 2 * slots, forget, g, w + d + 2, r_j, y_2, next_w + d + 2, z)
            y_3, z = write_and_read_one(scratch, at + 3 * slots, forget, g, w + d + 3, r_j, y_3, next_w + d + 3, z)
            y_4, z = write_and_read_one(scratch, at + 4 * slots, forget, g, w + d + 4, r_j, y_4, next_w + d + 4, z)
            y_5, z = write_and_read_one(scratch, at + 5 * slots, forget, g, w + d + 5, r_j, y_5, next_w + d + 5, z)
            y_6, z = write_and_read_one(scratch, at + 6 * slots, forget, g, w + d + 6, r_j, y_6, next_w + d + 6, z)
            y_7, z = write_and_read_one(scratch, at + 7 * slots, forget, g, w + d + 7, r_j, y_7, next_w + d + 7, z)
            store(scratch, next_z + j, z)
        store(scratch, y + d, sum_each(y_0, y_1, y_2, y_3, y_4, y_5, y_6, y_7))


@inline
def fill_zero(scratch, to, slots):
    for j in range(0, slots, WIDTH):
        store(scratch, to + j, zero(scratch))


@inline
def write_and_read_one(scratch, at, forget, g, w, r, y, next_w, z):
    s = multiply_add(g, load_one(scratch, w), load(scratch, at) * forget)
    store(scratch, at, s)
    return multiply_add(s, r, y), multiply_add(s, load_one(scratch, next_w), z)


def make_pull_back(with_read):
    """Make what carries G from one token's write, which found ``memory``, back to the read before it.

    It computes, while all are at hand, ``wbar = G^T scaled + S^T zbar``, the new
    ``G = b G + zbar w^T + earlier_xbar earlier_x^T``, ``G earlier_w`` of the write before it and, ``with_read``, as
    the key memory needs it, ``S^T earlier_xbar``.
    """

    def pull_back(
        scratch,
        gradient,
        memory,
        forget,
        scaled,
        zbar,
        w,
        earlier_xbar,
        earlier_x,
        earlier_w,
        gw,
        wbar,
        xbar,
        slots,
        dims,
    ):
        fill_zero(scratch, gw, slots)
        for d in range(0, dims, 4):
            w_0 = w_1 = w_2 = w_3 = x_0 = x_1 = x_2 = x_3 = zero(scratch)
            for j in range(0, slots, WIDTH):
                at = d * slots + j
                u, zb = load(scratch, scaled + j), load(scratch, zbar + j)
                xb, z = load(scratch, earlier_xbar + j), load(scratch, gw + j)
                w_0, x_0, z = pull_back_one(
                    scratch,
                    gradient + at,
                    memory + at,
                    forget,
                    u,
                    zb,
                    xb,
                    w + d,
                    earlier_x + d,
                    earlier_w + d,
                    w_0,
                    x_0,
                    z,
                    with_read,
                )
                at += slots
                w_1, x_1, z = pull_back_one(
                    scratch,
                    gradient + at,
                    memory + at,
                    forget,
                    u,
                    zb,
                    xb,
                    w + d + 1,
                    earlier_x + d + 1,
                    earlier_w + d + 1,
                    w_1,
                    x_1,
                    z,
                    with_read,
                )
                at += slots
                w_2, x_2, z = pull_back_one(
                    scratch,
                    gradient + at,
                    memory + at,
                    forget,
                    u,
                    zb,
                    xb,
                    w + d + 2,
                    earlier_x + d + 2,
                    earlier_w + d + 2,
                    w_2,
                    x_2,
                    z,
                    with_read,
                )
                at += slots
                w_3, x_3, z = pull_back_one(
                    scratch,
                    gradient + at,
                    memory + at,
                    forget,
                    u,
                    zb,
                    xb,
                    w + d + 3,
                    earlier_x + d + 3,
                    earlier_w + d + 3,
                    w_3,
                    x_3,
                    z,
                    with_read,
                )
                store(scratch, gw + j, z)
            store_halves(scratch, wbar + d, xbar + d, sum_each(w_0, w_1, w_2, w_3, x_0, x_1, x_2, x_3))

    return function(pull_back)


key_pull_back, value_pull_back = make_pull_back(True), make_pull_back(False)


@inline
def pull_back_one(scratch, gradient, memory, forget, u, zb, xb, w, x, earlier_w, wbar, xbar, gw, with_read):
    g, s = load(scratch, gradient), load(scratch, memory)
    wbar = multiply_add(g, u, multiply_add(s, zb, wbar))
    if with_read:
        xbar = multiply_add(s, xb, xbar)
    g = multiply_add(zb, load_one(scratch, w), multiply_add(xb, load_one(scratch, x), g * forget))
    store(scratch, gradient, g)
    return wbar, xbar, multiply_add(g, load_one(scratch, earlier_w), gw)


@function
def inner_product(scratch, a, b, count):
    """Return the sum of the products of two stretches of whole vectors."""
    even, odd = zero(scratch), zero(scratch)
    for i in range(0, count - WIDTH, 2 * WIDTH):
        even = multiply_add(load(scratch, a + i), load(scratch, b + i), even)
        odd = multiply_add(load(scratch, a + i + WIDTH), load(scratch, b + i + WIDTH), odd)
    if count // WIDTH % 2:
        last = count - WIDTH
        even = multiply_add(load(scratch, a + last), load(scratch, b + last), even)
    return sum_lanes(even + odd)


# Rows


def pointers(arrays):
    """Return where each array of a tuple starts."""


@overload(pointers, jit_options={"forceinline": True})
def _pointers(arrays):
    if len(arrays) == 2:
        return lambda arrays: (pointer(arrays[0]), pointer(arrays[1]))
    return lambda arrays: (
        pointer(arrays[0]),
        pointer(arrays[1]),
        pointer(arrays[2]),
        pointer(arrays[3]),
        pointer(arrays[4]),
        pointer(arrays[5]),
    )


@inline
def start_scratch(scratch, num_slots, slots):
    """Set the mask; everything else that must be zero is zero in fresh scratch."""
    for j in range(num_slots):
        store_one(scratch, work_field(MASK, slots) + j, 1)
        store_one(scratch, work_field(MEAN, slots) + j, 1 / num_slots)


def forward_rows(
    tokens,
    token_strides,
    states,
    state_strides,
    output,
    final_states,
    sizes,
    activations,
    second_order,
    epsilon,
    segment,
    scratch,
    first_row,
    last_row,
):
    num_tokens, num_heads, num_slots, dim = sizes
    write_activation, read_activation = activations
    slots, dims = _padded(num_slots), _padded(dim)
    shape = (num_slots, dim, slots, dims)
    tokens, states, final_states = pointers(tokens), pointers(states), pointers(final_states)
    output, scratch = pointer(output), pointer(scratch)
    start_scratch(scratch, num_slots, slots)
    key_memory = _work_size(slots, dims)
    value_memory = key_memory + slots * dims
    ring = value_memory + slots * dims
    for row in range(first_row, last_row):
        batch, head = row // num_heads, row % num_heads
        load_memory(scratch, key_memory, states[0], state_strides[0], batch, head, shape)
        load_memory(scratch, value_memory, states[1], state_strides[1], batch, head, shape)
        load_token(scratch, ring, tokens, token_strides, batch, 0, head, shape)
        multiply(scratch, key_memory, dim_field(ring, KEY, dims), slot_field(ring, KEY_Z, slots, dims), slots, dims)
        multiply(
            scratch, value_memory, dim_field(ring, VALUE, dims), slot_field(ring, VALUE_Z, slots, dims), slots, dims
        )
        for time in range(num_tokens):
            record = ring + (time % 2) * _record_size(slots, dims)
            following = ring + ((time + 1) % 2) * _record_size(slots, dims)
            # After the last token the sweeps prepare one that never comes; the last itself stands in.
            load_token(scratch, following, tokens, token_strides, batch, min(time + 1, num_tokens - 1), head, shape)
            forget, scaled_key, scaled_value = write_vectors(scratch, record, shape, write_activation, epsilon)
            write_and_multiply(
                scratch,
                key_memory,
                key_memory,
                forget,
                scaled_key,
                dim_field(record, KEY, dims),
                dim_field(record, QUERY, dims),
                slot_field(record, YHAT, slots, dims),
                dim_field(following, KEY, dims),
                slot_field(following, KEY_Z, slots, dims),
                slots,
                dims,
            )
            read(scratch, record, shape, read_activation)
            write_and_read(
                scratch,
                value_memory,
                forget,
                scaled_value,
                dim_field(record, VALUE, dims),
                slot_field(record, R, slots, dims),
                dim_field(record, OUTPUT, dims),
                dim_field(following, VALUE, dims),
                slot_field(following, VALUE_Z, slots, dims),
                slots,
                dims,
            )
            copy(
                output,
                ((batch * num_tokens + time) * num_heads + head) * dim,
                scratch,
                dim_field(record, OUTPUT, dims),
                dim,
            )
        save_memory(scratch, key_memory, final_states[0], row, shape)
        save_memory(scratch, value_memory, final_states[1], row, shape)


@function
def write_vectors(scratch, record, shape, write_activation, epsilon):
    """Compute both passes' u, and ``-g u`` into KEY_SCALED and VALUE_SCALED; return b and where those are."""
    _, _, slots, dims = shape
    target = slot_field(record, TARGET, slots, dims)
    minus_step = -load_one(scratch, scalar_field(record, STEP, slots, dims))
    for i in range(2):
        z, gate = slot_field(record, KEY_Z + i, slots, dims), slot_field(record, KEY_GATE + i, slots, dims)
        u = slot_field(record, KEY_U + i, slots, dims)
        write_gradient(scratch, z, gate, target, u, shape, write_activation, epsilon)
        scale_to(scratch, u, minus_step, work_field(KEY_SCALED + i, slots), slots)
    forget = load_one(scratch, scalar_field(record, FORGET, slots, dims))
    return forget, work_field(KEY_SCALED, slots), work_field(VALUE_SCALED, slots)


@function
def replay(scratch, states, state_stride, records, count, shape, activations, epsilon, keep):
    """Run the writes of ``count`` recorded tokens, storing states ``state_stride`` apart; 0 keeps the last only.

    With ``keep``, also compute what the way back needs of the reads.
    """
    write_activation, read_activation = activations
    _, _, slots, dims = shape
    size = slots * dims
    multiply(scratch, states, dim_field(records, KEY, dims), slot_field(records, KEY_Z, slots, dims), slots, dims)
    multiply(
        scratch, states + size, dim_field(records, VALUE, dims), slot_field(records, VALUE_Z, slots, dims), slots, dims
    )
    for i in range(count):
        record = records + i * _record_size(slots, dims)
        following = record + _record_size(slots, dims)
        state = states + i * state_stride
        forget, scaled_key, scaled_value = write_vectors(scratch, record, shape, write_activation, epsilon)
        write_and_multiply(
            scratch,
            state,
            state + state_stride,
            forget,
            scaled_key,
            dim_field(record, KEY, dims),
            dim_field(record, QUERY, dims),
            slot_field(record, YHAT, slots, dims),
            dim_field(following, KEY, dims),
            slot_field(following, KEY_Z, slots, dims),
            slots,
            dims,
        )
        write_and_multiply(
            scratch,
            state + size,
            state + size + state_stride,
            forget,
            scaled_value,
            dim_field(record, VALUE, dims),
            dim_field(record, OUTPUT, dims),
            slot_field(record, RBAR, slots, dims),
            dim_field(following, VALUE, dims),
            slot_field(following, VALUE_Z, slots, dims),
            slots,
            dims,
        )
        if keep:
            scale = read(scratch, record, shape, read_activation)
            read_backward(scratch, record, scale, shape, read_activation)


@function
def load_segment(
    scratch, records, tokens, token_strides, output_gradient, output_strides, batch, head, first, count, shape
):
    _, dim, slots, dims = shape
    for i in range(count):
        record = records + i * _record_size(slots, dims)
        load_token(scratch, record, tokens, token_strides, batch, first + i, head, shape)
        start = place(output_strides, 0, batch, first + i, head)
        copy(scratch, dim_field(record, OUTPUT, dims), output_gradient, start, dim)


def backward_rows(
    tokens,
    token_strides,
    states,
    state_strides,
    output_gradient,
    output_strides,
    final_gradients,
    final_strides,
    token_gradients,
    state_gradients,
    sizes,
    activations,
    second_order,
    epsilon,
    segment,
    scratch,
    first_row,
    last_row,
):
    num_tokens, num_heads, num_slots, dim = sizes
    slots, dims = _padded(num_slots), _padded(dim)
    shape = (num_slots, dim, slots, dims)
    has_state_gradients = len(state_gradients[0]) > 0
    tokens, states, final_gradients = pointers(tokens), pointers(states), pointers(final_gradients)
    token_gradients, state_gradients = pointers(token_gradients), pointers(state_gradients)
    output_gradient, scratch = pointer(output_gradient), pointer(scratch)
    start_scratch(scratch, num_slots, slots)
    size = slots * dims
    num_segments = (num_tokens + segment - 1) // segment
    gradients = _work_size(slots, dims)
    checkpoints = gradients + 2 * size
    # The last checkpoint is the first state of the segment that is worked on.
    null = checkpoints + 2 * size * (num_segments + segment + 1)
    records = null + _record_size(slots, dims)
    store_one(scratch, scalar_field(null, FORGET, slots, dims), 1)
    for row in range(first_row, last_row):
        batch, head = row // num_heads, row % num_heads
        load_memory(scratch, checkpoints, states[0], state_strides[0], batch, head, shape)
        load_memory(scratch, checkpoints + size, states[1], state_strides[1], batch, head, shape)
        for i in range(num_segments - 1):
            checkpoint = checkpoints + 2 * size * i
            for j in range(0, 2 * size, WIDTH):
                store(scratch, checkpoint + 2 * size + j, load(scratch, checkpoint + j))
            load_segment(
                scratch,
                records,
                tokens,
                token_strides,
                output_gradient,
                output_strides,
                batch,
                head,
                i * segment,
                segment,
                shape,
            )
            replay(scratch, checkpoint + 2 * size, 0, records, segment, shape, activations, epsilon, False)
        load_memory(scratch, gradients, final_gradients[0], final_strides[0], batch, head, shape)
        load_memory(scratch, gradients + size, final_gradients[1], final_strides[1], batch, head, shape)
        for i in range(num_segments - 1, -1, -1):
            first = i * segment
            count = min(segment, num_tokens - first)
            checkpoint = checkpoints + 2 * size * i
            load_segment(
                scratch,
                records,
                tokens,
                token_strides,
                output_gradient,
                output_strides,
                batch,
                head,
                first,
                count,
                shape,
            )
            replay(scratch, checkpoint, 2 * size, records, count, shape, activations, epsilon, True)
            backward_segment(
                scratch,
                gradients,
                checkpoint,
                null,
                count,
                token_gradients,
                batch,
                first,
                head,
                sizes,
                shape,
                activations,
                second_order,
                epsilon,
            )
        if has_state_gradients:
            save_memory(scratch, gradients, state_gradients[0], row, shape)
            save_memory(scratch, gradients + size, state_gradients[1], row, shape)


@function
def backward_segment(
    scratch,
    gradients,
    states,
    null,
    count,
    token_gradients,
    batch,
    first,
    head,
    sizes,
    shape,
    activations,
    second_order,
    epsilon,
):
    """Walk from the segment's last token to its first; ``null``, a token that does nothing, stands at both ends."""
    _, _, slots, dims = shape
    size = slots * dims
    fill_zero(scratch, work_field(KEY_SCALED, slots), 4 * slots)  # and VALUE_SCALED, KEY_ZBAR, VALUE_ZBAR
    query_gradient = NUM_WORK_SLOT_FIELDS * slots
    key_gradient, value_gradient = query_gradient + dims, query_gradient + 2 * dims
    record = null
    inner = passed = load_one(scratch, work_field(ABAR, slots))  # set below before it is used
    for i in range(count, -1, -1):
        earlier = null + i * _record_size(slots, dims)
        state = states + i * 2 * size
        forget = load_one(scratch, scalar_field(record, FORGET, slots, dims))
        key_pull_back(
            scratch,
            gradients,
            state,
            forget,
            work_field(KEY_SCALED, slots),
            work_field(KEY_ZBAR, slots),
            dim_field(record, KEY, dims),
            slot_field(earlier, YHATBAR, slots, dims),
            dim_field(earlier, QUERY, dims),
            dim_field(earlier, KEY, dims),
            work_field(KEY_GW, slots),
            key_gradient,
            query_gradient,
            slots,
            dims,
        )
        value_pull_back(
            scratch,
            gradients + size,
            state + size,
            forget,
            work_field(VALUE_SCALED, slots),
            work_field(VALUE_ZBAR, slots),
            dim_field(record, VALUE, dims),
            slot_field(earlier, R, slots, dims),
            dim_field(earlier, OUTPUT, dims),
            dim_field(earlier, VALUE, dims),
            work_field(VALUE_GW, slots),
            value_gradient,
            value_gradient + dims,
            slots,
            dims,
        )
        num_tokens, num_heads, num_slots, dim = sizes
        if i < count:
            at = (batch * num_tokens + first + i) * num_heads + head
            copy(token_gradients[1], at * dim, scratch, key_gradient, dim)
            copy(token_gradients[2], at * dim, scratch, value_gradient, dim)
        if i > 0:
            at = (batch * num_tokens + first + i - 1) * num_heads + head
            copy(token_gradients[0], at * dim, scratch, query_gradient, dim)
            dot = token_backward(scratch, earlier, shape, activations[0], second_order, epsilon)
            copy(token_gradients[3], at * num_slots, scratch, work_field(ABAR, slots), num_slots)
            earlier_forget = load_one(scratch, scalar_field(earlier, FORGET, slots, dims))
            if i == count or i % INNER_PERIOD == 0 or earlier_forget < INNER_FORGET:
                inner = earlier_forget * inner_product(scratch, gradients, state - 2 * size, 2 * size)
            else:
                step = load_one(scratch, scalar_field(earlier, STEP, slots, dims))
                inner = inner + (passed + inner_product_of_read(scratch, earlier, shape)) + step * dot
            passed = inner_product_of_write(scratch, earlier, shape)
            store_one(token_gradients[4], at, inner)
            store_one(token_gradients[5], at, -dot)
        record = earlier


@inline
def inner_product_of_read(scratch, record, shape):
    """Return what a token's reads add to ``<G, S>``, both memories together."""
    _, _, slots, dims = shape
    yhatbar, yhat = slot_field(record, YHATBAR, slots, dims), slot_field(record, YHAT, slots, dims)
    r, rbar = slot_field(record, R, slots, dims), slot_field(record, RBAR, slots, dims)
    return inner_product(scratch, yhatbar, yhat, slots) + inner_product(scratch, r, rbar, slots)


@inline
def inner_product_of_write(scratch, record, shape):
    """Return what a token's writes, by way of z, add to ``<G, S>`` before them, both memories together."""
    _, _, slots, dims = shape
    z = slot_field(record, KEY_Z, slots, dims)  # and VALUE_Z after it, as VALUE_ZBAR after KEY_ZBAR
    return inner_product(scratch, work_field(KEY_ZBAR, slots), z, 2 * slots)


@function
def token_backward(scratch, record, shape, write_activation, second_order, epsilon):
    """Compute, of one token's two writes, zbar, ``-g u`` and ABAR from ``G w``; return the sum of their ``u . G w``."""
    _, _, slots, dims = shape
    step = load_one(scratch, scalar_field(record, STEP, slots, dims))
    target = slot_field(record, TARGET, slots, dims)
    fill_zero(scratch, work_field(ABAR, slots), slots)
    dot = zero(scratch)
    for i in range(2):
        z, gate = slot_field(record, KEY_Z + i, slots, dims), slot_field(record, KEY_GATE + i, slots, dims)
        u, gw = slot_field(record, KEY_U + i, slots, dims), work_field(KEY_GW + i, slots)
        for j in range(0, slots, WIDTH):
            dot = multiply_add(load(scratch, u + j), load(scratch, gw + j), dot)
        scale_to(scratch, u, -step, work_field(KEY_SCALED + i, slots), slots)
        write_gradient_backward(
            scratch,
            z,
            gate,
            target,
            gw,
            step,
            work_field(KEY_ZBAR + i, slots),
            shape,
            write_activation,
            second_order,
            epsilon,
        )
    return sum_lanes(dot)
