"""What the GPU kernels of the chunkwise form share: products of matrices, tiles of tokens, products of gates.

A chunk of ``BT`` tokens is worked on in tiles of ``BC`` tokens, ``TILES`` of them, so that what a program holds does
not grow with the chunk. Tiles are counted through a whole sequence. Names and layouts are otherwise those of
triton_common.py. An *operand* is a number as products of matrices take it: bfloat16 for bfloat16 tokens, else float32.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def as_operand(b_x, DTYPE: tl.constexpr):
    """Round to what products of matrices take where tokens are of ``DTYPE``."""
    return b_x.to(tl.bfloat16) if DTYPE.is_bf16() else b_x.to(tl.float32)


@triton.jit
def matmul(b_x, b_y, DTYPE: tl.constexpr):
    """A matrix product added up in float32, as exact as inputs of ``DTYPE`` deserve.

    float16 goes through TensorFloat-32, which has its ten bits: states and gradients outgrow float16's range. float32
    is the sum of three such products of what TensorFloat-32 keeps and what it drops, good to 21 bits; plain float32
    has no tensor cores.
    """
    b_x = as_operand(b_x, DTYPE)
    b_y = as_operand(b_y, DTYPE)
    if DTYPE.is_bf16():
        if INTERPRETED:  # its dot takes the bits of a bfloat16 for an integer
            b_x = b_x.to(tl.float32)
            b_y = b_y.to(tl.float32)
        return tl.dot(b_x, b_y)
    elif DTYPE.is_fp16():
        return tl.dot(b_x, b_y, input_precision="tf32")
    else:
        return tl.dot(b_x, b_y, input_precision="tf32x3")


@triton.jit
def tokens_of(i_row, i_tile, T, H, BC: tl.constexpr):
    """Times of the tokens of a tile, which of them there are, and where they lie in ``[B, T, H]``."""
    o_time = i_tile * BC + tl.arange(0, BC)
    return o_time, o_time < T, (i_row // H * T + o_time) * H + i_row % H


@triton.jit
def load_tile(p, o_token, STRIDE: tl.constexpr, o, m):
    """One row of ``STRIDE`` numbers for every token of a tile, as they are stored."""
    return tl.load(p + o_token[:, None] * STRIDE + o[None, :], mask=m, other=0.0)


@triton.jit
def load_columns(p, o_token, STRIDE: tl.constexpr, o, m):
    """The same with a column for every token."""
    return tl.load(p + o_token[None, :] * STRIDE + o[:, None], mask=m, other=0.0)


@triton.jit
def store_columns(p, b, o_token, STRIDE: tl.constexpr, o, m):
    """Write every column of a block to where its token has its ``STRIDE`` numbers."""
    tl.store(p + o_token[None, :] * STRIDE + o[:, None], b.to(p.dtype.element_ty), mask=m)


@triton.jit
def load_scalars(p, o_token, m_t):
    """One number for every token of a tile, in float32."""
    return tl.load(p + o_token, mask=m_t, other=0.0).to(tl.float32)


@triton.jit
def load_decays(p_cumulated, p_shut, o_token, m_t):
    """The logarithm of the product of all gates of the chunk up to each token, and how many of them were shut.

    Gates are multiplied by subtracting these; a shut gate, of logarithm minus infinity, would give a nan. It is left
    out and counted instead, and a product across it is zero.
    """
    b_shut = tl.load(p_shut + o_token, mask=m_t, other=0)
    return tl.load(p_cumulated + o_token, mask=m_t, other=0.0), b_shut


@triton.jit
def decay_since_start(b_cum, b_shut):
    """The product of all gates of the chunk up to each token."""
    return tl.where(b_shut == 0, tl.exp(b_cum), 0.0)


@triton.jit
def decay_between(b_cum_late, b_shut_late, o_late, b_cum_early, b_shut_early, o_early, T):
    """The product of the gates after an early token up to and including a late one; zero the other way round."""
    m_past = (o_late >= o_early) & (o_late < T) & (b_shut_late == b_shut_early)
    # Where early and late change places the exponent is positive and may overflow.
    return tl.exp(tl.where(m_past, b_cum_late - b_cum_early, float("-inf")))


@triton.jit
def decay_to_end(p_cumulated, p_shut, b_cum, b_shut, i_row, i_chunk, T, H, BT: tl.constexpr):
    """The product of all gates of a chunk, and for every token of a tile that of the gates after it."""
    o_last = (i_row // H * T + min(i_chunk * BT + BT, T) - 1) * H + i_row % H
    b_total = tl.load(p_cumulated + o_last)
    num_shut = tl.load(p_shut + o_last)
    b_all = tl.where(num_shut == 0, tl.exp(b_total), 0.0)
    return b_all, tl.where(b_shut == num_shut, tl.exp(b_total - b_cum), 0.0)


@triton.jit(do_not_specialize=["T", "H"])
def chunk_decays_kernel(p_log_forget, p_cumulated, p_shut, T, H, BT: tl.constexpr):
    """What ``load_decays`` reads, of one chunk: ``[B, T, H]`` in float32 and int32."""
    num_chunks = tl.cdiv(T, BT)
    i_program = tl.program_id(0).to(tl.int64)
    _, m_t, o_token = tokens_of(i_program // num_chunks, i_program % num_chunks, T, H, BT)
    b_log = load_scalars(p_log_forget, o_token, m_t)
    m_shut = is_shut(b_log)
    tl.store(p_cumulated + o_token, tl.cumsum(tl.where(m_shut, 0.0, b_log), axis=0), mask=m_t)
    tl.store(p_shut + o_token, tl.cumsum(m_shut.to(tl.int32), axis=0), mask=m_t)


@triton.jit
def is_shut(b_log):
    """Whether a gate is below float32's smallest number, so that any product across it is zero."""
    return b_log < -87.0


