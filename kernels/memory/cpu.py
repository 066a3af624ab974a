"""The exact recurrence compiled for CPUs: operators of PyTorch around the kernels in ``cpu_kernel.py``.

Numba is imported, and anything compiled, only when the first call runs.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.errors import BackendError
from trellis_ts.kernels.memory.types import (
    MemoryState,
    Options,
    Problem,
    ReadActivation,
    Tokens,
    WriteActivation,
)

logger = logging.getLogger(__name__)

Kernel = Callable[..., None]

# Looked for, not imported: that takes a while, and is left to the first use.
_HAS_NUMBA = importlib.util.find_spec("numba") is not None

_WRITE_ACTIVATIONS = get_args(WriteActivation)
_READ_ACTIVATIONS = get_args(ReadActivation)

# What the states of eight rows may take in the backward pass before they are recomputed in segments: a thread's share
# of the last cache.
_STATES_BYTES = 4 << 20
# Below this many multiplications and additions another thread costs more than it saves.
_LEAST_WORK_PER_THREAD = 200_000
# Inputs and output come first among a kernel's tensors; with the states before and after, these have strides.
_NUM_TOKEN_TENSORS, _NUM_STRIDED = 7, 11
# Blocks of rows per thread: a thread that is held up leaves its blocks to the others.
_BLOCKS_PER_THREAD = 4


def why_not_cpu(problem: Problem | None) -> str | None:
    """Say why the compiled recurrence cannot run a problem, or this machine, or None if it can."""
    if not _HAS_NUMBA:
        return "Numba is not installed"
    if problem is None:
        return None
    if problem.device.type != "cpu":
        return f"the tensors are on {problem.device.type}"
    if problem.options.chunk_length > 1:
        return "it computes the exact recurrence, chunk_length=1, only"
    return None


def cpu(
    tokens: Tokens, initial_state: MemoryState, options: Options
) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
    """Compute ``trellis_memory`` for ``chunk_length=1`` on a CPU, in the dtype of the state."""
    dtype = initial_state.key_memory.dtype
    # An operator's way through PyTorch costs more than a single token; only gradients and graphs need it.
    plain = (
        type(tokens.query) is Tensor
        and not torch.compiler.is_compiling()
        and not needs_gradient(*tokens, *initial_state)
    )
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
        _forward_alone if plain else torch.ops.trellis.memory_cpu_forward
    )
    output, *state = forward(
        *(tensor.to(dtype) for tensor in tokens),
        *initial_state,
        *_activation_numbers(options),
        options.second_order,
        options.write_epsilon,
    )
    return output.to(tokens.query.dtype), MemoryState(*state)


def cpu_in_place(tokens: Tokens, state: MemoryState, options: Options) -> Float[Tensor, "batch time head dim"]:
    """Compute ``cpu`` and leave the final state in the tensors of the initial one; without gradients."""
    if not all(memory.is_contiguous() for memory in state):
        output, final_state = cpu(tokens, state, options)
        for memory, final in zip(state, final_state, strict=True):
            memory.copy_(final)
        return output
    ready = [tensor.to(state.key_memory.dtype) for tensor in tokens]
    output = torch.empty_like(ready[0], memory_format=torch.contiguous_format)
    _run_forward(ready, state, output, state, _activation_numbers(options), options.write_epsilon)
    return output.to(tokens.query.dtype)


def _activation_numbers(options: Options) -> tuple[int, int]:
    return _WRITE_ACTIVATIONS.index(options.write_activation), _READ_ACTIVATIONS.index(options.read_activation)


def needs_gradient(*tensors: Tensor) -> bool:
    """Say whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _forward_alone(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    write_activation: int,
    read_activation: int,
    second_order: bool,
    write_epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    final_states = _empty_states(key_memory)
    _run_forward(
        (query, key, value, target, log_forget, step_size),
        (key_memory, value_memory),
        output,
        final_states,
        (write_activation, read_activation),
        write_epsilon,
    )
    return output, *final_states


_forward = torch.library.custom_op("trellis::memory_cpu_forward", _forward_alone, mutates_args=(), device_types="cpu")


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query, memory_format=torch.contiguous_format), *_empty_states(key_memory)


