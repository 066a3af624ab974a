"""Launches the GPU kernels of the chunkwise form, and keeps what one hands to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trellis_ts.kernels.memory import tuning
from trellis_ts.kernels.memory.launch_shape import Shape, on_device_of


@dataclass(frozen=True)
class _Plan:
    """The grids and constants of one call."""

    shape: Shape
    chunk_length: int
    tuned: tuning.Chunk
    write_activation: str

    def blocks(self, launch: tuning.Tiled) -> dict[str, Any]:
        """Return all constants of a kernel but its activations."""
        sizes = {"BT": self.chunk_length, "BC": min(launch.tile, self.chunk_length)}
        return self.shape.blocks(16) | sizes | {"num_warps": launch.num_warps, "num_stages": 1}

    def per_tile(self, launch: tuning.Tiled) -> int:
        """Return the number of programs if each takes one tile."""
        return self.shape.num_rows * -(-self.shape.num_tokens // min(launch.tile, self.chunk_length))

    @property
    def num_chunks(self) -> int:
        return -(-self.shape.num_tokens // self.chunk_length)

    @property
    def per_chunk(self) -> int:
        """The number of programs if each takes one chunk."""
        return self.shape.num_rows * self.num_chunks

    def in_order(self, launch: tuning.Tiled) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """Return grid and constants of a kernel that goes through the chunks in order."""
        blocks = self.blocks(launch)
        blocks["BM"] = tuning.state_slots(blocks["BM"], self.write_activation)
        return (self.shape.num_rows, 2, -(-self.shape.num_slots // blocks["BM"])), blocks


@dataclass(frozen=True)
class _Scratch:
    """What ``chunk_decays_kernel`` and ``chunk_states_kernel`` leave for the others."""

    decays: tuple[Tensor, Tensor]
    """Cumulated logarithms of the gates, and how many were shut."""
    states: Tensor
    """At the start of every chunk."""
    written: Tensor
    """``u`` of every write."""
    answers: Tensor | None
    """``z`` of every write, where the backward pass will want it."""


def forward(
    inputs: Sequence[Tensor],
    output: Tensor,
    finals: Sequence[Tensor],
    options: tuple[str, str, float],
    chunk_length: int,
) -> None:
    """Fill in output and final memories."""
    from trellis_ts.kernels.memory import triton_chunk_forward

    write_activation, read_activation, write_epsilon = options
    plan = _plan(inputs, write_activation, chunk_length)
    with on_device_of(output):
        scratch = _run_states(plan, inputs, finals, write_epsilon, keep=False)
        launch = plan.tuned.reads
        triton_chunk_forward.chunk_reads_kernel[(plan.per_tile(launch),)](
            *inputs[:3],
            inputs[5],
            *scratch.decays,
            scratch.states,
            scratch.written,
            output,
            *plan.shape.times,
            READ=read_activation,
            **plan.blocks(launch),
        )


def backward(
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    gradients: Sequence[Tensor],
    options: tuple[str, str, float],
    chunk_length: int,
    second_order: bool,
) -> None:
    """Fill in the gradients of the eight inputs from those of output and final memories."""
    from trellis_ts.kernels.memory import triton_chunk_backward as kernels

    query, key, value, target, log_forget, step_size = inputs[:6]
    write_activation, read_activation, write_epsilon = options
    plan = _plan(inputs, write_activation, chunk_length)
    tuned, times = plan.tuned, plan.shape.times
    wide = partial(torch.empty, dtype=torch.float32, device=query.device)
    decay_part = wide(log_forget.shape)
    step_size_part = wide((*log_forget.shape, 2))
    vector_part = wide((*log_forget.shape, 2, plan.shape.head_dim))
    written_grad = wide((*log_forget.shape, 2, plan.shape.num_slots))
    with on_device_of(query):
        # The final memories are not wanted again; the initial ones' gradients are written only later.
        scratch = _run_states(plan, inputs, gradients[6:], write_epsilon, keep=True)
        gates = (step_size, *scratch.decays)
        codes, states_grad = torch.empty_like(scratch.written), torch.empty_like(scratch.states)
        kernels.chunk_codes_backward_kernel[(plan.per_tile(tuned.codes_backward),)](
            *(query, key, value, *gates, scratch.states, scratch.written, cotangents[0]),
            *(codes, decay_part),
            *times,
            READ=read_activation,
            **plan.blocks(tuned.codes_backward),
        )
        kernels.chunk_queries_backward_kernel[(plan.per_tile(tuned.queries_backward),)](
            *(query, key, *gates, scratch.states, scratch.written, codes),
            *(gradients[0], decay_part),
            *times,
            **plan.blocks(tuned.queries_backward),
        )
        kernels.chunk_reads_backward_kernel[(plan.per_tile(tuned.reads_backward), 2)](
            *(query, key, value, *gates, scratch.written, codes, cotangents[0]),
            *(vector_part, written_grad, step_size_part),
            *times,
            **plan.blocks(tuned.reads_backward),
        )
        grid, blocks = plan.in_order(tuned.states_backward)
        kernels.chunk_states_backward_kernel[grid](
            *(query, key, value, target, *gates, scratch.answers, codes, cotangents[0], written_grad, *cotangents[1:]),
            *(states_grad, *gradients[6:]),
            *times,
            write_epsilon,
            WRITE=write_activation,
            SECOND_ORDER=second_order,
            **blocks,
        )
        kernels.chunk_writes_backward_kernel[(plan.per_chunk,)](
            *(key, value, target, log_forget, *gates, scratch.states, scratch.answers, states_grad),
            *(vector_part, written_grad, step_size_part, decay_part),
            *gradients[1:6],
            *times,
            write_epsilon,
            WRITE=write_activation,
            SECOND_ORDER=second_order,
            **plan.blocks(tuned.writes_backward),
        )


def _plan(inputs: Sequence[Tensor], write_activation: str, chunk_length: int) -> _Plan:
    shape = Shape.of(inputs[0], inputs[3])
    tuned = tuning.chunk(max(shape.num_slots, shape.head_dim), inputs[0].dtype)
    return _Plan(shape, chunk_length, tuned, write_activation)


def _run_states(
    plan: _Plan, inputs: Sequence[Tensor], finals: Sequence[Tensor], write_epsilon: float, *, keep: bool
) -> _Scratch:
    """Fill in the final memories, and what the other kernels start from."""
    from trellis_ts.kernels.memory import triton_chunk_forward, triton_chunk_parts

    log_forget = inputs[4]
    shape, memory = plan.shape, inputs[6]
    # Rounding them here is what the products of matrices they are for would do first.
    operand = torch.bfloat16 if inputs[0].dtype == torch.bfloat16 else torch.float32
    scratch = _Scratch(
        decays=(memory.new_empty(log_forget.shape), memory.new_empty(log_forget.shape, dtype=torch.int32)),
        states=memory.new_empty((shape.num_rows, plan.num_chunks, 2, shape.num_slots, shape.head_dim), dtype=operand),
        written=memory.new_empty((*log_forget.shape, 2, shape.num_slots), dtype=operand),
        answers=memory.new_empty((*log_forget.shape, 2, shape.num_slots)) if keep else None,
    )
    triton_chunk_parts.chunk_decays_kernel[(plan.per_chunk,)](
        log_forget, *scratch.decays, *shape.times, BT=plan.chunk_length, num_warps=1
    )
    grid, blocks = plan.in_order(plan.tuned.states)
    triton_chunk_forward.chunk_states_kernel[grid](
        *inputs[1:4],
        inputs[5],
        *scratch.decays,
        *inputs[6:],
        scratch.states,
        scratch.written,
        scratch.answers,
        *finals,
        *shape.times,
        write_epsilon,
        WRITE=plan.write_activation,
        KEEP=keep,
        **blocks,
    )
    return scratch
