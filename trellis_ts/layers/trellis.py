"""The Trellis layer: projections, gates and normalisation around the memory operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from trellis_ts.config import ModelConfig
from trellis_ts.errors import ConfigError
from trellis_ts.kernels import MemoryState, trellis_memory
from trellis_ts.kernels.memory.types import Tokens
from trellis_ts.layers.convolution import CausalConvolution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Activation, Implementation, ReadActivation

# Where training starts (trained from there): each token keeps 98 % of the memory and moves it by a tenth of the
# inner gradient.
INITIAL_FORGET_GATE = 0.98
_INITIAL_STEP_SIZE = 0.1
_NORM_EPSILON = 1e-6


def logit(probability: float) -> float:
    """Where a sigmoid gives this."""
    return math.log(probability / (1 - probability))


class TrellisState(NamedTuple):
    """What a Trellis layer carries from call to call; its size does not depend on how many tokens it has seen."""

    memory: MemoryState
    tail: Float[Tensor, "row lag feature"]
    """Queries and keys of the last tokens, for the causal convolution; 0 for an unobserved one."""

    def detach(self) -> TrellisState:
        """The same numbers without their history: gradients stop here."""
        return TrellisState(MemoryState(*(each.detach() for each in self.memory)), self.tail.detach())


def _operand_dtype(tokens: Tensor, wide: torch.dtype) -> torch.dtype:
    """What the memory is given besides its gates: bfloat16 under a GPU's autocast to it, whose kernels take it."""
    if tokens.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
        return torch.bfloat16
    return wide


class MemoryMixer(nn.Module):
    """What layers around the memory share: its settings, its first content, and the way to it and back."""

    def __init__(self, config: ModelConfig, *, implementation: Implementation = "auto") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_slots = config.num_heads, config.head_dim, config.num_slots
        self.write_activation = config.write_activation
        self.read_activation = config.read_activation
        self.write_epsilon = config.write_epsilon
        self.chunk_length = config.chunk_length
        self.second_order = config.second_order
        self.step_size_form = config.step_size_form
        self.output_activation = config.output_activation
        self.has_forget_gate = config.forget_gate
        self.implementation: Implementation = implementation
        self.initial_memory = (
            nn.Parameter(torch.randn(2, self.num_heads, self.num_slots, self.head_dim) / math.sqrt(self.head_dim))
            if config.initial_memory == "learned"
            else None
        )

    def run(
        self, inputs: Tokens, memory: MemoryState | None, *, final_state: bool = True
    ) -> tuple[Float[Tensor, "row token width"], MemoryState]:
        """What is read from the memory at every token, the heads side by side, and, if wanted, the memory after it."""
        output, memory = trellis_memory(
            **inputs._asdict(),
            initial_state=memory,
            write_activation=self.write_activation,
            read_activation=self.read_activation,
            write_epsilon=self.write_epsilon,
            chunk_length=self.chunk_length,
            second_order=self.second_order,
            final_state=final_state,
            implementation=self.implementation,
        )
        output = F.silu(output) if self.output_activation == "silu" else output
        return output.flatten(2), memory

    def _open_gates(
        self, gates: Float[Tensor, "row token gate"]
    ) -> tuple[Float[Tensor, "row token head"], Float[Tensor, "row token head"]]:
        """Log-forget and step size."""
        step = gates[..., -self.num_heads :]
        log_forget = F.logsigmoid(gates[..., : self.num_heads]) if self.has_forget_gate else torch.zeros_like(step)
        step_size = (1 + log_forget.exp()) * step.sigmoid() if self.step_size_form == "bounded" else F.softplus(step)
        return log_forget, step_size

    def _start_gates(self, gates: nn.Linear, forget_gates: Sequence[float], step_size: float) -> None:
        """Sets the bias such that training starts near these forget gates, one per head, and this step size."""
        for head, forget in enumerate(forget_gates):
            if self.step_size_form == "bounded":
                step = logit(step_size / (1 + (forget if self.has_forget_gate else 1)))
            else:
                step = math.log(math.expm1(step_size))
            with torch.no_grad():
                gates.bias[head - self.num_heads] = step
                if self.has_forget_gate:
                    gates.bias[head] = logit(forget)

    def _heads(self, features: Float[Tensor, "row token width"]) -> Float[Tensor, "row token head dim"]:
        return features.view(*features.shape[:-1], self.num_heads, -1)

    def _unit_heads(
        self, features: Float[Tensor, "row token width"], epsilon: float = _NORM_EPSILON
    ) -> Float[Tensor, "row token head dim"]:
        """The heads at unit length; with a larger epsilon short ones stay shorter."""
        heads = self._heads(features)
        return heads * (heads.square().sum(dim=-1, keepdim=True) + epsilon).rsqrt()

    def _initial_memory(self, num_rows: int) -> MemoryState | None:
        if self.initial_memory is None:
            return None
        key_memory, value_memory = self.initial_memory[:, None].expand(-1, num_rows, -1, -1, -1)
        return MemoryState(key_memory, value_memory)


