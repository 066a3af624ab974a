"""Running the compiled kernels of the CPU implementation: building them, handing tensors over, sharing out rows.

Numba is imported, and anything compiled, only when the first call runs.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trellis_ts.kernels.memory.types import STATE_DTYPES, Problem

logger = logging.getLogger(__name__)

# Looked for, not imported: that takes a while, and is left to the first use.
HAS_NUMBA = find_spec("numba") is not None

Kernel = Callable[[int], None]

# What the chunks of eight rows may take in the backward pass before they are recomputed in segments: a thread's share
# of the last cache.
_CHUNKS_BYTES = 4 << 20
# Below this many multiplications and additions another thread costs more than it saves.
_LEAST_WORK_PER_THREAD = 200_000
# Inputs and output come first among a kernel's tensors.
_NUM_TOKEN_TENSORS = 7
# Blocks of rows per thread: a thread that is held up leaves its blocks to the others.
_BLOCKS_PER_THREAD = 4
# Scratch of a thread that may be kept for the next call.
_MOST_KEPT_BYTES = 16 << 20
# Rows side by side in the vectors of the kernels over sequences.
_LANES = 8


def run_forward(
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    output: Tensor,
    final_states: Sequence[Tensor],
    activations: tuple[int, int],
    epsilon: float,
) -> None:
    """Compute a sequence's output and, if there is room for them, final states into the tensors given.

    The final states may be the initial ones; empty, they are not computed.
    """
    kernel = _kernel(KernelName.FORWARD, output.dtype)
    from trellis_ts.kernels.memory import cpu_layout

    num_tokens, num_heads, num_slots, dim = sizes = _sizes(tokens)
    inputs, strides = _strided([*tokens, output, *states])
    _run_sequences(
        kernel,
        choices=(*sizes, *activations, True, 1, final_states[0].numel() > 0, epsilon),
        tensors=(*inputs, *final_states),
        strides=strides,
        num_rows=len(output) * num_heads,
        work_per_row=14 * num_tokens * num_slots * dim,
        scratch_size=cpu_layout.forward_scratch_size(num_slots, dim),
    )


def run_backward(
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    output_gradient: Tensor,
    final_gradients: Sequence[Tensor],
    token_gradients: Sequence[Tensor],
    state_gradients: Sequence[Tensor],
    activations: tuple[int, int],
    second_order: bool,
    epsilon: float,
) -> None:
    """Compute all gradients into the tensors given; those of the states only if these are not empty."""
    kernel = _kernel(KernelName.BACKWARD, output_gradient.dtype)
    from trellis_ts.kernels.memory import cpu_layout

    num_tokens, num_heads, num_slots, dim = sizes = _sizes(tokens)
    chunk_bytes = cpu_layout.chunk_size(num_slots, dim) * output_gradient.itemsize
    segment = segment_length(cpu_layout.num_chunks(num_tokens), chunk_bytes)
    inputs, strides = _strided([*tokens, output_gradient, *states, *final_gradients])
    _run_sequences(
        kernel,
        choices=(*sizes, *activations, second_order, segment, state_gradients[0].numel() > 0, epsilon),
        tensors=(*inputs, *token_gradients, *state_gradients),
        strides=strides,
        num_rows=len(output_gradient) * num_heads,
        work_per_row=56 * num_tokens * num_slots * dim,
        scratch_size=cpu_layout.backward_scratch_size(num_slots, dim, num_tokens, segment),
    )


def plan_step(problem: Problem, activations: tuple[int, int]) -> Callable[[Sequence[Tensor]], None]:
    """Return what computes one token of a problem, given contiguous inputs, states before, output and states after.

    A step of one row takes its kernel a few microseconds, so everything else is done here, once.
    """
    kernel = _kernel(KernelName.STEP, problem.dtype)
    from trellis_ts.kernels.memory.cpu_step import NUM_ENTRIES, NUM_FIELDS

    num_rows, num_slots, dim = problem.num_rows, problem.num_slots, problem.head_dim
    work_per_row = 14 * num_slots * dim
    most_threads = max(1, min(num_rows, num_rows * work_per_row // _LEAST_WORK_PER_THREAD))
    numbers = (num_slots, dim, *activations, _bits(problem.options.write_epsilon), num_rows)
    layout = struct.Struct(f"{NUM_ENTRIES}q")
    scratch_bytes = NUM_FIELDS * num_slots * problem.dtype.itemsize
    free: list[tuple[int, int, Any]] = []  # memory for a call: threads it is enough for, address, and itself

    def run(tensors: Sequence[Tensor]) -> None:
        num_threads = 1 if most_threads == 1 else min(most_threads, torch.get_num_threads())
        memory: tuple[int, int, Any] = free.pop() if free else (0, 0, None)
        if memory[0] < num_threads:
            buffer = ctypes.create_string_buffer(layout.size + num_threads * scratch_bytes)
            memory = num_threads, ctypes.addressof(buffer), buffer
        _, address, buffer = memory
        block = _block(num_rows, num_threads, 1)
        layout.pack_into(buffer, 0, *numbers, block, 0, 0, address + layout.size, *map(Tensor.data_ptr, tensors))
        _together(kernel, address, num_threads)
        free.append(memory)

    return run


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer, to be handed over among integers."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


class KernelName(Enum):
    """What is compiled by itself, and how long that takes."""

    FORWARD = "ten seconds"
    BACKWARD = "fifteen seconds"
    STEP = "some seconds"


_kernels: dict[tuple[KernelName, torch.dtype], Kernel] = {}
_building = threading.Lock()


def precompile(dtype: torch.dtype = torch.float32, *, backward: bool = True, step: bool = False) -> None:
    """Compile ahead what ``implementation="cpu"`` needs, which the first call does otherwise.

    For sequences that takes a quarter of a minute, for steps some seconds, once per machine, or as long as finding it
    in Numba's cache; nothing is done where Numba is not installed.

    Args:
        dtype: of the inputs; bfloat16 and float16 are computed in float32.
        backward: whether gradients will be wanted; without them sequences take half as long.
        step: compile ``trellis_memory_step`` instead, for slots and head dimensions that are multiples of eight; others
            step by way of a sequence of one token.
    """
    if not HAS_NUMBA:
        return
    names = [KernelName.STEP] if step else [KernelName.FORWARD, *([KernelName.BACKWARD] if backward else [])]
    for name in names:
        _kernel(name, STATE_DTYPES[dtype])


def _kernel(name: KernelName, dtype: torch.dtype) -> Kernel:
    """Return a kernel, compiling it first if Numba's cache does not have it."""
    found = _kernels.get((name, dtype))
    return _build(name, dtype) if found is None else found


