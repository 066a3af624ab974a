"""The exact recurrence compiled for CPUs: operators of PyTorch around the kernels that ``cpu_run.py`` runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.errors import BackendError
from trellis_ts.kernels.memory.cpu_run import HAS_NUMBA, in_large_pages, plan_step, run_backward, run_forward
from trellis_ts.kernels.memory.types import (
    STATE_DTYPES,
    MemoryState,
    Options,
    Problem,
    ReadActivation,
    RunStep,
    Tokens,
    WriteActivation,
)

_WRITE_ACTIVATIONS = get_args(WriteActivation)
_READ_ACTIVATIONS = get_args(ReadActivation)


def why_not_cpu(problem: Problem | None) -> str | None:
    """Say why the compiled recurrence cannot run a problem, or this machine, or None if it can."""
    if not HAS_NUMBA:
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
    tensors = (*tokens, *initial_state)
    forward: Any
    if _needs_dispatcher(tensors):
        forward = torch.ops.trellis.memory_cpu_forward
    else:
        forward = _Recorded.apply if needs_gradient(*tensors) else _forward_alone
    output, *state = forward(
        *(tensor.to(dtype) for tensor in tokens),
        *initial_state,
        *_activation_numbers(options),
        options.second_order,
        options.write_epsilon,
        options.final_state,
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
    run_forward(ready, state, output, state, _activation_numbers(options), options.write_epsilon)
    return output.to(tokens.query.dtype)


def plan_cpu_step(problem: Problem) -> RunStep:
    """Return what computes one token of a problem by the shortest way there is; without gradients."""
    options = problem.options

    def step_as_sequence(tokens: Tokens, state: MemoryState, inplace: bool) -> tuple[Tensor, MemoryState]:
        sequence = Tokens(*(tensor.unsqueeze(1) for tensor in tokens))
        if inplace:
            return cpu_in_place(sequence, state, options).squeeze(1), state
        output, state = cpu(sequence, state, options)
        return output.squeeze(1), state

    if problem.num_slots % 8 or problem.head_dim % 8 or STATE_DTYPES[problem.dtype] != problem.dtype:
        return step_as_sequence
    run = plan_step(problem, _activation_numbers(options))
    is_contiguous, empty_like = Tensor.is_contiguous, torch.empty_like

    def step(tokens: Tokens, state: MemoryState, inplace: bool) -> tuple[Tensor, MemoryState]:
        if not all(map(is_contiguous, state)):
            return step_as_sequence(tokens, state, inplace)
        if not all(map(is_contiguous, tokens)):
            tokens = Tokens(*(tensor.contiguous() for tensor in tokens))
        output = empty_like(tokens[0])
        final = state if inplace else MemoryState(empty_like(state[0]), empty_like(state[1]))
        run((*tokens, *state, output, *final))
        return output, final

    return step


def _activation_numbers(options: Options) -> tuple[int, int]:
    return _WRITE_ACTIVATIONS.index(options.write_activation), _READ_ACTIVATIONS.index(options.read_activation)


def needs_gradient(*tensors: Tensor) -> bool:
    """Say whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Say whether anything but autograd wants to see an operation on these tensors: a graph, a mode, a subclass.

    An operator's way through PyTorch's dispatcher takes longer than a short sequence.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or any(type(tensor) is not Tensor for tensor in tensors)
    )


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
    final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = in_large_pages(torch.empty_like(query, memory_format=torch.contiguous_format))
    final_states = _empty_states(key_memory, final_state)
    run_forward(
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
    return torch.empty_like(query, memory_format=torch.contiguous_format), *_empty_states(key_memory, options[-1])


def _backward_alone(
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
    for gradient in token_gradients:
        in_large_pages(gradient)
    run_backward(
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


_backward = torch.library.custom_op(
    "trellis::memory_cpu_backward", _backward_alone, mutates_args=(), device_types="cpu"
)


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


def _empty_states(memory: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Two, because an operator's results must not share memory; without room for numbers unless ``wanted``."""
    if not wanted:
        return memory.new_empty(0), memory.new_empty(0)
    return (
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
    )


def _empty_gradients(
    tokens: Sequence[Tensor], memory: Tensor, with_state: bool
) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    of_tokens = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tokens]
    return of_tokens, _empty_states(memory, with_state)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, (*options, has_final_state) = ctx.saved_tensors, ctx.options
    likes = (inputs[0], inputs[6], inputs[7])
    given = [
        like.new_zeros(()).expand(like.shape) if gradient is None or not is_wanted else gradient
        for gradient, like, is_wanted in zip(gradients, likes, (True, has_final_state, has_final_state), strict=True)
    ]
    with_state = any(ctx.needs_input_grad[6:8])
    # With create_graph=True the operator is there to say that it has no derivative.
    through_dispatcher = torch.is_grad_enabled() or _needs_dispatcher((*inputs, *given))
    backward: Any = torch.ops.trellis.memory_cpu_backward if through_dispatcher else _backward_alone
    results = backward(*inputs, *given, *options, with_state)
    states = results[6:] if with_state else (None, None)
    return *results[:6], *states, *(None for _ in ctx.options)


def _refuse_second_derivative(ctx: Any, *gradients: Any) -> None:
    raise BackendError(
        "implementation='cpu' has no derivative of its backward pass; use implementation='reference' where the "
        "gradient is to be differentiated again"
    )


_forward.register_autograd(_backward_of_forward, setup_context=_setup_forward)
_backward.register_autograd(_refuse_second_derivative)


class _Recorded(torch.autograd.Function):
    """The same for autograd alone."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward_alone(*inputs)
        _setup_forward(ctx, inputs, output)
        return output

    backward = staticmethod(_backward_of_forward)
