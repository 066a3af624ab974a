"""The GPU kernels as an implementation of the memory: what they take, and the operators torch knows them by.

Triton is imported at the first launch. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU, statement by statement,
which is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.kernels.memory import launch_chunks, launch_exact, tuning
from trellis_ts.kernels.memory.types import MemoryState, Options, Problem, Tokens

# Asked once, at import: torch.compile cannot look through it. It does not import Triton.
_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not(problem: Problem | None) -> str | None:
    """Say why the kernels cannot run ``problem``, or, for None, why they cannot run on this machine at all."""
    if not _IS_INSTALLED:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if problem is None:
            if not torch.cuda.is_available():
                return "this machine has no CUDA device"
        elif problem.device.type != "cuda":
            return f"the tensors are on {problem.device.type}"
        if torch.cuda.get_device_capability(None if problem is None else problem.device) < (8, 0):
            return "the GPU has a compute capability below 8.0"
    if problem is None:
        return None
    if problem.dtype == torch.float64:
        return "the tensors are float64"
    for name, size in (("slots", problem.num_slots), ("dimensions per head", problem.head_dim)):
        if not tuning.SMALLEST <= size <= tuning.LARGEST:
            return f"there are {size} {name}, outside {tuning.SMALLEST} to {tuning.LARGEST}"
    lengths = (1, *tuning.CHUNK_LENGTHS)
    if problem.options.chunk_length not in lengths:
        return f"chunk_length={problem.options.chunk_length} is none of {', '.join(map(str, lengths))}"
    widest = max(problem.num_slots, problem.head_dim)
    if problem.options.chunk_length > 1 and tuning.spills(widest, problem.dtype, problem.options.write_activation):
        return "chunks of ln_silu writes in float32 are taken up to 32 slots and dimensions per head"
    return None


def run(
    tokens: Tokens, initial_state: MemoryState, options: Options
) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
    """Compute ``trellis_memory`` on the GPU."""
    tensors = (*tokens, *initial_state)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    output, key_memory, value_memory, _ = memory_forward(*tensors, *_plain(options), keep)
    return output, MemoryState(key_memory, value_memory)


def step(
    tokens: Tokens, state: MemoryState, options: Options, inplace: bool
) -> tuple[Float[Tensor, "batch head dim"], MemoryState]:
    """Compute ``trellis_memory_step`` without gradients."""
    sequence = Tokens(*(tensor.unsqueeze(1) for tensor in tokens))
    if inplace:
        output: Tensor = memory_in_place(*sequence, *state, *_plain(options)[:3])
    else:
        output, state = run(sequence, state, options)
    return output.squeeze(1), state


def _plain(options: Options) -> tuple[str, str, float, int, bool]:
    return (
        options.write_activation,
        options.read_activation,
        options.write_epsilon,
        options.chunk_length,
        options.second_order,
    )


@torch.library.custom_op("trellis_ts::triton_memory", mutates_args=())
def memory_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    write_activation: str,
    read_activation: str,
    write_epsilon: float,
    chunk_length: int,
    second_order: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output, both final memories, and, if ``keep``, the checkpoints the backward pass starts from."""
    inputs = _contiguous(query, key, value, target, log_forget, step_size, key_memory, value_memory)
    output, *finals, checkpoint = _empty_outputs(query, key_memory, chunk_length, keep)
    options = (write_activation, read_activation, write_epsilon)
    if output.numel() and chunk_length == 1:
        launch_exact.forward(inputs, output, finals, checkpoint if keep else None, options)
    elif output.numel():
        launch_chunks.forward(inputs, output, finals, options, chunk_length)
    return output, finals[0], finals[1], checkpoint


@memory_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key_memory, chunk_length, keep = (arguments[i] for i in (0, 6, 11, 13))
    return _empty_outputs(query, key_memory, chunk_length, keep)


@torch.library.custom_op("trellis_ts::triton_memory_in_place", mutates_args=("key_memory", "value_memory"))
def memory_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    write_activation: str,
    read_activation: str,
    write_epsilon: float,
) -> Tensor:
    """Return the output of the exact recurrence, and leave the final memories in place of the initial ones."""
    inputs = _contiguous(query, key, value, target, log_forget, step_size, key_memory, value_memory)
    output = query.new_empty(query.shape)
    if output.numel():
        launch_exact.forward(inputs, output, inputs[6:], None, (write_activation, read_activation, write_epsilon))
    for memory, written in zip((key_memory, value_memory), inputs[6:], strict=True):
        if memory is not written:  # it was not contiguous
            memory.copy_(written)
    return output


@memory_in_place.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("trellis_ts::triton_memory_backward", mutates_args=())
def memory_backward(
    output_grad: Tensor,
    final_key_memory_grad: Tensor,
    final_value_memory_grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Tensor,
    log_forget: Tensor,
    step_size: Tensor,
    key_memory: Tensor,
    value_memory: Tensor,
    checkpoint: Tensor,
    write_activation: str,
    read_activation: str,
    write_epsilon: float,
    chunk_length: int,
    second_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the eight tensors from ``query`` to ``value_memory``."""
    inputs = _contiguous(query, key, value, target, log_forget, step_size, key_memory, value_memory)
    cotangents = _contiguous(output_grad, final_key_memory_grad, final_value_memory_grad)
    gradients = tuple(torch.empty_like(tensor) for tensor in inputs)
    options = (write_activation, read_activation, write_epsilon)
    if query.numel() and chunk_length == 1:
        launch_exact.backward(inputs, checkpoint, cotangents, gradients, options, second_order)
    elif query.numel():
        launch_chunks.backward(inputs, cotangents, gradients, options, chunk_length, second_order)
    return gradients  # type: ignore[return-value]  # eight of them, one for each input


@memory_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in arguments[3:11])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*inputs[:8], output[3])
    ctx.options = inputs[8:13]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, checkpoint = ctx.saved_tensors
    like = (inputs[0], *inputs[6:])
    cotangents = (
        tensor.new_zeros(tensor.shape) if grad is None else grad for grad, tensor in zip(grads[:3], like, strict=True)
    )
    gradients = memory_backward(*cotangents, *inputs, checkpoint, *ctx.options)
    return (*gradients, *(None for _ in range(6)))


memory_forward.register_autograd(_backward, setup_context=_setup_context)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _empty_outputs(
    query: Tensor, key_memory: Tensor, chunk_length: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_slots, head_dim = key_memory.shape
    stored = launch_exact.num_checkpoints(query.shape[1], num_slots, head_dim) if keep and chunk_length == 1 else 0
    checkpoint = key_memory.new_empty((stored, batch, num_heads, 2, num_slots, head_dim))
    finals = (key_memory.new_empty(key_memory.shape), key_memory.new_empty(key_memory.shape))
    return query.new_empty(query.shape), *finals, checkpoint