def _build(name: KernelName, dtype: torch.dtype) -> Kernel:
    with _building, _notice(name.value):  # two threads would otherwise compile the same
        if (name, dtype) not in _kernels:
            from trellis_ts.kernels.memory import cpu_kernel, cpu_step

            build = {
                KernelName.FORWARD: cpu_kernel.build_forward,
                KernelName.BACKWARD: cpu_kernel.build_backward,
                KernelName.STEP: cpu_step.build,
            }[name]
            _kernels[name, dtype] = _with_or_without_cache(build, dtype)
    return _kernels[name, dtype]


@contextmanager
def _notice(how_long: str) -> Iterator[None]:
    notice = threading.Timer(2, logger.info, [f"compiling the CPU kernel; once per machine, {how_long}"])
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def _with_or_without_cache(build: Callable[..., Any], dtype: torch.dtype) -> Any:
    import numba

    scalar = {torch.float32: numba.float32, torch.float64: numba.float64}[dtype]
    try:
        return build(scalar)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        logger.info("Numba finds no folder for its cache, so every process compiles anew; set NUMBA_CACHE_DIR")
        return build(scalar, cache=False)


def _sizes(tokens: Sequence[Tensor]) -> tuple[int, int, int, int]:
    _, num_tokens, num_heads, num_slots = tokens[3].shape
    return num_tokens, num_heads, num_slots, tokens[0].shape[-1]


def segment_length(num_chunks: int, chunk_bytes: int) -> int:
    """Return how many chunks' states and writes are kept at once: all if they fit, else what keeps their number small.

    With segments of s chunks, n / s states at the segments' starts and s within one are held: least at the root of n.
    """
    return num_chunks if num_chunks * chunk_bytes <= _CHUNKS_BYTES else max(1, math.isqrt(num_chunks))


