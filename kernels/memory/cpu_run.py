"""Running the compiled kernels of the CPU implementation: building them, handing tensors over, sharing out rows.

Numba is imported, and anything compiled, only when the first call runs.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import math
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

Kernel = Callable[..., None]
Work = Callable[[int, int], None]

# What the chunks of eight rows may take in the backward pass before they are recomputed in segments: a thread's share
# of the last cache.
_CHUNKS_BYTES = 4 << 20
# Below this many multiplications and additions another thread costs more than it saves.
_LEAST_WORK_PER_THREAD = 200_000
# Inputs and output come first among a kernel's tensors; with the states before and after, these have strides.
_NUM_TOKEN_TENSORS, _NUM_STRIDED = 7, 11
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
    """Compute a sequence's output and final states into the tensors given; these may be the initial ones."""
    kernel = _kernel(KernelName.FORWARD, output.dtype)
    from trellis_ts.kernels.memory import cpu_layout

    num_tokens, num_heads, num_slots, dim = sizes = _sizes(tokens)
    inputs, strides = _strided([*tokens, output, *states])
    _run_sequences(
        kernel,
        sizes=(*sizes, *activations, True, 1, False),
        tensors=(*inputs, *final_states),
        strides=strides,
        epsilon=epsilon,
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
        sizes=(*sizes, *activations, second_order, segment, state_gradients[0].numel() > 0),
        tensors=(*inputs, *token_gradients, *state_gradients),
        strides=strides,
        epsilon=epsilon,
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
    (epsilon_bits,) = struct.unpack("q", struct.pack("d", problem.options.write_epsilon))
    numbers = (num_slots, dim, *activations, epsilon_bits)
    pack = struct.Struct(f"{NUM_ENTRIES}q").pack
    work_per_row = 14 * num_slots * dim
    is_small = num_rows * work_per_row < 2 * _LEAST_WORK_PER_THREAD
    free: list[tuple[int, Any]] = []  # scratch, address first

    def work(addresses: tuple[int, ...], first: int, last: int) -> None:
        if free:
            scratch = free.pop()
        else:
            memory = ctypes.create_string_buffer(NUM_FIELDS * num_slots * problem.dtype.itemsize)
            scratch = ctypes.addressof(memory), memory
        kernel(pack(*numbers, scratch[0], first, last, *addresses))
        free.append(scratch)

    def run(tensors: Sequence[Tensor]) -> None:
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if is_small:
            work(addresses, 0, num_rows)
            return
        worker = nullcontext(functools.partial(work, addresses))
        _over_rows(lambda: worker, num_rows=num_rows, work_per_row=work_per_row, rows_at_once=1)

    return run


_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class KernelName(Enum):
    """What is compiled by itself, and how long that takes."""

    FORWARD = "ten seconds"
    BACKWARD = "fifteen seconds"
    STEP = "some seconds"


_kernels: dict[tuple[KernelName, torch.dtype], Kernel] = {}
_building = threading.Lock()


def precompile(dtype: torch.dtype = torch.float32, *, backward: bool = True) -> None:
    """Compile ahead what ``implementation="cpu"`` needs for sequences, which the first call does otherwise.

    That takes a quarter of a minute, once per machine, or as long as finding it in Numba's cache; nothing is done where
    Numba is not installed.

    Args:
        dtype: of the inputs; bfloat16 and float16 are computed in float32.
        backward: whether gradients will be wanted; without them it takes half as long.
    """
    if HAS_NUMBA:
        _kernel(KernelName.FORWARD, STATE_DTYPES[dtype])
        if backward:
            _kernel(KernelName.BACKWARD, STATE_DTYPES[dtype])


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


def _strided(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Return tensors whose tokens' last axis is contiguous, and strides over the first three axes, or all of four."""
    ready = [
        tensor.contiguous() if index < _NUM_TOKEN_TENSORS and tensor.ndim == 4 and tensor.stride(3) != 1 else tensor
        for index, tensor in enumerate(tensors)
    ]
    return ready, [(*tensor.stride(), 0)[:4] for tensor in ready]


def _run_sequences(
    kernel: Kernel,
    *,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor],
    strides: list[tuple[int, ...]],
    epsilon: float,
    num_rows: int,
    work_per_row: int,
    scratch_size: int,
) -> None:
    dtype = tensors[0].dtype
    from trellis_ts.kernels.memory.cpu_layout import NUM_PLACES

    integers = np.array(sizes, dtype=np.int64)
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    table = np.zeros((_NUM_STRIDED, 4), dtype=np.int64)
    table[: len(strides)] = strides

    @contextmanager
    def worker() -> Iterator[Work]:
        places = np.empty(NUM_PLACES, dtype=np.int64)
        with _scratch(scratch_size, dtype) as scratch:
            yield lambda first, last: kernel(integers, addresses, table, places, epsilon, scratch, first, last)

    _over_rows(worker, num_rows=num_rows, work_per_row=work_per_row, rows_at_once=_LANES)


def _over_rows(
    worker: Callable[[], AbstractContextManager[Work]], *, num_rows: int, work_per_row: int, rows_at_once: int
) -> None:
    """Work on all rows, in blocks that as many threads as PyTorch would use take in turn, each with its own worker.

    A row is worked on by one thread from beginning to end, independent of those beside it, so the numbers do not
    depend on how many threads there are.
    """
    num_groups = -(-num_rows // rows_at_once)
    num_threads = max(1, min(torch.get_num_threads(), num_groups, num_rows * work_per_row // _LEAST_WORK_PER_THREAD))
    if num_threads == 1:
        with worker() as work:
            work(0, num_rows)
        return
    num_blocks = min(num_groups, num_threads * _BLOCKS_PER_THREAD)
    bounds = [min(num_rows, num_groups * i // num_blocks * rows_at_once) for i in range(num_blocks + 1)]
    blocks = deque(itertools.pairwise(bounds))

    def take_blocks() -> None:
        with worker() as work:
            while True:
                try:
                    first, last = blocks.popleft()
                except IndexError:
                    return
                work(first, last)

    _together(take_blocks, num_threads)


def _together(work: Callable[[], None], num_threads: int) -> None:
    """Run the same function in several threads at once: in PyTorch's own where they can be had.

    After each of its operations PyTorch's threads stay awake for a while, waiting for the next; others beside them
    would have to share the cores with them. In a fork they do not exist.
    """
    team = _openmp_team()
    if team is None or os.getpid() != _PROCESS:
        others = [_pool(os.getpid(), num_threads - 1).submit(work) for _ in range(num_threads - 1)]
        work()
        for other in others:
            other.result()
        return
    errors: list[BaseException] = []

    def member(_: object) -> None:
        try:
            work()
        except BaseException as error:  # it cannot pass through OpenMP
            errors.append(error)

    team(_Member(member), None, num_threads, 0)
    if errors:
        raise errors[0]


_PROCESS = os.getpid()
_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp_team() -> Callable[..., None] | None:
    """Return what runs a function in all threads of the OpenMP that PyTorch has loaded, or None if it is not GNU's."""
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        return None
    team: Callable[..., None] = ctypes.CDLL(str(library)).GOMP_parallel
    team.argtypes = [_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]  # type: ignore[attr-defined]
    team.restype = None  # type: ignore[attr-defined]
    return team


@lru_cache(maxsize=1)
def _pool(process: int, num_workers: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked one starts without those of its parent."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="trellis-memory")


_free_scratch: list[Any] = []


@contextmanager
def _scratch(count: int, dtype: torch.dtype) -> Iterator[Any]:
    """Lend uninitialised numbers from a multiple of 64 bytes on, so that no vector straddles two cache lines.

    They are kept for the next call, because fresh memory costs a page fault every 4 KiB.
    """
    num_bytes = count * dtype.itemsize + 64
    memory = _free_scratch.pop() if _free_scratch else np.empty(0, dtype=np.uint8)
    if len(memory) < num_bytes:
        memory = np.empty(num_bytes, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    yield memory[start : start + num_bytes - 64].view(_NUMPY_DTYPES[dtype])
    if len(memory) <= _MOST_KEPT_BYTES:
        _free_scratch.append(memory)
