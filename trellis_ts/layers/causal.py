"""The block of the streaming model: what followed a situation is written to the memory under that situation.

A situation, all that a forecast can be made from, asks the memory and writes nothing. Once its outcome is known, the
two are written together: the situation is the key, its outcome the value. What asks and what is asked for thus look
alike, and what comes back is what followed when things last looked like this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from trellis_ts.kernels import MemoryState
from trellis_ts.kernels.memory.types import Tokens
from trellis_ts.layers.block import SwiGLU
from trellis_ts.layers.trellis import MemoryMixer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig

# Where training starts: the first head has forgotten half after so many tokens, the last after so many, those between
# evenly on a logarithmic scale; a step moves the memory by half of the inner gradient; and the clock, which repeats
# exactly, counts for more in the keys than the values just seen.
_HALF_LIVES = (256.0, 1024.0)
_INITIAL_STEP_SIZE = 0.5
_SHARE_OF_VALUES = 0.3


class CausalLayerState(NamedTuple):
    """What a layer carries from call to call; its size does not depend on how many tokens it has seen."""

    memory: MemoryState
    waiting: Float[Tensor, "row lead feature"]
    """The last situations with their clocks, whose outcomes are not known yet; 0 where there was none."""

    def detach(self) -> CausalLayerState:
        """The same numbers without their history: gradients stop here."""
        return CausalLayerState(MemoryState(*(each.detach() for each in self.memory)), self.waiting.detach())


class Outcomes(NamedTuple):
    """What followed the situation of ``lead`` tokens before, per token."""

    features: Float[Tensor, "row token width"]
    is_known: Bool[Tensor, "row token"]
    """False where nothing of it was observed, or there was no situation."""


class CausalMixer(MemoryMixer):
    """The Trellis memory between situations and outcomes.

    Query and key are linear in the situation and its clock, and L2-normalised per head. Value, target, forget gate and
    step size are linear in situation and outcome together. A short value stays short (``v / sqrt(1 + |v|^2)``): an
    outcome that was much as expected says so.

    Args:
        config: the network's settings.
        lead: tokens until the outcome of a situation is known.
        num_clock: features of the clock.
        implementation: how the memory is computed; it changes no number.
    """

    def __init__(
        self, config: ModelConfig, lead: int, num_clock: int, *, implementation: Implementation = "auto"
    ) -> None:
        super().__init__(config, implementation=implementation)
        width = config.width
        self.lead = lead
        self.query = nn.Linear(width + num_clock, width, bias=False)
        self.key = nn.Linear(width + num_clock, width, bias=False)
        self.value = nn.Linear(2 * width, width, bias=False)
        self.target = nn.Linear(2 * width, self.num_heads * self.num_slots, bias=False)
        self.gates = nn.Linear(2 * width, (2 if config.forget_gate else 1) * self.num_heads)
        first, last = _HALF_LIVES
        halves = [first * (last / first) ** (head / max(1, self.num_heads - 1)) for head in range(self.num_heads)]
        self._start_gates(self.gates, [2 ** (-1 / half) for half in halves], _INITIAL_STEP_SIZE)
        with torch.no_grad():
            self.query.weight[:, :width] *= _SHARE_OF_VALUES
            self.key.weight.copy_(self.query.weight)
            self.gates.weight *= 0.1  # so that the half-lives hold for most tokens

    def start(self, num_rows: int) -> CausalLayerState:
        """The state before the first token."""
        memory, weight = self._initial_memory(num_rows), self.key.weight
        if memory is None:
            zero = weight.new_zeros(num_rows, self.num_heads, self.num_slots, self.head_dim)
            memory = MemoryState(zero, zero)
        return CausalLayerState(memory, weight.new_zeros(num_rows, self.lead, weight.shape[1]))

    def stream(
        self,
        tokens: Float[Tensor, "row token feature"],
        queries: Float[Tensor, "row token feature"],
        outcomes: Outcomes,
        state: CausalLayerState,
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row token width"], CausalLayerState]:
        """What tokens and queries, situations with their clocks, read, and the state after the last token.

        At every token the outcome that has become known is written; then the token reads, then the query of its place.
        Tokens of zeros are no situations.
        """
        num_rows, num_tokens, _ = tokens.shape
        width = self.num_heads * self.head_dim
        past = torch.cat((state.waiting.to(tokens.dtype), tokens), dim=1)
        situations, waiting = past[:, :num_tokens], past[:, num_tokens:]
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        is_written = (outcomes.is_known & (situations != 0).any(dim=-1))[..., None].to(dtype)
        episodes = torch.cat((situations[..., :width], outcomes.features), dim=-1)
        log_forget, step_size = self._open_gates(self.gates(episodes).to(dtype))
        written = Tokens(
            query=self._unit_heads(self.query(tokens).to(dtype)),
            key=self._unit_heads(self.key(situations).to(dtype)),
            value=self._unit_heads(self.value(episodes).to(dtype), epsilon=1.0),
            target=self._heads(self.target(episodes).to(dtype)),
            log_forget=log_forget * is_written,
            step_size=step_size * is_written,
        )
        asked = self._unit_heads(self.query(queries).to(dtype))
        # Every token is followed by the query of its place; with a step size and log-forget of 0 it writes nothing.
        both = Tokens(
            _alternate(written.query, asked), *(_alternate(each, torch.zeros_like(each)) for each in written[1:])
        )
        output, memory = self.run(both, state.memory)
        found = output.to(tokens.dtype).view(num_rows, num_tokens, 2, width)
        return found[:, :, 0], found[:, :, 1], CausalLayerState(memory, waiting)


def _alternate(tokens: Tensor, queries: Tensor) -> Tensor:
    return torch.stack((tokens, queries), dim=2).flatten(1, 2)


class CausalBlock(nn.Module):
    """Norm, memory, GELU gate, linear, residual; then norm, SwiGLU, residual.

    Unlike the window model's block it does not normalise what was read: an answer's size says how much is known.
    """

    def __init__(
        self, config: ModelConfig, lead: int, num_clock: int, *, implementation: Implementation = "auto"
    ) -> None:
        super().__init__()
        width = config.width
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = CausalMixer(config, lead, num_clock, implementation=implementation)
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feedforward_norm = nn.RMSNorm(width)
        self.feedforward = SwiGLU(width, config.feedforward_width)
        self.dropout = nn.Dropout(config.dropout)

    def stream(
        self,
        tokens: Float[Tensor, "row token width"],
        queries: Float[Tensor, "row token width"],
        is_started: Bool[Tensor, "row token"],
        clocks: Float[Tensor, "row place clock"],
        outcomes: Outcomes,
        state: CausalLayerState,
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row token width"], CausalLayerState]:
        """Tokens and queries after this block, and its state after the last token; only tokens that are started, of
        which there were values enough, count as situations. The clocks are those of the tokens, then of the queries."""
        num_tokens = tokens.shape[1]
        residual = torch.cat((tokens, queries), dim=1)
        normed = self.mixer_norm(residual)
        situations = torch.cat((normed, clocks), dim=-1)
        tokens_in, queries_in = situations[:, :num_tokens] * is_started[..., None], situations[:, num_tokens:]
        written, read, state = self.mixer.stream(tokens_in, queries_in, outcomes, state)
        mixed = torch.cat((written, read), dim=1) * F.gelu(self.gate(normed))
        residual = residual + self.dropout(self.output(mixed))
        residual = residual + self.dropout(self.feedforward(self.feedforward_norm(residual)))
        return residual[:, :num_tokens], residual[:, num_tokens:], state
