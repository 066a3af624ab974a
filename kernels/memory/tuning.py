"""How the GPU kernels are launched: plain data, looked up by shape, so that a shape always takes the same path.

Chosen from register counts (benchmarks/triton_registers.py) and arithmetic, not measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SMALLEST, LARGEST = 8, 128
"""Slots and head widths the kernels take."""

CHUNK_LENGTHS = (16, 32, 64, 128)
"""Those of the chunkwise form; 1 is the exact recurrence."""


class Exact(NamedTuple):
    """One launch of the exact recurrence."""

    rows: int
    """Rows (batch times heads) per program."""
    num_warps: int
    replay: int = 1
    """Backward only: tokens from one kept state to the next."""


# By slots times head width, each padded to a power of two.
EXACT_FORWARD = {
    64: Exact(rows=8, num_warps=1),
    128: Exact(rows=4, num_warps=1),
    256: Exact(rows=2, num_warps=1),
    512: Exact(rows=1, num_warps=1),
    1024: Exact(rows=1, num_warps=1),
    2048: Exact(rows=1, num_warps=2),
    4096: Exact(rows=1, num_warps=4),
    8192: Exact(rows=1, num_warps=8),
    16384: Exact(rows=1, num_warps=8),
}
EXACT_BACKWARD = {
    64: Exact(rows=4, num_warps=1, replay=4),
    128: Exact(rows=2, num_warps=1, replay=4),
    256: Exact(rows=1, num_warps=1, replay=4),
    512: Exact(rows=1, num_warps=1, replay=4),
    1024: Exact(rows=1, num_warps=2, replay=4),
    2048: Exact(rows=1, num_warps=4, replay=4),
    4096: Exact(rows=1, num_warps=8, replay=4),
    8192: Exact(rows=1, num_warps=16, replay=4),
    16384: Exact(rows=1, num_warps=16, replay=1),
}


class Tiled(NamedTuple):
    """One launch of a kernel of the chunkwise form."""

    tile: int
    """Tokens worked on at once; chunks that are shorter are one tile."""
    num_warps: int


class Chunk(NamedTuple):
    """The launches of the chunkwise form."""

    states: Tiled
    reads: Tiled
    codes_backward: Tiled
    queries_backward: Tiled
    reads_backward: Tiled
    states_backward: Tiled
    writes_backward: Tiled


def _alike(most: Tiled, writes_backward: Tiled) -> Chunk:
    return Chunk(most, most, most, most, most, most, writes_backward)


# By the wider of slots and head width, padded, and whether tokens are bfloat16: others take twice the bytes and three
# times the products.
_CHUNK = {
    (16, True): _alike(Tiled(32, 2), Tiled(32, 2)),
    (32, True): Chunk(
        states=Tiled(32, 2),
        reads=Tiled(32, 2),
        codes_backward=Tiled(32, 4),
        queries_backward=Tiled(32, 2),
        reads_backward=Tiled(32, 2),
        states_backward=Tiled(32, 2),
        writes_backward=Tiled(32, 4),
    ),
    (64, True): _alike(Tiled(32, 4), Tiled(32, 8)),
    (128, True): _alike(Tiled(32, 8), Tiled(16, 8)),
    (16, False): _alike(Tiled(16, 1), Tiled(16, 1)),
    (32, False): _alike(Tiled(16, 2), Tiled(16, 4)),
    (64, False): Chunk(
        states=Tiled(16, 4),
        reads=Tiled(16, 4),
        codes_backward=Tiled(16, 8),
        queries_backward=Tiled(16, 4),
        reads_backward=Tiled(16, 4),
        states_backward=Tiled(16, 4),
        writes_backward=Tiled(16, 8),
    ),
    (128, False): _alike(Tiled(16, 8), Tiled(16, 8)),
}
_STATE_SLOTS = 32


def chunk(widest: int, dtype: torch.dtype) -> Chunk:
    """Return the launches for tokens in ``dtype``, ``widest`` being the larger of slots and head width."""
    return _CHUNK[padded(widest, 16), dtype == torch.bfloat16]


def spills(widest: int, dtype: torch.dtype, write_activation: str) -> bool:
    """Whether the chunkwise form would spill: a LayerNorm needs all slots, and float32 three products for one."""
    return widest > 32 and dtype == torch.float32 and write_activation == "ln_silu"


def state_slots(padded_slots: int, write_activation: str) -> int:
    """Return the slots of one program in the kernels that go through the chunks in order.

    Slots are independent there, but for the LayerNorm of ``ln_silu``, which needs them all in one program.
    """
    return padded_slots if write_activation == "ln_silu" else min(padded_slots, _STATE_SLOTS)


def padded(size: int, smallest: int = SMALLEST) -> int:
    """Return the power of two a block needs to hold ``size`` entries."""
    return max(smallest, 1 << (size - 1).bit_length())


def segment_length(num_tokens: int, replay: int) -> int:
    """Return the tokens from one checkpoint to the next.

    Checkpoints cost ``T / segment`` states and scratch memory ``segment / replay``, so their sum is least at the
    root of ``T replay``.
    """
    if num_tokens <= 16:
        return num_tokens
    return max(16, 1 << round((num_tokens * replay - 1).bit_length() / 2))
