"""Launches the GPU kernels: grids, scratch memory, and the operators torch knows them by.

Triton is imported at the first launch. Under ``TRITON_INTERPRET=1`` the kernels run on the CPU, statement by statement,
which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.kernels.memory import tuning
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
    longest = tuning.longest_chunk(problem.dtype, max(problem.num_slots, problem.head_dim))
    if problem.options.chunk_length > longest:
        return f"chunk_length={problem.options.chunk_length} is above {longest}, the longest for this dtype and size"
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
    output, final_key_memory, final_value_memory, checkpoint = _empty_outputs(query, key_memory, chunk_length, keep)
    shape = _Shape(query, target)
    options = (write_activation, read_activation, write_epsilon)
    if chunk_length == 1:
        finals = (final_key_memory, final_value_memory)
        _launch_exact_forward(shape, inputs, (output, *finals, checkpoint), options, keep)
    elif shape.num_rows:
        states = _launch_chunk_states(shape, inputs, (final_key_memory, final_value_memory), options, chunk_length)
        answers = _launch_key_reads(shape, inputs, states, options, chunk_length)
        with _on(query):
            from trellis_ts.kernels.memory import triton_forward

            triton_forward.chunk_value_reads_kernel[(shape.num_rows * shape.num_chunks(chunk_length),)](
                *inputs[2:6],
                states,
                answers,
                output,
                *shape.times,
                write_epsilon,
                **shape.chunk_blocks(chunk_length),
                WRITE=write_activation,
                READ=read_activation,
                num_warps=shape.chunk_tuning(chunk_length).reads,
                num_stages=1,
            )
    return output, final_key_memory, final_value_memory, checkpoint


@memory_forward.register_fake
def _(
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
    outputs = (output, *inputs[6:], inputs[6])
    options = (write_activation, read_activation, write_epsilon)
    _launch_exact_forward(_Shape(query, target), inputs, outputs, options, keep=False)
    for memory, written in zip((key_memory, value_memory), inputs[6:], strict=True):
        if memory is not written:  # it was not contiguous
            memory.copy_(written)
    return output


@memory_in_place.register_fake
def _(
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
    shape = _Shape(query, target)
    options = (write_activation, read_activation, write_epsilon)
    if shape.num_rows and chunk_length == 1:
        _launch_exact_backward(shape, inputs, checkpoint, cotangents, gradients, options, second_order)
    elif shape.num_rows:
        _launch_chunk_backward(shape, inputs, cotangents, gradients, options, chunk_length, second_order)
    return gradients  # type: ignore[return-value]  # eight of them, one for each input


@memory_backward.register_fake
def _(
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
    inputs = (query, key, value, target, log_forget, step_size, key_memory, value_memory)
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)  # type: ignore[return-value]


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


class _Shape:
    """The sizes of a call and what the tuning table says about them."""

    def __init__(self, query: Tensor, target: Tensor) -> None:
        batch, self.num_tokens, self.num_heads, self.head_dim = query.shape
        self.num_slots = target.shape[-1]
        self.num_rows = batch * self.num_heads

    @property
    def times(self) -> tuple[int, int]:
        return self.num_tokens, self.num_heads

    def exact_blocks(self, rows: int) -> dict[str, int]:
        padded_slots, padded_dim = tuning.padded(self.num_slots), tuning.padded(self.head_dim)
        return {"M": self.num_slots, "D": self.head_dim, "BM": padded_slots, "BD": padded_dim, "ROWS": rows}

    def exact_tuning(self, table: dict[int, tuning.Exact]) -> tuning.Exact:
        return table[tuning.padded(self.num_slots) * tuning.padded(self.head_dim)]

    def num_chunks(self, chunk_length: int) -> int:
        return -(-self.num_tokens // chunk_length)

    def chunk_blocks(self, chunk_length: int) -> dict[str, int]:
        padded_slots, padded_dim = tuning.padded(self.num_slots, 16), tuning.padded(self.head_dim, 16)
        return {"M": self.num_slots, "D": self.head_dim, "BM": padded_slots, "BD": padded_dim, "BT": chunk_length}

    def chunk_tuning(self, chunk_length: int) -> tuning.Chunk:
        blocks = self.chunk_blocks(chunk_length)
        return tuning.CHUNK[max(blocks["BM"], blocks["BD"], blocks["BT"])]

    def state_grid(self, chunk_length: int, write_activation: str) -> tuple[tuple[int, int, int], dict[str, int]]:
        """Return grid and blocks of the kernels that go through the chunks in order."""
        blocks = self.chunk_blocks(chunk_length)
        if write_activation != "ln_silu":  # whose LayerNorm needs all slots in one program
            blocks["BM"] = min(blocks["BM"], tuning.STATE_SLOTS)
        return (self.num_rows, 2, -(-self.num_slots // blocks["BM"])), blocks


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _empty_outputs(
    query: Tensor, key_memory: Tensor, chunk_length: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_slots, head_dim = key_memory.shape
    num_checkpoints = 0
    if keep and chunk_length == 1:
        num_tokens = query.shape[1]
        num_checkpoints = (num_tokens - 1) // _segment_length(num_tokens, num_slots, head_dim)
    checkpoint = key_memory.new_empty((num_checkpoints, batch, num_heads, 2, num_slots, head_dim))
    finals = (key_memory.new_empty(key_memory.shape), key_memory.new_empty(key_memory.shape))
    return query.new_empty(query.shape), *finals, checkpoint


def _segment_length(num_tokens: int, num_slots: int, head_dim: int) -> int:
    replay = tuning.EXACT_BACKWARD[tuning.padded(num_slots) * tuning.padded(head_dim)].replay
    return tuning.segment_length(num_tokens, replay)


def _launch_exact_forward(
    shape: _Shape,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    options: tuple[str, str, float],
    keep: bool,
) -> None:
    if not shape.num_rows:
        return
    from trellis_ts.kernels.memory import triton_forward

    tuned = shape.exact_tuning(tuning.EXACT_FORWARD)
    write_activation, read_activation, write_epsilon = options
    with _on(inputs[0]):
        triton_forward.exact_forward_kernel[(-(-shape.num_rows // tuned.rows),)](
            *inputs,
            *outputs,
            shape.num_rows,
            *shape.times,
            _segment_length(shape.num_tokens, shape.num_slots, shape.head_dim) if keep else shape.num_tokens,
            write_epsilon,
            **shape.exact_blocks(tuned.rows),
            WRITE=write_activation,
            READ=read_activation,
            KEEP=keep,
            num_warps=tuned.num_warps,
            num_stages=1,
        )


def _launch_exact_backward(
    shape: _Shape,
    inputs: Sequence[Tensor],
    checkpoint: Tensor,
    cotangents: Sequence[Tensor],
    gradients: Sequence[Tensor],
    options: tuple[str, str, float],
    second_order: bool,
) -> None:
    from trellis_ts.kernels.memory import triton_backward

    tuned = shape.exact_tuning(tuning.EXACT_BACKWARD)
    segment = _segment_length(shape.num_tokens, shape.num_slots, shape.head_dim)
    state_shape = (shape.num_rows, -(-segment // tuned.replay), 2, shape.num_slots, shape.head_dim)
    kept_states = inputs[6].new_empty(state_shape)
    kept_vectors = inputs[6].new_empty((shape.num_rows, segment, 6, shape.num_slots))
    write_activation, read_activation, write_epsilon = options
    with _on(inputs[0]):
        triton_backward.exact_backward_kernel[(-(-shape.num_rows // tuned.rows),)](
            *inputs,
            checkpoint,
            *cotangents,
            *gradients,
            kept_states,
            kept_vectors,
            shape.num_rows,
            *shape.times,
            segment,
            write_epsilon,
            **shape.exact_blocks(tuned.rows),
            REPLAY=tuned.replay,
            WRITE=write_activation,
            READ=read_activation,
            SECOND_ORDER=second_order,
            num_warps=tuned.num_warps,
            num_stages=1,
        )


def _launch_chunk_states(
    shape: _Shape,
    inputs: Sequence[Tensor],
    finals: Sequence[Tensor],
    options: tuple[str, str, float],
    chunk_length: int,
) -> Tensor:
    """Fill in the final memories; return both memories at the start of every chunk."""
    from trellis_ts.kernels.memory import triton_forward

    write_activation, _, write_epsilon = options
    num_chunks = shape.num_chunks(chunk_length)
    states = inputs[6].new_empty((shape.num_rows, num_chunks, 2, shape.num_slots, shape.head_dim))
    grid, blocks = shape.state_grid(chunk_length, write_activation)
    with _on(states):
        triton_forward.chunk_states_kernel[grid](
            *inputs[1:],
            states,
            *finals,
            *shape.times,
            write_epsilon,
            **blocks,
            WRITE=write_activation,
            num_warps=shape.chunk_tuning(chunk_length).states,
            num_stages=1,
        )
    return states


def _launch_key_reads(
    shape: _Shape, inputs: Sequence[Tensor], states: Tensor, options: tuple[str, str, float], chunk_length: int
) -> Tensor:
    """Return what the key memory answers to every query, in float32."""
    from trellis_ts.kernels.memory import triton_forward

    write_activation, _, write_epsilon = options
    answers = torch.empty_like(inputs[3], dtype=torch.float32)
    with _on(states):
        triton_forward.chunk_key_reads_kernel[(shape.num_rows * shape.num_chunks(chunk_length),)](
            *inputs[:2],
            *inputs[3:6],
            states,
            answers,
            *shape.times,
            write_epsilon,
            **shape.chunk_blocks(chunk_length),
            WRITE=write_activation,
            num_warps=shape.chunk_tuning(chunk_length).reads,
            num_stages=1,
        )
    return answers


def _launch_chunk_backward(
    shape: _Shape,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    gradients: Sequence[Tensor],
    options: tuple[str, str, float],
    chunk_length: int,
    second_order: bool,
) -> None:
    from trellis_ts.kernels.memory import triton_backward

    write_activation, read_activation, write_epsilon = options
    tuned = shape.chunk_tuning(chunk_length)
    blocks = shape.chunk_blocks(chunk_length)
    grid = (shape.num_rows * shape.num_chunks(chunk_length),)
    state_grid, state_blocks = shape.state_grid(chunk_length, write_activation)

    # The final memories are not wanted again; the initial ones' gradients are written only later.
    states = _launch_chunk_states(shape, inputs, gradients[6:], options, chunk_length)
    answers = _launch_key_reads(shape, inputs, states, options, chunk_length)
    states_grad = torch.empty_like(states)
    key_part, value_part = (torch.empty_like(tensor, dtype=torch.float32) for tensor in inputs[1:3])
    step_size_part, decay_part = (torch.empty_like(tensor, dtype=torch.float32) for tensor in inputs[4:6])
    write_grad = states.new_empty((*inputs[4].shape, 2, shape.num_slots))
    with _on(states):
        triton_backward.chunk_value_reads_backward_kernel[grid](
            *inputs[2:6],
            states,
            cotangents[0],
            answers,
            value_part,
            write_grad,
            step_size_part,
            decay_part,
            states_grad,
            *shape.times,
            write_epsilon,
            **blocks,
            WRITE=write_activation,
            READ=read_activation,
            num_warps=tuned.reads_backward,
            num_stages=1,
        )
        triton_backward.chunk_key_reads_backward_kernel[grid](
            *inputs[:2],
            *inputs[3:6],
            states,
            answers,
            gradients[0],
            key_part,
            write_grad,
            step_size_part,
            decay_part,
            states_grad,
            *shape.times,
            write_epsilon,
            **blocks,
            WRITE=write_activation,
            num_warps=tuned.reads_backward,
            num_stages=1,
        )
        triton_backward.chunk_states_backward_kernel[state_grid](
            *inputs[1:6],
            states,
            *cotangents[1:],
            write_grad,
            states_grad,
            *gradients[6:],
            *shape.times,
            write_epsilon,
            **state_blocks,
            WRITE=write_activation,
            SECOND_ORDER=second_order,
            num_warps=tuned.states_backward,
            num_stages=1,
        )
        triton_backward.chunk_writes_backward_kernel[grid](
            *inputs[1:6],
            states,
            key_part,
            value_part,
            write_grad,
            step_size_part,
            decay_part,
            states_grad,
            *gradients[1:6],
            *shape.times,
            write_epsilon,
            **blocks,
            WRITE=write_activation,
            SECOND_ORDER=second_order,
            num_warps=tuned.writes_backward,
            num_stages=1,
        )
