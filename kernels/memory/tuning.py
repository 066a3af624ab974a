"""How the GPU kernels are launched: plain data, looked up by shape, so that a shape always takes the same path.

Chosen from register counts (benchmarks/triton_registers.py) and arithmetic, not measured on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

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
    16384: Exact(rows=1, num_warps=16),
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


class Chunk(NamedTuple):
    """Warps per program of the kernels of the chunkwise form."""

    states: int
    output: int
    reads_backward: int
    states_backward: int
    writes_backward: int


# By the widest of slots and head width, padded, and the chunk length.
CHUNK = {
    (16, 16): Chunk(1, 1, 1, 1, 1),
    (16, 32): Chunk(1, 1, 2, 1, 2),
    (16, 64): Chunk(2, 4, 4, 2, 4),
    (16, 128): Chunk(4, 8, 8, 4, 8),
    (32, 16): Chunk(1, 1, 2, 1, 2),
    (32, 32): Chunk(2, 2, 2, 2, 2),
    (32, 64): Chunk(4, 4, 4, 4, 4),
    (32, 128): Chunk(4, 8, 8, 4, 8),
    (64, 16): Chunk(4, 4, 4, 4, 4),
    (64, 32): Chunk(4, 4, 4, 4, 4),
    (64, 64): Chunk(4, 4, 8, 4, 8),
    (64, 128): Chunk(4, 8, 8, 8, 8),
    (128, 16): Chunk(4, 4, 8, 4, 8),
    (128, 32): Chunk(4, 8, 8, 8, 8),
    (128, 64): Chunk(8, 8, 16, 8, 16),
    (128, 128): Chunk(8, 16, 16, 16, 16),
}

STATE_SLOTS = 32
"""Slots per program in the kernels that go through the chunks in order, where slots are independent."""


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