class TrellisMixer(MemoryMixer):
    """Carries information from token to token in a memory of fixed size (Trellis, arXiv 2512.23852, eqs. 8, 13, 14).

    Query, key and value are linear in the token, L2-normalised per head; a short causal convolution precedes the
    normalisation of query and key. The target is linear; forget gate and step size are one number per token and head.
    With ``step_size_form='bounded'`` the step size is ``(1 + forget) * sigmoid(.)``, inside the limit at which a
    linear write stops contracting. Without a forget gate the memory decays only by being overwritten.
    """

    def __init__(self, config: ModelConfig, *, implementation: Implementation = "auto") -> None:
        super().__init__(config, implementation=implementation)
        width = config.width
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.target = nn.Linear(width, self.num_heads * self.num_slots, bias=False)
        self.gates = nn.Linear(width, (2 if config.forget_gate else 1) * self.num_heads)
        self.convolution = CausalConvolution(2 * width, config.conv_width)
        self._start_gates(self.gates, [INITIAL_FORGET_GATE] * self.num_heads, _INITIAL_STEP_SIZE)

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """Reads after writing, at every token; unobserved tokens read but neither write nor forget."""
        inputs, _ = self.project(tokens, observed)
        output, _ = self.run(inputs, self._initial_memory(tokens.shape[0]), final_state=False)
        return output.to(tokens.dtype)

    def carry(
        self,
        tokens: Float[Tensor, "row token width"],
        observed: Bool[Tensor, "row token"],
        state: TrellisState | None = None,
    ) -> tuple[Float[Tensor, "row token width"], TrellisState]:
        """The same after earlier tokens, and what to hand on to the next call; no state means no earlier tokens."""
        inputs, tail = self.project(tokens, observed, None if state is None else state.tail)
        output, memory = self.run(inputs, self._initial_memory(tokens.shape[0]) if state is None else state.memory)
        return output.to(tokens.dtype), TrellisState(memory, tail)

    def project(
        self,
        tokens: Float[Tensor, "row token width"],
        observed: Bool[Tensor, "row token"],
        tail: Float[Tensor, "row lag feature"] | None = None,
    ) -> tuple[Tokens, Float[Tensor, "row lag feature"]]:
        """What the tokens ask of the memory, write to it and do to it; and the convolution's next tail."""
        present = observed[..., None].to(tokens.dtype)
        features = self.query_key(tokens) * present
        mixed, tail = self.convolution.carry(features, self.convolution.start(features) if tail is None else tail)
        query, key = mixed.chunk(2, dim=-1)
        # Under autocast the projections come in half precision; norms and gates want float32's digits.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        narrow = _operand_dtype(tokens, dtype)
        log_forget, step_size = self._open_gates(self.gates(tokens).to(dtype))
        inputs = Tokens(
            query=self._unit_heads(query.to(dtype)).to(narrow),
            key=self._unit_heads(key.to(dtype)).to(narrow),
            value=self._unit_heads(self.value(tokens).to(dtype)).to(narrow),
            target=self._heads(self.target(tokens).to(narrow)),
            log_forget=log_forget * present,
            step_size=step_size * present,
        )
        return inputs, tail


