"""Launches the GPU kernels of the exact recurrence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trellis_ts.kernels.memory import tuning
from trellis_ts.kernels.memory.launch_shape import Shape, on_device_of


def num_checkpoints(num_tokens: int, num_slots: int, head_dim: int) -> int:
    """Return how many times the forward pass stores both memories for the backward pass."""
    return (num_tokens - 1) // _segment_length(num_tokens, num_slots, head_dim)


def _segment_length(num_tokens: int, num_slots: int, head_dim: int) -> int:
    replay = tuning.EXACT_BACKWARD[tuning.padded(num_slots) * tuning.padded(head_dim)].replay
    return tuning.segment_length(num_tokens, replay)


def forward(
    inputs: Sequence[Tensor],
    output: Tensor,
    finals: Sequence[Tensor],
    checkpoint: Tensor | None,
    options: tuple[str, str, float],
) -> None:
    """Fill in output, final memories, which may be the initial ones' own, and, unless None, the checkpoints."""
    from trellis_ts.kernels.memory import triton_exact_forward

    shape = Shape.of(inputs[0], inputs[3])
    blocks = shape.blocks(tuning.SMALLEST)
    tuned = tuning.EXACT_FORWARD[blocks["BM"] * blocks["BD"]]
    segment = _segment_length(shape.num_tokens, shape.num_slots, shape.head_dim)
    write_activation, read_activation, write_epsilon = options
    with on_device_of(output):
        triton_exact_forward.exact_forward_kernel[(-(-shape.num_rows // tuned.rows),)](
            *inputs,
            output,
            *finals,
            finals[0] if checkpoint is None else checkpoint,
            shape.num_rows,
            *shape.times,
            shape.num_tokens if checkpoint is None else segment,
            write_epsilon,
            **blocks,
            ROWS=tuned.rows,
            WRITE=write_activation,
            READ=read_activation,
            KEEP=checkpoint is not None,
            num_warps=tuned.num_warps,
            num_stages=1,
        )


def backward(
    inputs: Sequence[Tensor],
    checkpoint: Tensor,
    cotangents: Sequence[Tensor],
    gradients: Sequence[Tensor],
    options: tuple[str, str, float],
    second_order: bool,
) -> None:
    """Fill in the gradients of the eight inputs from those of output and final memories."""
    from trellis_ts.kernels.memory import triton_exact_backward

    shape = Shape.of(inputs[0], inputs[3])
    blocks = shape.blocks(tuning.SMALLEST)
    tuned = tuning.EXACT_BACKWARD[blocks["BM"] * blocks["BD"]]
    segment = _segment_length(shape.num_tokens, shape.num_slots, shape.head_dim)
    state_shape = (shape.num_rows, -(-segment // tuned.replay), 2, shape.num_slots, shape.head_dim)
    kept_states = inputs[6].new_empty(state_shape)
    kept_vectors = inputs[6].new_empty((shape.num_rows, segment, 6, shape.num_slots))
    write_activation, read_activation, write_epsilon = options
    with on_device_of(checkpoint):
        triton_exact_backward.exact_backward_kernel[(-(-shape.num_rows // tuned.rows),)](
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
            **blocks,
            ROWS=tuned.rows,
            REPLAY=tuned.replay,
            WRITE=write_activation,
            READ=read_activation,
            SECOND_ORDER=second_order,
            num_warps=tuned.num_warps,
            num_stages=1,
        )
