"""GPU kernels of the forward pass, and the activations both passes share.

Names: ``p_`` pointer, ``b_`` loaded block, ``o_`` offsets, ``m_`` mask, ``i_`` index. ``M`` slots, ``D`` head width,
``H`` heads, ``T`` tokens; ``BM`` and ``BD`` are M and D padded to powers of two, ``ROWS`` the rows (batch times head)
of one program, ``BT`` the tokens of a chunk. Tensors are contiguous: tokens ``[B, T, H, *]``, states ``[B, H, M, D]``.
The entries a block has beyond M or D are kept at zero throughout, so that sums over slots need no mask.
README.md beside this file derives what is computed.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def slope_of_silu(b_z):
    """SiLU and its first derivative."""
    b_sigmoid = tl.sigmoid(b_z)
    b_s = b_z * b_sigmoid
    return b_s, b_sigmoid + b_s * (1.0 - b_sigmoid)


@triton.jit
def normalise(b_s, m_m, epsilon, M: tl.constexpr):
    """LayerNorm without affine part over the last axis of ``[*, BM]``: what it returns, and the inverse deviation."""
    b_c = tl.where(m_m, b_s - tl.sum(b_s, axis=1)[:, None] / M, 0.0)
    b_rho = tl.rsqrt(tl.sum(b_c * b_c, axis=1) / M + epsilon)[:, None]
    return b_c * b_rho, b_rho


@triton.jit
def write_gradient(b_z, b_a, m_m, epsilon, M: tl.constexpr, WRITE: tl.constexpr):
    """``u = J_phi(z)^T (phi(z) - a)`` for ``[*, BM]`` of z and a."""
    if WRITE == "identity":
        return b_z - b_a
    b_s, b_slope = slope_of_silu(b_z)
    if WRITE == "silu":
        return b_slope * (b_s - b_a)
    else:
        b_n, b_rho = normalise(b_s, m_m, epsilon, M)
        b_e = b_n - b_a
        b_h = b_e - tl.sum(b_e, axis=1)[:, None] / M - b_n * (tl.sum(b_e * b_n, axis=1)[:, None] / M)
        return tl.where(m_m, b_slope * b_rho * b_h, 0.0)


@triton.jit
def read(b_y, m_m, M: tl.constexpr, READ: tl.constexpr):
    """``f(y)`` for ``[*, BM]``."""
    if READ == "softmax":
        b_y = tl.where(m_m, b_y, -1e30)  # finite: a block may hold a row that is masked throughout
        b_y = tl.exp(b_y - tl.max(b_y, axis=1)[:, None])
        return b_y / tl.sum(b_y, axis=1)[:, None]
    b_s = b_y * tl.sigmoid(b_y)
    if READ == "l2_silu":
        return b_s * tl.rsqrt(tl.sum(b_s * b_s, axis=1) + 1e-6)[:, None]
    else:
        b_r, _ = normalise(b_s, m_m, 1e-6, M)
        return b_r


@triton.jit
def advance(b_S, b_u, b_w, b_b, b_g):
    """Eq. 8 for ``[ROWS, BM, BD]``."""
    return b_b[:, None, None] * b_S - (b_g[:, None] * b_u)[:, :, None] * b_w[:, None, :]


@triton.jit
def load_vector(p, o_token, o, m, WIDTH: tl.constexpr):
    """Row ``o_token`` of a ``[tokens, WIDTH]`` tensor for every token of a block, in float32."""
    return tl.load(p + o_token[:, None] * WIDTH + o[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_gates(p_log_forget, p_step_size, o_token, m_token):
    b_b = tl.exp(tl.load(p_log_forget + o_token, mask=m_token, other=0.0).to(tl.float32))
    return b_b, tl.load(p_step_size + o_token, mask=m_token, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "T", "H", "segment"])
def exact_forward_kernel(
    p_query,
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_key_memory,
    p_value_memory,
    p_output,
    p_final_key_memory,
    p_final_value_memory,
    p_checkpoint,
    num_rows,
    T,
    H,
    segment,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ROWS: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Token after token with both states in registers; ``KEEP`` stores them at the start of each segment but the first.

    The final state may be the initial one's memory: it is read first and written last.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_row = o_row < num_rows
    m_m = m_row[:, None] & (o_m < M)[None, :]
    m_d = m_row[:, None] & (o_d < D)[None, :]
    m_state = m_m[:, :, None] & m_d[:, None, :]
    o_inner = o_m[None, :, None] * D + o_d[None, None, :]
    o_state = o_row[:, None, None] * (M * D) + o_inner
    o_token = (o_row // H) * T * H + o_row % H

    b_K = tl.load(p_key_memory + o_state, mask=m_state, other=0.0)
    b_V = tl.load(p_value_memory + o_state, mask=m_state, other=0.0)

    for i_segment in range(tl.cdiv(T, segment)):
        if KEEP:
            o_kept = (tl.cast(i_segment - 1, tl.int64) * num_rows + o_row) * 2
            p_kept = p_checkpoint + o_kept[:, None, None] * (M * D) + o_inner
            tl.store(p_kept, b_K, mask=m_state & (i_segment > 0))
            tl.store(p_kept + M * D, b_V, mask=m_state & (i_segment > 0))

        for _ in range(i_segment * segment, min(i_segment * segment + segment, T)):
            b_q = load_vector(p_query, o_token, o_d, m_d, D)
            b_k = load_vector(p_key, o_token, o_d, m_d, D)
            b_v = load_vector(p_value, o_token, o_d, m_d, D)
            b_a = load_vector(p_target, o_token, o_m, m_m, M)
            b_b, b_g = load_gates(p_log_forget, p_step_size, o_token, m_row)

            b_u = write_gradient(tl.sum(b_K * b_k[:, None, :], axis=2), b_a, m_m, epsilon, M, WRITE)
            b_K = advance(b_K, b_u, b_k, b_b, b_g)
            b_u = write_gradient(tl.sum(b_V * b_v[:, None, :], axis=2), b_a, m_m, epsilon, M, WRITE)
            b_V = advance(b_V, b_u, b_v, b_b, b_g)
            b_r = read(tl.sum(b_K * b_q[:, None, :], axis=2), m_m, M, READ)
            b_o = tl.sum(b_V * b_r[:, :, None], axis=1)

            p_o = p_output + o_token[:, None] * D + o_d[None, :]
            tl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_d)
            o_token += H

    tl.store(p_final_key_memory + o_state, b_K, mask=m_state)
    tl.store(p_final_value_memory + o_state, b_V, mask=m_state)


@triton.jit
def matmul(b_x, b_y, DTYPE: tl.constexpr):
    """A matrix product added up in float32, as exact as inputs of ``DTYPE`` deserve.

    float16 goes through TensorFloat-32, which has its ten bits: states and gradients outgrow float16's range. float32
    is the sum of three such products of what TensorFloat-32 keeps and what it drops, good to 21 bits; plain float32
    has no tensor cores, and unrolled into multiply-adds it spills 34 kB per thread.
    """
    if DTYPE.is_bf16():
        b_x = b_x.to(tl.bfloat16)
        b_y = b_y.to(tl.bfloat16)
        if INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
            b_x = b_x.to(tl.float32)
            b_y = b_y.to(tl.float32)
        return tl.dot(b_x, b_y)
    elif DTYPE.is_fp16():
        return tl.dot(b_x, b_y, input_precision="tf32")
    else:
        return tl.dot(b_x, b_y, input_precision="tf32x3")


@triton.jit
def load_decays(p_log_forget, o_token, m_t):
    """Log-forgets of a chunk cumulated from its start, shut gates apart, and how many gates were shut until then.

    Gates are multiplied by subtracting these; a shut gate, of logarithm minus infinity, would give a nan. It is one
    below float32's smallest number, and any product across it is zero.
    """
    b_log = tl.load(p_log_forget + o_token, mask=m_t, other=0.0).to(tl.float32)
    m_shut = b_log < -87.0
    return tl.cumsum(tl.where(m_shut, 0.0, b_log), axis=0), tl.cumsum(m_shut.to(tl.int32), axis=0), m_shut


@triton.jit
def decays_to_end(b_cum, b_shut, o_t, BT: tl.constexpr):
    """The product of all gates of a chunk, and for every token that of the gates after it."""
    b_total = tl.sum(tl.where(o_t == BT - 1, b_cum, 0.0), axis=0)
    num_shut = tl.sum(tl.where(o_t == BT - 1, b_shut, 0), axis=0)
    b_mu_end = tl.where(num_shut == 0, tl.exp(b_total), 0.0)
    return b_mu_end, tl.where(b_shut == num_shut, tl.exp(b_total - b_cum), 0.0)


@triton.jit
def decays_between(b_cum, b_shut, o_t):
    """``[BT, BT]``: the product of the gates after column i up to and including row t; zero above the diagonal."""
    m_past = (o_t[:, None] >= o_t[None, :]) & (b_shut[:, None] == b_shut[None, :])
    # Above the diagonal the exponent is positive and may overflow.
    return tl.exp(tl.where(m_past, b_cum[:, None] - b_cum[None, :], float("-inf")))


@triton.jit(do_not_specialize=["T", "H"])
def chunk_states_kernel(
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_key_memory,
    p_value_memory,
    p_states,
    p_final_key_memory,
    p_final_value_memory,
    T,
    H,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Chunk after chunk, what cannot be done in parallel: the states at the start of every chunk, and the final ones.

    One program per row, memory and block of BM slots: without a LayerNorm no slot sees another.
    ``p_states`` is ``[rows, chunks, 2, M, D]``.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_memory = tl.program_id(1)
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    if i_memory == 0:
        p_w = p_key
        p_initial = p_key_memory
        p_final = p_final_key_memory
    else:
        p_w = p_value
        p_initial = p_value_memory
        p_final = p_final_value_memory
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & m_d
    o_state = o_m[:, None] * D + o_d[None, :]
    num_chunks = tl.cdiv(T, BT)

    b_S = tl.load(p_initial + i_row * (M * D) + o_state, mask=m_state, other=0.0)
    for i_chunk in range(num_chunks):
        tl.store(p_states + ((i_row * num_chunks + i_chunk) * 2 + i_memory) * (M * D) + o_state, b_S, mask=m_state)
        o_time = i_chunk * BT + o_t
        m_t = o_time < T
        o_token = (i_row // H * T + o_time) * H + i_row % H
        b_w = load_vector(p_w, o_token, o_d, m_t[:, None] & m_d, D)
        b_a = load_vector(p_target, o_token, o_m, m_t[:, None] & m_m, M)
        b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
        b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
        b_mu_end, b_omega = decays_to_end(b_cum, b_shut, o_t, BT)

        b_u = write_gradient(matmul(b_w, tl.trans(b_S), p_key.dtype.element_ty), b_a, m_m, epsilon, M, WRITE)
        b_u = b_u * (b_g * b_omega)[:, None]
        b_S = b_mu_end * b_S - matmul(tl.trans(b_u), b_w, p_key.dtype.element_ty)

    tl.store(p_final + i_row * (M * D) + o_state, b_S, mask=m_state)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_key_reads_kernel(
    p_query,
    p_key,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_read,
    T,
    H,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WRITE: tl.constexpr,
):
    """What the key memory answers to every query of one chunk, from the state at its start; ``[B, T, H, M]``."""
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    o_time = i_chunk * BT + o_t
    m_t = o_time < T
    m_slot = (o_m < M)[None, :]
    m_m = m_t[:, None] & m_slot
    m_d = m_t[:, None] & (o_d < D)[None, :]
    o_token = (i_row // H * T + o_time) * H + i_row % H
    p_state = p_states + i_program * (2 * M * D) + o_m[:, None] * D + o_d[None, :]

    # Loads stand next to their use: all at the top, they would hold registers throughout.
    b_w = load_vector(p_key, o_token, o_d, m_d, D)
    b_q = load_vector(p_query, o_token, o_d, m_d, D)
    b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
    b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
    b_mu = tl.where(b_shut == 0, tl.exp(b_cum), 0.0)[:, None]
    b_p = matmul(b_q, tl.trans(b_w), DTYPE) * decays_between(b_cum, b_shut, o_t) * b_g[None, :]
    b_S = tl.load(p_state, mask=(o_m < M)[:, None] & (o_d < D)[None, :], other=0.0)
    b_z = matmul(b_w, tl.trans(b_S), DTYPE)
    b_a = load_vector(p_target, o_token, o_m, m_m, M)
    b_y = -matmul(b_p, write_gradient(b_z, b_a, m_slot, epsilon, M, WRITE), DTYPE)
    b_y += b_mu * matmul(b_q, tl.trans(b_S), DTYPE)
    tl.store(p_read + o_token[:, None] * M + o_m[None, :], b_y, mask=m_m)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_reads_kernel(
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_read,
    p_output,
    T,
    H,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
):
    """The output of one chunk, from the value memory at its start and what was read from the key memory."""
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_value.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    o_time = i_chunk * BT + o_t
    m_t = o_time < T
    m_slot = (o_m < M)[None, :]
    m_m = m_t[:, None] & m_slot
    m_d = m_t[:, None] & (o_d < D)[None, :]
    o_token = (i_row // H * T + o_time) * H + i_row % H
    p_state = p_states + (i_program * 2 + 1) * (M * D) + o_m[:, None] * D + o_d[None, :]

    b_w = load_vector(p_value, o_token, o_d, m_d, D)
    b_S = tl.load(p_state, mask=(o_m < M)[:, None] & (o_d < D)[None, :], other=0.0)
    b_z = matmul(b_w, tl.trans(b_S), DTYPE)
    b_a = load_vector(p_target, o_token, o_m, m_m, M)
    b_u = write_gradient(b_z, b_a, m_slot, epsilon, M, WRITE)
    b_r = read(load_vector(p_read, o_token, o_m, m_m, M), m_slot, M, READ)
    b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
    b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
    b_mu = tl.where(b_shut == 0, tl.exp(b_cum), 0.0)[:, None]
    b_p = matmul(b_r, tl.trans(b_u), DTYPE) * decays_between(b_cum, b_shut, o_t) * b_g[None, :]
    b_o = b_mu * matmul(b_r, b_S, DTYPE) - matmul(b_p, b_w, DTYPE)
    tl.store(p_output + o_token[:, None] * D + o_d[None, :], b_o.to(DTYPE), mask=m_d)
