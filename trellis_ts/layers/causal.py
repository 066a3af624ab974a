"""The block of the streaming model: tokens write to the memory one after the other, queries only read it.

Weights, and their names, are those of ``Block`` and ``TrellisMixer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from trellis_ts.kernels import MemoryState
from trellis_ts.kernels.memory.types import Tokens
from trellis_ts.layers.block import Block
from trellis_ts.layers.trellis import TrellisMixer, TrellisState

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig


class CausalMixer(TrellisMixer):
    """The Trellis mixer with queries beside the tokens."""

    def start(self, num_rows: int) -> TrellisState:
        """The state before the first token."""
        memory = self._initial_memory(num_rows)
        weight = self.value.weight
        if memory is None:
            zero = weight.new_zeros(num_rows, self.num_heads, self.num_slots, self.head_dim)
            memory = MemoryState(zero, zero)
        lags, features = len(self.convolution.kernel) - 1, self.convolution.kernel.shape[1]
        return TrellisState(memory, weight.new_zeros(num_rows, lags, features))

    def stream(
        self,
        tokens: Float[Tensor, "row token width"],
        queries: Float[Tensor, "row token width"],
        observed: Bool[Tensor, "row token"],
        state: TrellisState,
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row token width"], TrellisState]:
        """Mixed tokens, mixed queries and the state after the last token.

        The query of a place reads the memory as the token of that place left it, and leaves no trace. Tokens without an
        observed step read but neither write nor forget.
        """
        num_rows, num_tokens, width = tokens.shape
        inputs, tail = self.project(tokens, observed, state.tail)
        asked = self._unit_heads(self._asked(tokens, queries, observed, state.tail).to(inputs.query.dtype))
        # Every token is followed by the query of its place; with a step size and log-forget of 0 it writes nothing.
        with_queries = Tokens(
            _alternate(inputs.query, asked), *(_alternate(each, torch.zeros_like(each)) for each in inputs[1:])
        )
        output, memory = self.run(with_queries, state.memory)
        both = output.to(tokens.dtype).view(num_rows, num_tokens, 2, width)
        return both[:, :, 0], both[:, :, 1], TrellisState(memory, tail)

    def _asked(
        self, tokens: Tensor, queries: Tensor, observed: Tensor, tail: Tensor
    ) -> Float[Tensor, "row token width"]:
        """The queries after the convolution, to which the token of a query's own place is the one before it."""
        num_tokens, width = tokens.shape[1:]
        weight, kernel = self.query_key.weight[:width], self.convolution.kernel[:, :width]
        own = F.linear(tokens, weight) * observed[..., None]
        past = torch.cat((tail[..., :width].to(own.dtype), own), dim=1)  # [R, lag + N, W]
        asked = F.linear(queries, weight) * kernel[0]
        for lag in range(1, len(kernel)):
            start = len(kernel) - lag
            asked = asked + past[:, start : start + num_tokens] * kernel[lag]
        return asked


def _alternate(tokens: Tensor, queries: Tensor) -> Tensor:
    return torch.stack((tokens, queries), dim=2).flatten(1, 2)


class CausalBlock(Block):
    """The block of the window model, with a state."""

    mixer: CausalMixer

    def __init__(self, config: ModelConfig, *, implementation: Implementation = "auto") -> None:
        super().__init__(config, CausalMixer(config, implementation=implementation))

    def stream(
        self,
        tokens: Float[Tensor, "row token width"],
        queries: Float[Tensor, "row token width"],
        observed: Bool[Tensor, "row token"],
        state: TrellisState,
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row token width"], TrellisState]:
        """Tokens and queries after this block, and its state after the last token."""
        num_tokens = tokens.shape[1]
        residual = torch.cat((tokens, queries), dim=1)
        normed = self.mixer_norm(residual)
        written, read, state = self.mixer.stream(normed[:, :num_tokens], normed[:, num_tokens:], observed, state)
        mixed = self.post_norm(torch.cat((written, read), dim=1)) * F.gelu(self.gate(normed))
        residual = residual + self.dropout(self.output(mixed))
        residual = residual + self.dropout(self.feedforward(self.feedforward_norm(residual)))
        return residual[:, :num_tokens], residual[:, num_tokens:], state
