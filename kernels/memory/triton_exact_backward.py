"""GPU kernel of the exact recurrence's backward pass. Names and layouts are those of triton_exact_forward.py."""

import triton
import triton.language as tl

from trellis_ts.kernels.memory.triton_common import (
    load_vector,
    read,
    read_vjp,
    store_vector,
    write_gradient,
    write_gradient_vjp,
)
from trellis_ts.kernels.memory.triton_exact_forward import advance, load_gates


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
