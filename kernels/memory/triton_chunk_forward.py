"""GPU kernels of the chunkwise form's forward pass. Names and layouts are those of triton_chunk_parts.py."""

import triton
import triton.language as tl

from trellis_ts.kernels.memory.triton_chunk_parts import (
    add_reads,
    as_operand,
    decay_since_start,
    decay_to_end,
    load_columns,
    load_decays,
    load_scalars,
    load_tile,
    matmul,
    store_columns,
    tokens_of,
)
from trellis_ts.kernels.memory.triton_common import read, store_vector, write_gradient


@triton.jit(do_not_specialize=["T", "H"])
def chunk_states_kernel(
    p_key,
    p_value,
    p_target,
    p_step_size,
    p_cumulated,
    p_shut,
    p_key_memory,
    p_value_memory,
    p_states,
    p_written,
    p_answers,
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
    BC: tl.constexpr,
    WRITE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Tile after tile, what cannot be done in parallel: states at the start of every chunk, final ones, every ``u``.

    One program per row, memory and block of BM slots: without a LayerNorm no slot sees another.
    ``p_states`` is ``[rows, chunks, 2, M, D]``, ``p_written`` is ``[B, T, H, 2, M]``, both of operands; ``KEEP`` leaves
    ``z`` in ``p_answers``, like ``p_written`` but in float32.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_memory = tl.program_id(1)
    DTYPE: tl.constexpr = p_key.dtype.element_ty
    TILES: tl.constexpr = BT // BC
    o_m = tl.program_id(2) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    if i_memory == 0:
        p_w = p_key
        p_initial = p_key_memory
        p_final = p_final_key_memory
    else:
        p_w = p_value
        p_initial = p_value_memory
        p_final = p_final_value_memory
    m_m = (o_m < M)[:, None]
    m_d = (o_d < D)[None, :]
    m_state = m_m & m_d
    o_state = o_m[:, None] * D + o_d[None, :]
    num_chunks = tl.cdiv(T, BT)

    b_S = tl.load(p_initial + i_row * (M * D) + o_state, mask=m_state, other=0.0)
    b_start = as_operand(b_S, DTYPE)
    for i_tile in range(tl.cdiv(T, BC)):
        i_chunk = i_tile // TILES
        is_first = i_tile % TILES == 0
        _, m_t, o_token = tokens_of(i_row, i_tile, T, H, BC)
        b_w = load_tile(p_w, o_token, D, o_d, m_t[:, None] & m_d)
        m_u = m_m & m_t[None, :]
        b_a = load_columns(p_target, o_token, M, o_m, m_u).to(tl.float32)
        b_g = load_scalars(p_step_size, o_token, m_t)
        b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_t)
        b_all, b_omega = decay_to_end(p_cumulated, p_shut, b_cum, b_shut, i_row, i_chunk, T, H, BT)

        b_start = as_operand(b_S, DTYPE) if TILES == 1 else tl.where(is_first, as_operand(b_S, DTYPE), b_start)
        p_state = p_states + ((i_row * num_chunks + i_chunk) * 2 + i_memory) * (M * D) + o_state
        tl.store(p_state, b_start, mask=m_state & is_first)
        # Slots are rows here: with few tokens as rows, several warps would do the same work.
        b_z = matmul(b_start, tl.trans(b_w), DTYPE)
        if KEEP:
            store_columns(p_answers + i_memory * M, b_z, o_token, 2 * M, o_m, m_u)
        b_u = write_gradient(b_z, b_a, m_m, epsilon, M, WRITE, 0)
        store_columns(p_written + i_memory * M, b_u, o_token, 2 * M, o_m, m_u)
        b_S = tl.where(is_first, b_all, 1.0) * b_S - matmul(b_u * (b_g * b_omega)[None, :], b_w, DTYPE)

    tl.store(p_final + i_row * (M * D) + o_state, b_S, mask=m_state)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_reads_kernel(
    p_query,
    p_key,
    p_value,
    p_step_size,
    p_cumulated,
    p_shut,
    p_states,
    p_written,
    p_output,
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
    """The output of one tile, from both states at its chunk's start and the writes since."""
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
    b_o = b_mu * matmul(b_r, tl.load(p_state + M * D, mask=m_state, other=0.0), DTYPE)
    b_o, _ = add_reads(
        b_o,
        b_r,
        b_r,
        p_written + M,
        2 * M,
        o_m,
        m_m,
        p_value,
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
        False,
    )
    store_vector(p_output, b_o, o_token, o_d, m_t[:, None] & m_d, D)
