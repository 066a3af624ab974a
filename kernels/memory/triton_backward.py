"""GPU kernels of the backward pass. Names and layouts are those of triton_forward.py; README.md derives the formulas.

``grad`` in the name of a pointer means the gradient of the loss with respect to what precedes it; in formulas, a name
that ends in ``bar``.
"""

import triton
import triton.language as tl

from trellis_ts.kernels.memory.triton_forward import (
    advance,
    decays_between,
    decays_to_end,
    load_decays,
    load_gates,
    load_vector,
    matmul,
    normalise,
    read,
    slope_of_silu,
    write_gradient,
)


@triton.jit
def write_gradient_vjp(b_z, b_a, b_ubar, m_m, epsilon, M: tl.constexpr, WRITE: tl.constexpr):
    """``(zbar, abar)`` from ``ubar`` for ``[*, BM]``: the second derivative of the write's loss."""
    if WRITE == "identity":
        return b_ubar, -b_ubar
    b_s, b_slope = slope_of_silu(b_z)
    b_sigmoid = tl.sigmoid(b_z)
    b_curve = b_sigmoid * (1.0 - b_sigmoid) * (2.0 + b_z * (1.0 - 2.0 * b_sigmoid))
    if WRITE == "silu":
        return b_ubar * (b_slope * b_slope + b_curve * (b_s - b_a)), -b_ubar * b_slope
    else:
        b_n, b_rho = normalise(b_s, m_m, epsilon, M)
        b_c = b_n / b_rho
        b_e = b_n - b_a
        b_p = tl.sum(b_e * b_n, axis=1)[:, None] / M
        b_h = b_e - tl.sum(b_e, axis=1)[:, None] / M - b_n * b_p
        b_x = b_slope * b_ubar
        b_hbar = b_rho * b_x
        b_pbar = -tl.sum(b_hbar * b_n, axis=1)[:, None]
        b_ebar = b_hbar - tl.sum(b_hbar, axis=1)[:, None] / M + b_pbar * b_n / M
        b_ebar = tl.where(m_m, b_ebar, 0.0)
        b_nbar = b_ebar - b_p * b_hbar + b_pbar * b_e / M
        b_rhobar = tl.sum(b_x * b_h + b_nbar * b_c, axis=1)[:, None]
        b_cbar = b_rho * b_nbar - b_rho * b_rho * b_rho * b_rhobar * b_c / M
        b_zbar = b_slope * (b_cbar - tl.sum(b_cbar, axis=1)[:, None] / M) + b_curve * b_rho * b_h * b_ubar
        return tl.where(m_m, b_zbar, 0.0), -b_ebar


@triton.jit
def read_vjp(b_y, b_r, b_rbar, m_m, M: tl.constexpr, READ: tl.constexpr):
    """``J_f(y)^T rbar`` for ``[*, BM]``, where ``b_r`` is ``f(y)``."""
    if READ == "softmax":
        return b_r * (b_rbar - tl.sum(b_r * b_rbar, axis=1)[:, None])
    b_s, b_slope = slope_of_silu(b_y)
    if READ == "l2_silu":
        b_rho = tl.rsqrt(tl.sum(b_s * b_s, axis=1) + 1e-6)[:, None]
        return b_slope * b_rho * (b_rbar - b_r * tl.sum(b_r * b_rbar, axis=1)[:, None])
    else:
        _, b_rho = normalise(b_s, m_m, 1e-6, M)
        b_mean = tl.sum(b_rbar, axis=1)[:, None] / M
        b_sbar = b_rho * (b_rbar - b_mean - b_r * (tl.sum(b_r * b_rbar, axis=1)[:, None] / M))
        return tl.where(m_m, b_slope * b_sbar, 0.0)