class TrellisLayer(nn.Module):
    """A causal sequence layer with a bounded memory for any network, in the place of attention or a GRU.

    Every token writes to the memory and reads it (``TrellisMixer``); a linear map then joins the heads. There is no
    norm and no residual: put them around it as your network does. What it carries from call to call is returned, not
    kept, and is of the same size after any number of tokens, so a long sequence can be read piece by piece and a model
    decoded token by token: all give the numbers of a single call.

    Example:
        >>> layer = TrellisLayer(width=64, num_heads=4, num_slots=16)
        >>> tokens = torch.randn(8, 100, 64)
        >>> output, state = layer(tokens)
        >>> output.shape
        torch.Size([8, 100, 64])
        >>> first, state = layer(tokens[:, :60])
        >>> rest, state = layer(tokens[:, 60:], state=state)  # first and rest together are output

    Args:
        width: features per token, a multiple of ``num_heads``.
        num_heads: parallel memories.
        num_slots: rows of each memory.
        conv_width: tokens seen by the causal convolution on queries and keys; 1 switches it off.
        write_activation: phi in the write; ``identity`` gives the gated delta rule.
        read_activation: f between the key pass and the value pass.
        step_size_form: ``bounded`` keeps a linear write inside its stability limit; ``softplus`` lets it grow.
        initial_memory: what the memories hold before the first token, ``zero`` or ``learned``.
        write_epsilon: added inside the square root of the write's normalisation; ``ln_silu`` from a zero memory wants
            about 1.
        chunk_length: 1 is the exact recurrence. More freezes the inner gradient at the start of every chunk of this
            many tokens, counted from the first of a call: pieces must then be whole chunks to give a single call's
            numbers.
        implementation: how the memory is computed; it changes no number.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_slots: int = 16,
        *,
        conv_width: int = 4,
        write_activation: Activation = "silu",
        read_activation: ReadActivation = "ln_silu",
        step_size_form: Literal["bounded", "softplus"] = "bounded",
        initial_memory: Literal["zero", "learned"] = "zero",
        write_epsilon: float = 1e-6,
        chunk_length: int = 1,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        config = ModelConfig(
            width=width,
            num_heads=num_heads,
            num_slots=num_slots,
            conv_width=conv_width,
            write_activation=write_activation,
            read_activation=read_activation,
            step_size_form=step_size_form,
            initial_memory=initial_memory,
            write_epsilon=write_epsilon,
            chunk_length=chunk_length,
        )
        self.width = width
        self.mixer = TrellisMixer(config, implementation=implementation)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "batch token width"],
        observed: Bool[Tensor, "batch token"] | None = None,
        state: TrellisState | None = None,
    ) -> tuple[Float[Tensor, "batch token width"], TrellisState]:
        """Reads a sequence, or the next piece of one.

        Args:
            tokens: at least one per row.
            observed: True for tokens that are there; the others, such as padding, read the memory but leave no trace
                in it. All are unless given.
            state: what the call on the piece before returned; None before the first.

        Returns:
            What each token read after its write, and the state after the last token. Nothing passed in is modified.
            Gradients flow through the state: ``state.detach()`` stops them.

        Raises:
            ConfigError: the shapes do not fit.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.width or tokens.shape[1] == 0:
            raise ConfigError(
                f"tokens must be [batch, token, width={self.width}] with at least one token, found {list(tokens.shape)}"
            )
        if observed is None:
            observed = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        elif observed.shape != tokens.shape[:2]:
            raise ConfigError(f"observed must be {list(tokens.shape[:2])} like tokens, found {list(observed.shape)}")
        if state is not None and len(state.tail) != len(tokens):
            raise ConfigError(
                f"the state is that of {len(state.tail)} rows, tokens has {len(tokens)}; carry it for the same rows"
            )
        mixed, state = self.mixer.carry(tokens, observed, state)
        output: Tensor = self.output(mixed)
        return output, state
