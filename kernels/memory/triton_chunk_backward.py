"""GPU kernels of the chunkwise form's backward pass, in their order. Names are those of triton_chunk_parts.py."""

import triton
import triton.language as tl

from trellis_ts.kernels.memory.triton_chunk_parts import (
    add_reads,
    as_operand,
    decay_between,
    decay_since_start,
    decay_to_end,
    is_shut,
    load_columns,
    load_decays,
    load_scalars,
    load_tile,
    matmul,
    tokens_of,
)
from trellis_ts.kernels.memory.triton_common import (
    load_vector,
    read,
    read_vjp,
    store_vector,
    write_gradient,
    write_gradient_vjp,
)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_codes_backward_kernel(
    p_query,
    p_key,
    p_value,
    p_step_size,
    p_cumulated,
    p_shut,
    p_states,
    p_written,
    p_output_grad,
    p_codes,
    p_decay_part,
    T,
    H,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    READ: tl.constexpr,
):
    """One tile read again, and back to what the key memory answered.

    Leaves in ``p_codes``, ``[B, T, H, 2, M]`` of operands, the gradient of that answer and what the value memory was
    read with; in ``p_decay_part`` the gradient of the cumulated logarithms of the tokens that read, by way of the value
    memory.
    """
    num_tiles = tl.cdiv(T, BC)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_tiles
    i_tile = i_program % num_tiles
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & m_d
    _, m_t, o_token = tokens_of(i_row, i_tile, T, H, BC)
    p_state = p_states + (i_row * tl.cdiv(T, BT) + i_tile // TILES) * (2 * M * D) + o_m[:, None] * D + o_d[None, :]
    b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_t)
    b_mu = decay_since_start(b_cum, b_shut)[:, None]

    b_q = load_tile(p_query, o_token, D, o_d, m_t[:, None] & m_d)
    b_y = b_mu * matmul(b_q, tl.trans(tl.load(p_state, mask=m_state, other=0.0)), DTYPE)
    b_y, _ = add_reads(
        b_y,
        b_q,
        b_q,
        p_key,
        D,
        o_d,
        m_d,
        p_written,
        2 * M,
        o_m,
        m_m,
        p_step_size,
        p_cumulated,
        p_shut,
        i_row,
        i_tile,
        T,
        H,
        BC,
        TILES,
        DTYPE,
        False,
    )
    b_r = read(b_y, m_m, M, READ)
    store_vector(p_codes + M, b_r, o_token, o_m, m_t[:, None] & m_m, 2 * M)

    b_ybar = load_tile(p_output_grad, o_token, D, o_d, m_t[:, None] & m_d)
    b_rbar = b_mu * matmul(b_ybar, tl.trans(tl.load(p_state + M * D, mask=m_state, other=0.0)), DTYPE)
    b_cumbar = tl.sum(b_rbar * b_r, axis=1)
    b_rbar, b_pairs = add_reads(
        b_rbar,
        b_ybar,
        b_r,
        p_value,
        D,
        o_d,
        m_d,
        p_written + M,
        2 * M,
        o_m,
        m_m,
        p_step_size,
        p_cumulated,
        p_shut,
        i_row,
        i_tile,
        T,
        H,
        BC,
        TILES,
        DTYPE,
        True,
    )
    b_cumbar += b_pairs
    b_yhatbar = read_vjp(b_y, b_r, b_rbar, m_m, M, READ)
    store_vector(p_codes, b_yhatbar, o_token, o_m, m_t[:, None] & m_m, 2 * M)
    tl.store(p_decay_part + o_token, b_cumbar, mask=m_t)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_queries_backward_kernel(
    p_query,
    p_key,
    p_step_size,
    p_cumulated,
    p_shut,
    p_states,
    p_written,
    p_codes,
    p_query_grad,
    p_decay_part,
    T,
    H,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """From the gradient of what the key memory answered back to the queries of one tile; adds to ``p_decay_part``."""
    num_tiles = tl.cdiv(T, BC)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_tiles
    i_tile = i_program % num_tiles
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & m_d
    _, m_t, o_token = tokens_of(i_row, i_tile, T, H, BC)
    p_state = p_states + (i_row * tl.cdiv(T, BT) + i_tile // TILES) * (2 * M * D) + o_m[:, None] * D + o_d[None, :]
    b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_t)
    b_mu = decay_since_start(b_cum, b_shut)[:, None]

    b_q = load_tile(p_query, o_token, D, o_d, m_t[:, None] & m_d)
    b_ybar = load_tile(p_codes, o_token, 2 * M, o_m, m_t[:, None] & m_m)
    b_qbar = b_mu * matmul(b_ybar, tl.load(p_state, mask=m_state, other=0.0), DTYPE)
    b_cumbar = load_scalars(p_decay_part, o_token, m_t) + tl.sum(b_qbar * b_q.to(tl.float32), axis=1)
    b_qbar, b_pairs = add_reads(
        b_qbar,
        b_ybar,
        b_q,
        p_written,
        2 * M,
        o_m,
        m_m,
        p_key,
        D,
        o_d,
        m_d,
        p_step_size,
        p_cumulated,
        p_shut,
        i_row,
        i_tile,
        T,
        H,
        BC,
        TILES,
        DTYPE,
        True,
    )
    store_vector(p_query_grad, b_qbar, o_token, o_d, m_t[:, None] & m_d, D)
    tl.store(p_decay_part + o_token, b_cumbar + b_pairs, mask=m_t)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_reads_backward_kernel(
    p_query,
    p_key,
    p_value,
    p_step_size,
    p_cumulated,
    p_shut,
    p_written,
    p_codes,
    p_output_grad,
    p_vector_part,
    p_written_grad,
    p_step_size_part,
    T,
    H,
    M: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """What reaches the writes of one tile, in one of the memories, by way of the reads of its chunk.

    Both memories are read alike backwards: with x the queries or the outputs' gradients and c the codes that
    ``chunk_codes_backward_kernel`` has left, ``ubar = -g (X W^T omega)^T C`` and ``wbar = -g (C U^T omega)^T X``.

    ``p_written_grad`` is ``[B, T, H, 2, M]``, ``p_vector_part`` ``[B, T, H, 2, D]``, ``p_step_size_part``
    ``[B, T, H, 2]``, in float32.
    """
    num_tiles = tl.cdiv(T, BC)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_tiles
    i_tile = i_program % num_tiles
    i_memory = tl.program_id(1)
    DTYPE: tl.constexpr = p_query.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    if i_memory == 0:
        p_w = p_key
        p_x = p_query
    else:
        p_w = p_value
        p_x = p_output_grad
    p_codes += i_memory * M
    o_early, m_early, o_token = tokens_of(i_row, i_tile, T, H, BC)
    b_w = load_tile(p_w, o_token, D, o_d, m_early[:, None] & m_d)
    b_u = load_tile(p_written + i_memory * M, o_token, 2 * M, o_m, m_early[:, None] & m_m)
    b_cum_early, b_shut_early = load_decays(p_cumulated, p_shut, o_token, m_early)

    b_ubar = tl.zeros((BC, BM), dtype=tl.float32)
    b_wbar = tl.zeros((BC, BD), dtype=tl.float32)
    b_gbar = tl.zeros((BC,), dtype=tl.float32)
    for i in range(i_tile, min(i_tile // TILES * TILES + TILES, num_tiles)):
        o_late, m_late, o_reader = tokens_of(i_row, i, T, H, BC)
        b_cum, b_shut = load_decays(p_cumulated, p_shut, o_reader, m_late)
        b_omega = decay_between(
            b_cum[None, :],
            b_shut[None, :],
            o_late[None, :],
            b_cum_early[:, None],
            b_shut_early[:, None],
            o_early[:, None],
            T,
        )
        b_x = load_tile(p_x, o_reader, D, o_d, m_late[:, None] & m_d)
        b_c = load_tile(p_codes, o_reader, 2 * M, o_m, m_late[:, None] & m_m)
        b_by_vector = matmul(b_w, tl.trans(b_x), DTYPE)
        b_by_code = matmul(b_u, tl.trans(b_c), DTYPE) * b_omega
        b_gbar -= tl.sum(b_by_vector * b_by_code, axis=1)
        b_ubar -= matmul(b_by_vector * b_omega, b_c, DTYPE)
        b_wbar -= matmul(b_by_code, b_x, DTYPE)

    b_g = load_scalars(p_step_size, o_token, m_early)[:, None]
    store_vector(p_written_grad + i_memory * M, b_g * b_ubar, o_token, o_m, m_early[:, None] & m_m, 2 * M)
    store_vector(p_vector_part + i_memory * D, b_g * b_wbar, o_token, o_d, m_early[:, None] & m_d, 2 * D)
    tl.store(p_step_size_part + o_token * 2 + i_memory, b_gbar, mask=m_early)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_states_backward_kernel(
    p_query,
    p_key,
    p_value,
    p_target,
    p_step_size,
    p_cumulated,
    p_shut,
    p_answers,
    p_codes,
    p_output_grad,
    p_written_grad,
    p_final_key_memory_grad,
    p_final_value_memory_grad,
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
    BC: tl.constexpr,
    WRITE: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """Tile after tile from the last to the first, what cannot be done in parallel: the gradients of the states.

    Programs as in the forward pass. ``p_states_grad``, of operands, gets the gradient of the state at the end of every
    chunk.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_memory = tl.program_id(1)
    DTYPE: tl.constexpr = p_key.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    if i_memory == 0:
        p_w = p_key
        p_x = p_query
        p_final_grad = p_final_key_memory_grad
        p_initial_grad = p_key_memory_grad
    else:
        p_w = p_value
        p_x = p_output_grad
        p_final_grad = p_final_value_memory_grad
        p_initial_grad = p_value_memory_grad
    p_answers += i_memory * M
    p_codes += i_memory * M
    p_written_grad += i_memory * M
    m_m = (o_m < M)[:, None]
    m_d = (o_d < D)[None, :]
    m_state = m_m & m_d
    o_state = o_m[:, None] * D + o_d[None, :]
    num_chunks = tl.cdiv(T, BT)
    num_tiles = tl.cdiv(T, BC)

    b_G = tl.load(p_final_grad + i_row * (M * D) + o_state, mask=m_state, other=0.0)
    b_end = as_operand(b_G, DTYPE)
    for i_passed in range(num_tiles):
        i_tile = num_tiles - 1 - i_passed
        i_chunk = i_tile // TILES
        is_last = (i_tile % TILES == TILES - 1) | (i_passed == 0)
        _, m_t, o_token = tokens_of(i_row, i_tile, T, H, BC)
        b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_t)
        b_all, b_omega = decay_to_end(p_cumulated, p_shut, b_cum, b_shut, i_row, i_chunk, T, H, BT)
        o_chunk = ((i_row * num_chunks + i_chunk) * 2 + i_memory) * (M * D) + o_state
        b_end = as_operand(b_G, DTYPE) if TILES == 1 else tl.where(is_last, as_operand(b_G, DTYPE), b_end)
        tl.store(p_states_grad + o_chunk, b_end, mask=m_state & is_last)

        m_u = m_m & m_t[None, :]
        b_x = load_tile(p_x, o_token, D, o_d, m_t[:, None] & m_d)
        b_c = load_columns(p_codes, o_token, 2 * M, o_m, m_u).to(tl.float32)
        b_c *= decay_since_start(b_cum, b_shut)[None, :]
        b_G = tl.where(is_last, b_all, 1.0) * b_G + matmul(b_c, b_x, DTYPE)
        if SECOND_ORDER:
            b_w = load_tile(p_w, o_token, D, o_d, m_t[:, None] & m_d)
            b_a = load_columns(p_target, o_token, M, o_m, m_u).to(tl.float32)
            b_g = load_scalars(p_step_size, o_token, m_t)
            b_ubar = load_columns(p_written_grad, o_token, 2 * M, o_m, m_u)
            b_ubar -= (b_g * b_omega)[None, :] * matmul(b_end, tl.trans(b_w), DTYPE)
            b_z = load_columns(p_answers, o_token, 2 * M, o_m, m_u)
            b_zbar, _ = write_gradient_vjp(b_z, b_a, b_ubar, m_m, epsilon, M, WRITE, 0)
            b_G += matmul(b_zbar, b_w, DTYPE)

    tl.store(p_initial_grad + i_row * (M * D) + o_state, b_G, mask=m_state)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_writes_backward_kernel(
    p_key,
    p_value,
    p_target,
    p_log_forget,
    p_step_size,
    p_cumulated,
    p_shut,
    p_states,
    p_answers,
    p_states_grad,
    p_vector_part,
    p_written_grad,
    p_step_size_part,
    p_decay_part,
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
    BC: tl.constexpr,
    WRITE: tl.constexpr,
    SECOND_ORDER: tl.constexpr,
):
    """All that reaches the inputs of one chunk by way of its writes, added to what came by way of its reads.

    Its tiles in order, because a gate gathers what reaches the ends of all pairs of tokens around it.
    """
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    i_row = i_program // num_chunks
    i_chunk = i_program % num_chunks
    DTYPE: tl.constexpr = p_key.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_m = (o_m < M)[None, :]
    m_d = (o_d < D)[None, :]
    m_state = (o_m < M)[:, None] & m_d
    o_state = i_program * (2 * M * D) + o_m[:, None] * D + o_d[None, :]

    # Of the whole chunk: what its reads do to the cumulated logarithms.
    o_all, m_all, o_chunk = tokens_of(i_row, i_chunk, T, H, BT)
    b_part = load_scalars(p_step_size_part, o_chunk * 2, m_all) + load_scalars(p_step_size_part, o_chunk * 2 + 1, m_all)
    b_part = load_scalars(p_decay_part, o_chunk, m_all) - load_scalars(p_step_size, o_chunk, m_all) * b_part

    b_pulled = 0.0  # by the tokens of earlier tiles, from the end of the chunk
    for i_tile in range(i_chunk * TILES, min(i_chunk * TILES + TILES, tl.cdiv(T, BC))):
        _, m_t, o_token = tokens_of(i_row, i_tile, T, H, BC)
        b_a = load_vector(p_target, o_token, o_m, m_t[:, None] & m_m, M)
        b_g = load_scalars(p_step_size, o_token, m_t)
        b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_t)
        b_all, b_omega = decay_to_end(p_cumulated, p_shut, b_cum, b_shut, i_row, i_chunk, T, H, BT)
        b_scale = (b_g * b_omega)[:, None]  # of a write in the state at the end of the chunk, up to its sign

        b_abar = tl.zeros((BC, BM), dtype=tl.float32)
        b_pull = tl.zeros((BC,), dtype=tl.float32)
        b_gbar = tl.zeros((BC,), dtype=tl.float32)
        b_carried = 0.0
        for i_memory in range(2):
            if i_memory == 0:
                p_w = p_key
                p_grad = p_key_grad
            else:
                p_w = p_value
                p_grad = p_value_grad
            b_S = tl.load(p_states + o_state + i_memory * (M * D), mask=m_state, other=0.0)
            b_G = tl.load(p_states_grad + o_state + i_memory * (M * D), mask=m_state, other=0.0)
            b_carried += tl.sum(b_G.to(tl.float32) * b_S.to(tl.float32))
            b_w = load_tile(p_w, o_token, D, o_d, m_t[:, None] & m_d)
            b_z = load_tile(p_answers + i_memory * M, o_token, 2 * M, o_m, m_t[:, None] & m_m)
            b_Gw = matmul(b_w, tl.trans(b_G), DTYPE)
            b_u = write_gradient(b_z, b_a, m_m, epsilon, M, WRITE)
            b_pull -= tl.sum(b_u * b_Gw, axis=1)
            b_gbar += load_scalars(p_step_size_part, o_token * 2 + i_memory, m_t)

            b_ubar = load_tile(p_written_grad + i_memory * M, o_token, 2 * M, o_m, m_t[:, None] & m_m)
            b_ubar -= b_scale * b_Gw
            b_zbar, b_of_target = write_gradient_vjp(b_z, b_a, b_ubar, m_m, epsilon, M, WRITE)
            b_abar += b_of_target
            b_wbar = load_tile(p_vector_part + i_memory * D, o_token, 2 * D, o_d, m_t[:, None] & m_d)
            b_wbar -= matmul(b_scale * b_u, b_G, DTYPE)
            if SECOND_ORDER:
                b_wbar += matmul(b_zbar, b_S, DTYPE)
            store_vector(p_grad, b_wbar, o_token, o_d, m_t[:, None] & m_d, D)

        store_vector(p_target_grad, b_abar, o_token, o_m, m_t[:, None] & m_m, M)
        b_pull *= b_omega
        tl.store(p_step_size_grad + o_token, (b_pull + b_gbar).to(p_step_size_grad.dtype.element_ty), mask=m_t)

        # A gate is in the cumulated logarithm of its own token and all later ones, and of the end of the chunk. Of the
        # pairs of a write and that end, those that begin before the gate are around it.
        b_pull *= b_g
        b_cumbar = load_scalars(p_decay_part, o_token, m_t) - b_g * b_gbar
        b_later = tl.sum(tl.where(o_all >= i_tile * BC + BC, b_part, 0.0), axis=0)
        b_logbar = tl.cumsum(b_cumbar, axis=0, reverse=True) + b_later
        b_logbar += b_pulled + tl.cumsum(b_pull, axis=0) - b_pull + b_all * b_carried
        b_pulled += tl.sum(b_pull, axis=0)
        b_logbar = tl.where(is_shut(load_scalars(p_log_forget, o_token, m_t)), 0.0, b_logbar)
        tl.store(p_log_forget_grad + o_token, b_logbar.to(p_log_forget_grad.dtype.element_ty), mask=m_t)