@triton.jit
def write_backward(
    b_G,
    b_S,
    b_z,
    b_u,
    b_a,
    b_w,
    b_b,
    b_g,
    m_m,
    epsilon,
    M: tl.constexpr,
    WRITE: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """One write, ``b_G`` on entry the gradient of the state after it, and on return of ``b_S``, the state before it."""
    b_Gw = tl.sum(b_G * b_w[:, None, :], axis=2)
    b_gbar = -tl.sum(b_u * b_Gw, axis=1)
    b_bbar = tl.sum(tl.sum(b_G * b_S, axis=2), axis=1)
    b_zbar, b_abar = write_gradient_vjp(b_z, b_a, -b_g[:, None] * b_Gw, m_m, epsilon, M, WRITE)
    if SECOND_ORDER:
        b_wbar = tl.sum(b_S * b_zbar[:, :, None] - b_G * (b_g[:, None] * b_u)[:, :, None], axis=1)
        b_G = b_b[:, None, None] * b_G + b_zbar[:, :, None] * b_w[:, None, :]
    else:
        b_wbar = -tl.sum(b_G * (b_g[:, None] * b_u)[:, :, None], axis=1)
        b_G = b_b[:, None, None] * b_G
    return b_G, b_wbar, b_abar, b_bbar, b_gbar


@triton.jit
def replay(b_S, p_u, p_w, p_log_forget, p_step_size, o_token, o_d, m_row, m_m, m_d, D: tl.constexpr):
    """Write one token again, given its ``u``."""
    b_b, b_g = load_gates(p_log_forget, p_step_size, o_token, m_row)
    b_u = tl.load(p_u, mask=m_m, other=0.0)
    return advance(b_S, b_u, load_vector(p_w, o_token, o_d, m_d, D), b_b, b_g)


@triton.jit
def store_vector(p, b, o_token, o, m, WIDTH: tl.constexpr):
    """Write every token of a block to row ``o_token`` of a ``[tokens, WIDTH]`` tensor, in that tensor's dtype."""
    tl.store(p + o_token[:, None] * WIDTH + o[None, :], b.to(p.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows", "T", "H", "segment"])
def exact_backward_kernel(
    p_query,
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_key_memory,
    p_value_memory,
    p_checkpoint,
    p_output_grad,
    p_final_key_memory_grad,
    p_final_value_memory_grad,
    p_query_grad,
    p_key_grad,
    p_value_grad,
    p_target_grad,
    p_log_forget_grad,
    p_step_size_grad,
    p_key_memory_grad,
    p_value_memory_grad,
    p_kept_states,
    p_kept_vectors,
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
    REPLAY: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """Segments from the last to the first; each is swept forwards from its checkpoint, then walked backwards.

    The sweep keeps every token's vectors and every REPLAY-th state in scratch memory of the program's own, and does
    all that needs a state but no gradient of one, which includes the whole backward of the reads. The walk replays
    the few writes from the nearest kept state to the one it needs.

    ``p_kept_states`` is ``[rows, segment / REPLAY, 2, M, D]``, ``p_kept_vectors`` ``[rows, segment, 6, M]``.
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
    o_first = (o_row // H) * T * H + o_row % H
    p_kept = p_kept_states + (o_row * (tl.cdiv(segment, REPLAY) * 2 * M * D))[:, None, None] + o_inner
    p_kept_vector = p_kept_vectors + (o_row * segment * (6 * M))[:, None] + o_m[None, :]

    b_GK = tl.load(p_final_key_memory_grad + o_state, mask=m_state, other=0.0)
    b_GV = tl.load(p_final_value_memory_grad + o_state, mask=m_state, other=0.0)

    num_segments = tl.cdiv(T, segment)
    for i_passed in range(num_segments):
        i_segment = num_segments - 1 - i_passed
        i_start = i_segment * segment
        num_tokens = min(segment, T - i_start)
        o_start = o_first + tl.cast(i_start, tl.int64) * H
        if i_segment == 0:
            b_K = tl.load(p_key_memory + o_state, mask=m_state, other=0.0)
            b_V = tl.load(p_value_memory + o_state, mask=m_state, other=0.0)
        else:
            o_checkpoint = (tl.cast(i_segment - 1, tl.int64) * num_rows + o_row) * 2
            p_state = p_checkpoint + o_checkpoint[:, None, None] * (M * D) + o_inner
            b_K = tl.load(p_state, mask=m_state, other=0.0)
            b_V = tl.load(p_state + M * D, mask=m_state, other=0.0)

        for i in range(num_tokens):
            if i % REPLAY == 0:
                tl.store(p_kept + (i // REPLAY) * (2 * M * D), b_K, mask=m_state)
                tl.store(p_kept + (i // REPLAY) * (2 * M * D) + M * D, b_V, mask=m_state)
            o_token = o_start + tl.cast(i, tl.int64) * H
            b_q = load_vector(p_query, o_token, o_d, m_d, D)
            b_k = load_vector(p_key, o_token, o_d, m_d, D)
            b_v = load_vector(p_value, o_token, o_d, m_d, D)
            b_a = load_vector(p_target, o_token, o_m, m_m, M)
            b_ybar = load_vector(p_output_grad, o_token, o_d, m_d, D)
            b_b, b_g = load_gates(p_log_forget, p_step_size, o_token, m_row)

            p_vector = p_kept_vector + i * (6 * M)
            b_z = tl.sum(b_K * b_k[:, None, :], axis=2)
            b_u = write_gradient(b_z, b_a, m_m, epsilon, M, WRITE)
            b_K = advance(b_K, b_u, b_k, b_b, b_g)
            tl.store(p_vector, b_z, mask=m_m)
            tl.store(p_vector + M, b_u, mask=m_m)
            b_z = tl.sum(b_V * b_v[:, None, :], axis=2)
            b_u = write_gradient(b_z, b_a, m_m, epsilon, M, WRITE)
            b_V = advance(b_V, b_u, b_v, b_b, b_g)
            tl.store(p_vector + 2 * M, b_z, mask=m_m)
            tl.store(p_vector + 3 * M, b_u, mask=m_m)

            b_y = tl.sum(b_K * b_q[:, None, :], axis=2)
            b_r = read(b_y, m_m, M, READ)
            b_yhatbar = read_vjp(b_y, b_r, tl.sum(b_V * b_ybar[:, None, :], axis=2), m_m, M, READ)
            tl.store(p_vector + 4 * M, b_r, mask=m_m)
            tl.store(p_vector + 5 * M, b_yhatbar, mask=m_m)
            b_qbar = tl.sum(b_K * b_yhatbar[:, :, None], axis=1)
            store_vector(p_query_grad, b_qbar, o_token, o_d, m_d, D)

        # What one thread has kept another may read.
        tl.debug_barrier()

        for i_back in range(num_tokens):
            i = num_tokens - 1 - i_back
            o_token = o_start + tl.cast(i, tl.int64) * H
            p_vector = p_kept_vector + i * (6 * M)
            b_a = load_vector(p_target, o_token, o_m, m_m, M)
            b_b, b_g = load_gates(p_log_forget, p_step_size, o_token, m_row)

            b_r = tl.load(p_vector + 4 * M, mask=m_m, other=0.0)
            b_ybar = load_vector(p_output_grad, o_token, o_d, m_d, D)
            b_GV += b_r[:, :, None] * b_ybar[:, None, :]
            b_z = tl.load(p_vector + 2 * M, mask=m_m, other=0.0)
            b_u = tl.load(p_vector + 3 * M, mask=m_m, other=0.0)
            b_w = load_vector(p_value, o_token, o_d, m_d, D)
            b_S = tl.load(p_kept + (i // REPLAY) * (2 * M * D) + M * D, mask=m_state, other=0.0)
            for j in range(i // REPLAY * REPLAY, i):
                p_u = p_kept_vector + (j * 6 + 3) * M
                o_replayed = o_start + tl.cast(j, tl.int64) * H
                b_S = replay(b_S, p_u, p_value, p_log_forget, p_step_size, o_replayed, o_d, m_row, m_m, m_d, D)
            b_GV, b_wbar, b_abar, b_bbar, b_gbar = write_backward(
                b_GV, b_S, b_z, b_u, b_a, b_w, b_b, b_g, m_m, epsilon, M, WRITE, SECOND_ORDER
            )
            store_vector(p_value_grad, b_wbar, o_token, o_d, m_d, D)

            b_yhatbar = tl.load(p_vector + 5 * M, mask=m_m, other=0.0)
            b_q = load_vector(p_query, o_token, o_d, m_d, D)
            b_GK += b_yhatbar[:, :, None] * b_q[:, None, :]
            b_z = tl.load(p_vector, mask=m_m, other=0.0)
            b_u = tl.load(p_vector + M, mask=m_m, other=0.0)
            b_w = load_vector(p_key, o_token, o_d, m_d, D)
            b_S = tl.load(p_kept + (i // REPLAY) * (2 * M * D), mask=m_state, other=0.0)
            for j in range(i // REPLAY * REPLAY, i):
                p_u = p_kept_vector + (j * 6 + 1) * M
                o_replayed = o_start + tl.cast(j, tl.int64) * H
                b_S = replay(b_S, p_u, p_key, p_log_forget, p_step_size, o_replayed, o_d, m_row, m_m, m_d, D)
            b_GK, b_wbar, b_abar_key, b_bbar_key, b_gbar_key = write_backward(
                b_GK, b_S, b_z, b_u, b_a, b_w, b_b, b_g, m_m, epsilon, M, WRITE, SECOND_ORDER
            )
            store_vector(p_key_grad, b_wbar, o_token, o_d, m_d, D)

            store_vector(p_target_grad, b_abar + b_abar_key, o_token, o_m, m_m, M)
            b_bbar = b_b * (b_bbar + b_bbar_key)
            tl.store(p_log_forget_grad + o_token, b_bbar.to(p_log_forget_grad.dtype.element_ty), mask=m_row)
            b_gbar += b_gbar_key
            tl.store(p_step_size_grad + o_token, b_gbar.to(p_step_size_grad.dtype.element_ty), mask=m_row)

        # The next sweep overwrites what this walk has read.
        tl.debug_barrier()

    tl.store(p_key_memory_grad + o_state, b_GK, mask=m_state)
    tl.store(p_value_memory_grad + o_state, b_GV, mask=m_state)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_value_reads_backward_kernel(
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_output_grad,
    p_read,
    p_value_part,
    p_write_grad,
    p_step_size_part,
    p_decay_part,
    p_states_grad,
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
    """All that reaches one chunk's values, their writes' ``u`` and the value memory at its start by way of its reads.

    What it leaves in ``*_part`` lacks what comes by way of later chunks; the decays' part is the gradient of the
    cumulated logarithms. ``p_read`` comes with what was read from the key memory and leaves with its gradient.
    ``p_write_grad`` is ``[B, T, H, 2, M]``, ``p_states_grad`` like ``p_states``.
    """
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_target.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    o_time = i_chunk * BT + o_t
    m_t = o_time < T
    m_slot = (o_m < M)[None, :]
    m_m = m_t[:, None] & m_slot
    m_d = m_t[:, None] & (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & (o_d < D)[None, :]
    o_token = (i_row // H * T + o_time) * H + i_row % H
    o_state = (i_program * 2 + 1) * (M * D) + o_m[:, None] * D + o_d[None, :]
    o_vector = o_token[:, None] * M + o_m[None, :]

    b_S = tl.load(p_states + o_state, mask=m_state, other=0.0)
    b_w = load_vector(p_value, o_token, o_d, m_d, D)
    b_z = matmul(b_w, tl.trans(b_S), DTYPE)
    b_a = load_vector(p_target, o_token, o_m, m_m, M)
    b_u = write_gradient(b_z, b_a, m_slot, epsilon, M, WRITE)
    b_r = read(tl.load(p_read + o_vector, mask=m_m, other=0.0), m_slot, M, READ)
    b_ybar = load_vector(p_output_grad, o_token, o_d, m_d, D)
    b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
    b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
    b_mu = tl.where(b_shut == 0, tl.exp(b_cum), 0.0)[:, None]

    # Y = mu R S - P W, where P = (R U^T) omega g.
    tl.store(p_states_grad + o_state, matmul(tl.trans(b_mu * b_r), b_ybar, DTYPE), mask=m_state)
    b_rbar = b_mu * matmul(b_ybar, tl.trans(b_S), DTYPE)
    b_cumbar = tl.sum(b_rbar * b_r, axis=1)
    b_omega = decays_between(b_cum, b_shut, o_t)
    b_p = matmul(b_r, tl.trans(b_u), DTYPE) * b_omega
    b_pbar = -matmul(b_ybar, tl.trans(b_w), DTYPE)
    b_through = b_p * b_pbar
    tl.store(p_step_size_part + o_token, tl.sum(b_through, axis=0), mask=m_t)
    b_through *= b_g[None, :]
    b_cumbar += tl.sum(b_through, axis=1) - tl.sum(b_through, axis=0)
    tl.store(p_decay_part + o_token, b_cumbar, mask=m_t)
    b_wbar = -matmul(tl.trans(b_p * b_g[None, :]), b_ybar, DTYPE)
    tl.store(p_value_part + o_token[:, None] * D + o_d[None, :], b_wbar, mask=m_d)
    b_pbar *= b_omega * b_g[None, :]
    b_ubar = matmul(tl.trans(b_pbar), b_r, DTYPE)
    tl.store(p_write_grad + (o_token[:, None] * 2 + 1) * M + o_m[None, :], b_ubar, mask=m_m)
    b_rbar += matmul(b_pbar, b_u, DTYPE)
    b_y = tl.load(p_read + o_vector, mask=m_m, other=0.0)
    tl.store(p_read + o_vector, read_vjp(b_y, b_r, b_rbar, m_slot, M, READ), mask=m_m)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_key_reads_backward_kernel(
    p_query,
    p_key,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_read_grad,
    p_query_grad,
    p_key_part,
    p_write_grad,
    p_step_size_part,
    p_decay_part,
    p_states_grad,
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
    """The same for queries, keys and the key memory, from the gradient of what was read; adds to two of the parts."""
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_target.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    o_time = i_chunk * BT + o_t
    m_t = o_time < T
    m_slot = (o_m < M)[None, :]
    m_m = m_t[:, None] & m_slot
    m_d = m_t[:, None] & (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & (o_d < D)[None, :]
    o_token = (i_row // H * T + o_time) * H + i_row % H
    o_state = i_program * (2 * M * D) + o_m[:, None] * D + o_d[None, :]
    o_vector = o_token[:, None] * D + o_d[None, :]

    b_S = tl.load(p_states + o_state, mask=m_state, other=0.0)
    b_w = load_vector(p_key, o_token, o_d, m_d, D)
    b_z = matmul(b_w, tl.trans(b_S), DTYPE)
    b_a = load_vector(p_target, o_token, o_m, m_m, M)
    b_u = write_gradient(b_z, b_a, m_slot, epsilon, M, WRITE)
    b_q = load_vector(p_query, o_token, o_d, m_d, D)
    b_ybar = load_vector(p_read_grad, o_token, o_m, m_m, M)
    b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
    b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
    b_mu = tl.where(b_shut == 0, tl.exp(b_cum), 0.0)[:, None]

    # Y = mu Q S^T - P U, where P = (Q W^T) omega g.
    tl.store(p_states_grad + o_state, matmul(tl.trans(b_mu * b_ybar), b_q, DTYPE), mask=m_state)
    b_qbar = b_mu * matmul(b_ybar, b_S, DTYPE)
    b_cumbar = tl.sum(b_qbar * b_q, axis=1) + tl.load(p_decay_part + o_token, mask=m_t, other=0.0)
    b_omega = decays_between(b_cum, b_shut, o_t)
    b_p = matmul(b_q, tl.trans(b_w), DTYPE) * b_omega
    b_pbar = -matmul(b_ybar, tl.trans(b_u), DTYPE)
    b_through = b_p * b_pbar
    b_gbar = tl.sum(b_through, axis=0) + tl.load(p_step_size_part + o_token, mask=m_t, other=0.0)
    tl.store(p_step_size_part + o_token, b_gbar, mask=m_t)
    b_through *= b_g[None, :]
    b_cumbar += tl.sum(b_through, axis=1) - tl.sum(b_through, axis=0)
    tl.store(p_decay_part + o_token, b_cumbar, mask=m_t)
    b_ubar = -matmul(tl.trans(b_p * b_g[None, :]), b_ybar, DTYPE)
    tl.store(p_write_grad + o_token[:, None] * (2 * M) + o_m[None, :], b_ubar, mask=m_m)
    b_pbar *= b_omega * b_g[None, :]
    tl.store(p_key_part + o_vector, matmul(tl.trans(b_pbar), b_q, DTYPE), mask=m_d)
    b_qbar += matmul(b_pbar, b_w, DTYPE)
    tl.store(p_query_grad + o_vector, b_qbar.to(DTYPE), mask=m_d)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_states_backward_kernel(
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_final_key_memory_grad,
    p_final_value_memory_grad,
    p_write_grad,
    p_states_grad,
    p_key_memory_grad,
    p_value_memory_grad,
    T,
    H,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WRITE: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """Chunk after chunk from the last to the first, what cannot be done in parallel: the gradients of the states.

    Programs as in the forward pass. ``p_states_grad`` comes with what a chunk's reads do to the state at its start,
    and leaves with the gradient of the state at its end.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_memory = tl.program_id(1)
    DTYPE: tl.constexpr = p_key.dtype.element_ty
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    if i_memory == 0:
        p_w = p_key
        p_final_grad = p_final_key_memory_grad
        p_initial_grad = p_key_memory_grad
    else:
        p_w = p_value
        p_final_grad = p_final_value_memory_grad
        p_initial_grad = p_value_memory_grad
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & m_d
    o_state = o_m[:, None] * D + o_d[None, :]
    num_chunks = tl.cdiv(T, BT)

    b_G = tl.load(p_final_grad + i_row * (M * D) + o_state, mask=m_state, other=0.0)
    for i_passed in range(num_chunks):
        i_chunk = num_chunks - 1 - i_passed
        o_chunk = ((i_row * num_chunks + i_chunk) * 2 + i_memory) * (M * D) + o_state
        o_time = i_chunk * BT + o_t
        m_t = o_time < T
        o_token = (i_row // H * T + o_time) * H + i_row % H
        b_cum, b_shut, _ = load_decays(p_log_forget, o_token, m_t)
        b_mu_end, b_omega = decays_to_end(b_cum, b_shut, o_t, BT)

        b_Sbar = tl.load(p_states_grad + o_chunk, mask=m_state, other=0.0)
        tl.store(p_states_grad + o_chunk, b_G, mask=m_state)
        if SECOND_ORDER:
            b_w = load_vector(p_w, o_token, o_d, m_t[:, None] & m_d, D)
            b_a = load_vector(p_target, o_token, o_m, m_t[:, None] & m_m, M)
            b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
            o_u = (o_token[:, None] * 2 + i_memory) * M + o_m[None, :]
            b_ubar = tl.load(p_write_grad + o_u, mask=m_t[:, None] & m_m, other=0.0)
            b_ubar -= (b_g * b_omega)[:, None] * matmul(b_w, tl.trans(b_G), DTYPE)
            b_S = tl.load(p_states + o_chunk, mask=m_state, other=0.0)
            b_z = matmul(b_w, tl.trans(b_S), DTYPE)
            b_zbar, _ = write_gradient_vjp(b_z, b_a, b_ubar, m_m, epsilon, M, WRITE)
            b_Sbar += matmul(tl.trans(b_zbar), b_w, DTYPE)
        b_G = b_Sbar + b_mu_end * b_G

    tl.store(p_initial_grad + i_row * (M * D) + o_state, b_G, mask=m_state)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_writes_backward_kernel(
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_states,
    p_key_part,
    p_value_part,
    p_write_grad,
    p_step_size_part,
    p_decay_part,
    p_states_grad,
    p_key_grad,
    p_value_grad,
    p_target_grad,
    p_log_forget_grad,
    p_step_size_grad,
    T,
    H,
    epsilon,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WRITE: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """All that reaches the inputs of one chunk by way of its writes, added to what came by way of its reads."""
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_key.dtype.element_ty
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_t = tl.arange(0, BT)
    o_time = i_chunk * BT + o_t
    m_t = o_time < T
    m_slot = (o_m < M)[None, :]
    m_m = m_t[:, None] & m_slot
    m_d = m_t[:, None] & (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & (o_d < D)[None, :]
    o_token = (i_row // H * T + o_time) * H + i_row % H
    o_w = o_token[:, None] * D + o_d[None, :]
    o_u = o_token[:, None] * (2 * M) + o_m[None, :]
    o_state = i_program * (2 * M * D) + o_m[:, None] * D + o_d[None, :]

    b_a = load_vector(p_target, o_token, o_m, m_m, M)
    b_g = tl.load(p_step_size + o_token, mask=m_t, other=0.0).to(tl.float32)
    b_cum, b_shut, m_shut = load_decays(p_log_forget, o_token, m_t)
    b_mu_end, b_omega = decays_to_end(b_cum, b_shut, o_t, BT)
    b_scale = (b_g * b_omega)[:, None]  # what multiplies a write in the state at the end of the chunk, up to its sign

    b_abar = tl.zeros((BT, BM), dtype=tl.float32)
    b_pull = tl.zeros((BT,), dtype=tl.float32)
    b_carried = tl.zeros((BM,), dtype=tl.float32)
    for i_memory in range(2):
        if i_memory == 0:
            p_w = p_key
            p_part = p_key_part
            p_grad = p_key_grad
        else:
            p_w = p_value
            p_part = p_value_part
            p_grad = p_value_grad
        b_S = tl.load(p_states + o_state + i_memory * (M * D), mask=m_state, other=0.0)
        b_G = tl.load(p_states_grad + o_state + i_memory * (M * D), mask=m_state, other=0.0)
        b_w = load_vector(p_w, o_token, o_d, m_d, D)
        b_z = matmul(b_w, tl.trans(b_S), DTYPE)
        b_u = write_gradient(b_z, b_a, m_slot, epsilon, M, WRITE)
        b_Gw = matmul(b_w, tl.trans(b_G), DTYPE)
        b_pull -= tl.sum(b_u * b_Gw, axis=1)
        b_carried += tl.sum(b_G * b_S, axis=1)

        b_ubar = tl.load(p_write_grad + o_u + i_memory * M, mask=m_m, other=0.0) - b_scale * b_Gw
        b_zbar, b_of_target = write_gradient_vjp(b_z, b_a, b_ubar, m_slot, epsilon, M, WRITE)
        b_abar += b_of_target
        b_wbar = tl.load(p_part + o_w, mask=m_d, other=0.0) - matmul(b_scale * b_u, b_G, DTYPE)
        if SECOND_ORDER:
            b_wbar += matmul(b_zbar, b_S, DTYPE)
        tl.store(p_grad + o_w, b_wbar.to(DTYPE), mask=m_d)

    tl.store(p_target_grad + o_token[:, None] * M + o_m[None, :], b_abar.to(DTYPE), mask=m_m)
    b_pull *= b_omega
    b_gbar = b_pull + tl.load(p_step_size_part + o_token, mask=m_t, other=0.0)
    tl.store(p_step_size_grad + o_token, b_gbar.to(DTYPE), mask=m_t)

    b_pull *= b_g
    b_cumbar = tl.load(p_decay_part + o_token, mask=m_t, other=0.0) - b_pull
    # A gate is in the cumulated logarithm of its own token and all later ones; the end of the chunk comes last.
    b_logbar = tl.cumsum(b_cumbar, axis=0, reverse=True) + tl.sum(b_pull, axis=0) + b_mu_end * tl.sum(b_carried, axis=0)
    tl.store(p_log_forget_grad + o_token, tl.where(m_shut, 0.0, b_logbar).to(DTYPE), mask=m_t)