@torch.library.custom_op("trellis::memory_cpu_backward", mutates_args=(), device_types="cpu")
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    output_gradient: Tensor,
    key_memory_gradient: Tensor,
    value_memory_gradient: Tensor,
    write_activation: int,
    read_activation: int,
    second_order: bool,
    write_epsilon: float,
    with_state: bool,
) -> list[Tensor]:
    tokens = (query, key, value, target, log_forget, step_size)
    token_gradients, state_gradients = _empty_gradients(tokens, key_memory, with_state)
    _run_backward(
        tokens,
        (key_memory, value_memory),
        output_gradient,
        (key_memory_gradient, value_memory_gradient),
        token_gradients,
        state_gradients,
        (write_activation, read_activation),
        second_order,
        write_epsilon,
    )
    return [*token_gradients, *state_gradients]


@_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    *rest: Any,
) -> list[Tensor]:
    tokens = (query, key, value, target, log_forget, step_size)
    token_gradients, state_gradients = _empty_gradients(tokens, key_memory, rest[-1])
    return [*token_gradients, *state_gradients]


def _empty_states(memory: Tensor) -> tuple[Tensor, Tensor]:
    """Two, because an operator's results must not share memory."""
    return (
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
    )


def _empty_gradients(
    tokens: Sequence[Tensor], memory: Tensor, with_state: bool
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    of_tokens = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tokens]
    return of_tokens, _empty_states(memory) if with_state else (memory.new_empty(0), memory.new_empty(0))


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    likes = (inputs[0], inputs[6], inputs[7])
    given = [
        like.new_zeros(()).expand(like.shape) if gradient is None else gradient
        for gradient, like in zip(gradients, likes, strict=True)
    ]
    with_state = any(ctx.needs_input_grad[6:8])
    results = torch.ops.trellis.memory_cpu_backward(*inputs, *given, *ctx.options, with_state)
    states = results[6:] if with_state else (None, None)
    return *results[:6], *states, *(None for _ in ctx.options)


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise BackendError(
        "implementation='cpu' has no derivative of its backward pass; use implementation='reference' where the "
        "gradient is to be differentiated again"
    )


_forward.register_autograd(_backward_of_forward, setup_context=_setup_forward)
_backward.register_autograd(_refuse_second_derivative)


def _run_forward(
    tokens: Sequence[Tensor],
    states: Sequence[Tensor],
    output: Tensor,
    final_states: Sequence[Tensor],
    activations: tuple[int, int],
    epsilon: float,
) -> None:
    kernel = _kernels(output.dtype)
    num_tokens, num_heads, num_slots, dim = sizes = _sizes(tokens)
    inputs, strides = _strided([*tokens, output, *states])
    _over_rows(
        kernel.forward,
        sizes=(*sizes, *activations, True, 1, False),
        tensors=(*inputs, *final_states),
        strides=strides,
        epsilon=epsilon,
        num_rows=len(output) * num_heads,
        work_per_row=14 * num_tokens * num_slots * dim,
        scratch_size=kernel.forward_scratch_size(num_slots, dim),
        dtype=output.dtype,
    )