def _strided(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
    """Return tensors whose tokens' last axis is contiguous, and strides over the first three axes, or all of four."""
    ready = [
        tensor.contiguous() if index < _NUM_TOKEN_TENSORS and tensor.ndim == 4 and tensor.stride(3) != 1 else tensor
        for index, tensor in enumerate(tensors)
    ]
    strides: list[int] = []
    for tensor in ready:
        strides += (*tensor.stride(), 0)[:4]
    return ready, strides


def _run_sequences(
    kernel: Kernel,
    *,
    choices: tuple[int | float, ...],
    tensors: Sequence[Tensor],
    strides: list[int],
    num_rows: int,
    work_per_row: int,
    scratch_size: int,
) -> None:
    from trellis_ts.kernels.memory.cpu_layout import NUM_STRIDED, NUM_TENSORS, PLACES_BYTES, PROBLEM

    num_groups = -(-num_rows // _LANES)
    num_threads = max(1, min(torch.get_num_threads(), num_groups, num_rows * work_per_row // _LEAST_WORK_PER_THREAD))
    thread_bytes = _round_up(PLACES_BYTES + scratch_size * tensors[0].itemsize)
    problem_bytes = _round_up(PROBLEM.size)
    block = _block(num_groups, num_threads, _LANES)
    memory, start, address = lent = _lend(problem_bytes + num_threads * thread_bytes)
    PROBLEM.pack_into(
        memory,
        start,
        *choices,
        *(num_rows, block, 0, 0, address + problem_bytes, thread_bytes),
        *map(Tensor.data_ptr, tensors),
        *[0] * (NUM_TENSORS - len(tensors)),
        *strides,
        *[0] * (4 * NUM_STRIDED - len(strides)),
    )
    _together(kernel, address, num_threads)
    _take_back(lent)


def _round_up(num_bytes: int) -> int:
    """Return the next multiple of a cache line."""
    return -(-num_bytes // 64) * 64


def _block(num_groups: int, num_threads: int, rows_per_group: int) -> int:
    """Return how many rows a thread takes at a time: all if it is alone, or few, so that others can take over."""
    return -(-num_groups // (1 if num_threads == 1 else num_threads * _BLOCKS_PER_THREAD)) * rows_per_group


def _together(kernel: Kernel, problem: int, num_threads: int) -> None:
    """Run a kernel in several threads on one problem: in PyTorch's own where they can be had.

    Each takes rows until none are left. A row is worked on by one thread from beginning to end, independent of those
    beside it, so the numbers do not depend on how many threads there are. After each of its operations PyTorch's
    threads stay awake for a while, waiting for the next; others beside them would have to share the cores with them. In
    a fork they do not exist.
    """
    if num_threads == 1:
        kernel(problem)
        return
    team = _openmp_team()
    if team is not None and os.getpid() == _PROCESS:
        team(kernel, problem, num_threads, 0)
        return
    others = [_pool(os.getpid(), num_threads - 1).submit(kernel, problem) for _ in range(num_threads - 1)]
    kernel(problem)
    for other in others:
        other.result()


_PROCESS = os.getpid()
_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp_team() -> Callable[..., None] | None:
    """Return what runs a function in all threads of the OpenMP that PyTorch has loaded, or None if it is not GNU's."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        return None
    team: Callable[..., None] = ctypes.CDLL(str(library)).GOMP_parallel
    team.argtypes = [_Entry, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]  # type: ignore[attr-defined]
    team.restype = None  # type: ignore[attr-defined]
    return team


@lru_cache(maxsize=1)
def _pool(process: int, num_workers: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked one starts without those of its parent."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="trellis-memory")


_Lent = tuple[Any, int, int]
_free: list[_Lent] = []


def _lend(num_bytes: int) -> _Lent:
    """Return memory for a call: an array, and from where on, as an index and as an address, it starts a cache line.

    It is kept for the next call, because fresh memory costs a page fault every 4 KiB.
    """
    if _free:
        lent = _free.pop()
        if len(lent[0]) - lent[1] >= num_bytes:
            return lent
    memory = np.empty(num_bytes + 64, dtype=np.uint8)
    address = memory.ctypes.data
    start = -address % 64
    return memory, start, address + start


def _take_back(lent: _Lent) -> None:
    if len(lent[0]) <= _MOST_KEPT_BYTES:
        _free.append(lent)


_LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """Return Linux's ``madvise``, or None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    advise: Callable[[int, int, int], int] = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[attr-defined]
    return advise


def in_large_pages(tensor: Tensor) -> Tensor:
    """Return a tensor just allocated, having asked for pages of 2 MiB where it lies: most of it is fresh memory.

    A result of some megabytes costs a thousand page faults otherwise. The advice goes to whole pages, so to the
    neighbours at both ends as well; whether the system takes it is its own affair.
    """
    if tensor.nbytes >= _LARGE_PAGE and (advise := _advise()) is not None:
        start = tensor.data_ptr() // _LARGE_PAGE * _LARGE_PAGE
        advise(start, tensor.data_ptr() + tensor.nbytes - start, _MADV_HUGEPAGE)
    return tensor