@triton.jit
def add_reads(
    b_sum,
    b_x,
    b_other,
    p_a,
    STRIDE_A: tl.constexpr,
    o_a,
    m_a,
    p_b,
    STRIDE_B: tl.constexpr,
    o_b,
    m_b,
    p_step_size,
    p_cumulated,
    p_shut,
    i_row,
    i_tile,
    T,
    H,
    BC: tl.constexpr,
    TILES: tl.constexpr,
    DTYPE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """What the tokens of a tile see of the chunk's writes: ``sum - ((x a^T) omega g) b``, tile after tile of a and b.

    With ``PAIRS`` also the sums over b of ``-(x a^T) omega g (other b^T)``, which pass every gate between; else zeros.
    """
    o_late, m_late, o_token = tokens_of(i_row, i_tile, T, H, BC)
    b_cum_late, b_shut_late = load_decays(p_cumulated, p_shut, o_token, m_late)
    b_pairs = tl.zeros((BC,), dtype=tl.float32)
    for i in range(i_tile // TILES * TILES, i_tile + 1):
        o_early, m_early, o_token = tokens_of(i_row, i, T, H, BC)
        b_cum, b_shut = load_decays(p_cumulated, p_shut, o_token, m_early)
        b_g = load_scalars(p_step_size, o_token, m_early)
        b_omega = decay_between(
            b_cum_late[:, None],
            b_shut_late[:, None],
            o_late[:, None],
            b_cum[None, :],
            b_shut[None, :],
            o_early[None, :],
            T,
        )
        b_a = load_tile(p_a, o_token, STRIDE_A, o_a, m_early[:, None] & m_a)
        b_b = load_tile(p_b, o_token, STRIDE_B, o_b, m_early[:, None] & m_b)
        b_p = matmul(b_x, tl.trans(b_a), DTYPE) * b_omega * b_g[None, :]
        if PAIRS:
            b_pairs -= tl.sum(matmul(b_other, tl.trans(b_b), DTYPE) * b_p, axis=1)
        b_sum -= matmul(b_p, b_b, DTYPE)
    return b_sum, b_pairs
