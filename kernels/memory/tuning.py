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


def longest_chunk(dtype: torch.dtype, widest: int) -> int:
    """Return the longest chunk whose blocks fit the shared memory, ``widest`` being the larger of slots and head width.

    Operands other than bfloat16 take four bytes an entry there.
    """
    if dtype == torch.bfloat16:
        return 128
    return 64 if widest <= 64 else 32


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


class Chunk(NamedTuple):
    """Warps per program of the kernels of the chunkwise form; ``reads`` are those of keys and those of values."""

    states: int
    reads: int
    reads_backward: int
    states_backward: int
    writes_backward: int


# By the longest side of any block: the widest of slots, head width and chunk length, padded.
CHUNK = {
    16: Chunk(states=1, reads=1, reads_backward=2, states_backward=1, writes_backward=2),
    32: Chunk(states=2, reads=2, reads_backward=4, states_backward=2, writes_backward=4),
    64: Chunk(states=4, reads=4, reads_backward=8, states_backward=4, writes_backward=8),
    128: Chunk(states=8, reads=16, reads_backward=16, states_backward=8, writes_backward=16),
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