def _run_backward(
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
    kernel = _kernels(output_gradient.dtype)
    num_tokens, num_heads, num_slots, dim = sizes = _sizes(tokens)
    segment = _segment_length(
        kernel.num_chunks(num_tokens), kernel.states_size(num_slots, dim) * output_gradient.itemsize
    )
    inputs, strides = _strided([*tokens, output_gradient, *states, *final_gradients])
    with_states = state_gradients[0].numel() > 0
    _over_rows(
        kernel.backward,
        sizes=(*sizes, *activations, second_order, segment, with_states),
        tensors=(*inputs, *token_gradients, *state_gradients),
        strides=strides,
        epsilon=epsilon,
        num_rows=len(output_gradient) * num_heads,
        work_per_row=56 * num_tokens * num_slots * dim,
        scratch_size=kernel.backward_scratch_size(num_slots, dim, num_tokens, segment),
        dtype=output_gradient.dtype,
    )


class _Kernels(NamedTuple):
    forward: Kernel
    backward: Kernel
    forward_scratch_size: Callable[[int, int], int]
    backward_scratch_size: Callable[[int, int, int, int], int]
    states_size: Callable[[int, int], int]
    num_chunks: Callable[[int], int]
    num_places: int
    lanes: int


_building = threading.Lock()


@cache
def _built(dtype: torch.dtype) -> _Kernels:
    notice = threading.Timer(2, logger.info, ["compiling the CPU kernel; once per machine, about half a minute"])
    notice.daemon = True
    notice.start()
    try:
        import numba

        from trellis_ts.kernels.memory import cpu_kernel

        scalar = {torch.float32: numba.float32, torch.float64: numba.float64}[dtype]
        build: Callable[..., tuple[Kernel, Kernel]] = cpu_kernel.build
        forward, backward = _with_or_without_cache(build, scalar)
    finally:
        notice.cancel()
    return _Kernels(
        forward,
        backward,
        cpu_kernel.forward_scratch_size,
        cpu_kernel.backward_scratch_size,
        cpu_kernel.states_size,
        cpu_kernel.num_chunks,
        cpu_kernel.NUM_PLACES,
        cpu_kernel.WIDTH,
    )


def _with_or_without_cache(build: Callable[..., tuple[Kernel, Kernel]], scalar: Any) -> tuple[Kernel, Kernel]:
    try:
        return build(scalar)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        logger.info("Numba finds no folder for its cache, so every process compiles anew; set NUMBA_CACHE_DIR")
        return build(scalar, cache=False)


def _kernels(dtype: torch.dtype) -> _Kernels:
    with _building:  # two threads would otherwise compile the same
        return _built(dtype)


def _sizes(tokens: Sequence[Tensor]) -> tuple[int, int, int, int]:
    _, num_tokens, num_heads, num_slots = tokens[3].shape
    return num_tokens, num_heads, num_slots, tokens[0].shape[-1]


def _segment_length(num_chunks: int, states_bytes: int) -> int:
    """Return how many chunks' first states are kept at once: all if they fit, else what keeps their number small.

    With segments of s chunks, n / s states at the segments' starts and s within one are held: least at the root of n.
    """
    return num_chunks if num_chunks * states_bytes <= _STATES_BYTES else max(1, math.isqrt(num_chunks))


def _strided(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Return tensors whose tokens' last axis is contiguous, and strides over the first three axes, or all of four."""
    ready = [
        tensor.contiguous() if index < _NUM_TOKEN_TENSORS and tensor.ndim == 4 and tensor.stride(3) != 1 else tensor
        for index, tensor in enumerate(tensors)
    ]
    return ready, [(*tensor.stride(), 0)[:4] for tensor in ready]


def _over_rows(
    kernel: Kernel,
    *,
    sizes: tuple[int, ...],
    tensors: Sequence[Tensor],
    strides: list[tuple[int, ...]],
    epsilon: float,
    num_rows: int,
    work_per_row: int,
    scratch_size: int,
    dtype: torch.dtype,
) -> None:
    """Run a kernel over all rows, in blocks that as many threads as PyTorch would use take in turn.

    Rows are worked on in the lanes of vectors, independent of each other, by one thread from beginning to end, so the
    numbers do not depend on how many threads there are. Plain threads, because the kernels run without Python's lock:
    unlike Numba's own they may be used from several threads at once and after a fork.
    """
    if num_rows == 0:
        return
    kernels = _kernels(dtype)
    num_groups = -(-num_rows // kernels.lanes)
    num_threads = max(1, min(torch.get_num_threads(), num_groups, num_rows * work_per_row // _LEAST_WORK_PER_THREAD))
    num_blocks = 1 if num_threads == 1 else min(num_groups, num_threads * _BLOCKS_PER_THREAD)
    bounds = [min(num_rows, num_groups * i // num_blocks * kernels.lanes) for i in range(num_blocks + 1)]
    blocks = deque(itertools.pairwise(bounds))
    integers = np.array(sizes, dtype=np.int64)
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    table = np.zeros((_NUM_STRIDED, 4), dtype=np.int64)
    table[: len(strides)] = strides

    def work() -> None:
        scratch, places = _aligned_zeros(scratch_size, dtype), np.empty(kernels.num_places, dtype=np.int64)
        while True:
            try:
                first, last = blocks.popleft()
            except IndexError:
                return
            kernel(integers, addresses, table, places, epsilon, scratch, first, last)

    if num_threads == 1:
        work()
        return
    others = [_pool(os.getpid(), num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    work()
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(process: int, num_workers: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked one starts without those of its parent."""
    return ThreadPoolExecutor(num_workers, thread_name_prefix="trellis-memory")


def _aligned_zeros(count: int, dtype: torch.dtype) -> Any:
    """Return zeros that start at a multiple of 64 bytes, so that no vector straddles two cache lines."""
    num_bytes = count * dtype.itemsize
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(np.float32 if dtype == torch.float32 else np.float64)
