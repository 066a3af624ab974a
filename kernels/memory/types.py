"""The nouns of the memory operator: its state, its inputs, its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.errors import ConfigError

WriteActivation = Literal["identity", "silu", "ln_silu"]
ReadActivation = Literal["ln_silu", "l2_silu", "softmax"]

# The dtypes the operator takes, and the one each keeps its state in: sums over many tokens need float32 at least.
STATE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


class MemoryState(NamedTuple):
    """All a memory carries from token to token; its size does not depend on how many tokens it has seen.

    Its dtype is float64 for float64 inputs and float32 for all others.
    """

    key_memory: Float[Tensor, "batch head slot dim"]
    value_memory: Float[Tensor, "batch head slot dim"]


class Tokens(NamedTuple):
    """The six inputs, in the dtype and on the device they share; ``trellis_memory`` says what each is."""

    query: Float[Tensor, "batch time head dim"]
    key: Float[Tensor, "batch time head dim"]
    value: Float[Tensor, "batch time head dim"]
    target: Float[Tensor, "batch time head slot"]
    log_forget: Float[Tensor, "batch time head"]
    step_size: Float[Tensor, "batch time head"]


@dataclass(frozen=True)
class Options:
    """What is computed from the tokens; ``trellis_memory`` says what each option means.

    Raises:
        ConfigError: an option is none of its choices, or outside its range.
    """

    write_activation: WriteActivation
    read_activation: ReadActivation
    write_epsilon: float
    chunk_length: int
    second_order: bool
    final_state: bool = True

    def __post_init__(self) -> None:
        for name, choices in (("write_activation", WriteActivation), ("read_activation", ReadActivation)):
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(get_args(choices))}")
        if not 0 < self.write_epsilon < math.inf:
            raise ConfigError(f"write_epsilon={self.write_epsilon} must be positive and finite; the default is 1e-6")
        if not isinstance(self.chunk_length, int) or self.chunk_length < 1:
            raise ConfigError(f"chunk_length={self.chunk_length!r} must be a whole number of at least 1")


@dataclass(frozen=True)
class Problem:
    """A call without its numbers: all that the choice of an implementation may look at."""

    device: torch.device
    dtype: torch.dtype
    num_rows: int
    """Independent memories: batch times heads."""
    num_tokens: int
    num_slots: int
    head_dim: int
    options: Options


class Run(Protocol):
    """What every implementation is: ``trellis_memory`` on checked arguments, with the initial state spelled out."""

    def __call__(
        self, tokens: Tokens, initial_state: MemoryState, options: Options
    ) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
        """Return the output in the tokens' dtype, and the final state in the initial state's."""


class RunStep(Protocol):
    """One token of a problem, given without a time axis, and without gradients."""

    def __call__(
        self, tokens: Tokens, state: MemoryState, inplace: bool
    ) -> tuple[Float[Tensor, "batch head dim"], MemoryState]:
        """Return the output and the final state: ``state`` itself, overwritten, if ``inplace``."""
