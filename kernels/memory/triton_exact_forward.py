"""GPU kernel of the exact recurrence. ``ROWS`` is the rows of one program, other names those of triton_common.py."""

import triton
import triton.language as tl

from trellis_ts.kernels.memory.triton_common import load_vector, read, store_vector, write_gradient


@triton.jit
def advance(b_S, b_u, b_w, b_b, b_g):
    """Eq. 8 for ``[ROWS, BM, BD]``."""
    return b_b[:, None, None] * b_S - (b_g[:, None] * b_u)[:, :, None] * b_w[:, None, :]


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

            store_vector(p_output, b_o, o_token, o_d, m_d, D)
            o_token += H

    tl.store(p_final_key_memory + o_state, b_K, mask=m_state)
    tl.store(p_final_value_memory + o_state, b_V, mask=m_state)
