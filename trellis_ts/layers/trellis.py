"""The Trellis mixer: projections, gates and normalisation around the memory operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from trellis_ts.kernels import MemoryState, trellis_memory
from trellis_ts.layers.convolution import CausalConvolution

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig

# Where training starts (trained from there): each token keeps 98 % of the memory and moves it by a tenth of the
# inner gradient.
_INITIAL_FORGET_GATE = 0.98
_INITIAL_STEP_SIZE = 0.1
_NORM_EPSILON = 1e-6


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


class TrellisMixer(nn.Module):
    """Carries information from token to token in a memory of fixed size (Trellis, arXiv 2512.23852, eqs. 8, 13, 14).

    Query, key and value are linear in the token, L2-normalised per head; a short causal convolution precedes the
    normalisation of query and key. The target is linear; forget gate and step size are one number per token and head.
    With ``step_size_form='bounded'`` the step size is ``(1 + forget) * sigmoid(.)``, inside the limit at which a
    linear write stops contracting.
    """

    def __init__(self, config: ModelConfig, *, implementation: Implementation = "auto") -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_slots = config.num_heads, config.head_dim, config.num_slots
        self.write_activation = config.write_activation
        self.read_activation = config.read_activation
        self.write_epsilon = config.write_epsilon
        self.chunk_length = config.chunk_length
        self.second_order = config.second_order
        self.step_size_form = config.step_size_form
        self.implementation: Implementation = implementation

        width = config.width
        self.query_key = nn.Linear(width, 2 * width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.target = nn.Linear(width, self.num_heads * self.num_slots, bias=False)
        self.gates = nn.Linear(width, 2 * self.num_heads)
        self.convolution = CausalConvolution(2 * width, config.conv_width)
        self.initial_memory = (
            nn.Parameter(torch.randn(2, self.num_heads, self.num_slots, self.head_dim) / math.sqrt(self.head_dim))
            if config.initial_memory == "learned"
            else None
        )
        self._start_gates()

    def _start_gates(self) -> None:
        if self.step_size_form == "bounded":
            step = _logit(_INITIAL_STEP_SIZE / (1 + _INITIAL_FORGET_GATE))
        else:
            step = math.log(math.expm1(_INITIAL_STEP_SIZE))
        with torch.no_grad():
            self.gates.bias[: self.num_heads] = _logit(_INITIAL_FORGET_GATE)
            self.gates.bias[self.num_heads :] = step

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """Reads after writing, at every token; unobserved tokens read but neither write nor forget."""
        present = observed[..., None].to(tokens.dtype)
        query, key = self.convolution(self.query_key(tokens) * present).chunk(2, dim=-1)
        # Under autocast the projections come in half precision; the operator wants one dtype, and gates its range.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        forget, step = self.gates(tokens).to(dtype).chunk(2, dim=-1)  # [R, N, H] each
        log_forget = F.logsigmoid(forget)
        step_size = (1 + log_forget.exp()) * step.sigmoid() if self.step_size_form == "bounded" else F.softplus(step)
        output, _ = trellis_memory(
            query=self._unit_heads(query.to(dtype)),
            key=self._unit_heads(key.to(dtype)),
            value=self._unit_heads(self.value(tokens).to(dtype)),
            target=self._heads(self.target(tokens).to(dtype)),
            log_forget=log_forget * present,
            step_size=step_size * present,
            initial_state=self._initial_state(len(tokens)),
            write_activation=self.write_activation,
            read_activation=self.read_activation,
            write_epsilon=self.write_epsilon,
            chunk_length=self.chunk_length,
            second_order=self.second_order,
            implementation=self.implementation,
        )
        return output.flatten(2).to(tokens.dtype)

    def _heads(self, features: Float[Tensor, "row token width"]) -> Float[Tensor, "row token head dim"]:
        return features.view(*features.shape[:-1], self.num_heads, -1)

    def _unit_heads(self, features: Float[Tensor, "row token width"]) -> Float[Tensor, "row token head dim"]:
        heads = self._heads(features)
        return heads * (heads.square().sum(dim=-1, keepdim=True) + _NORM_EPSILON).rsqrt()

    def _initial_state(self, num_rows: int) -> MemoryState | None:
        if self.initial_memory is None:
            return None
        key_memory, value_memory = self.initial_memory[:, None].expand(-1, num_rows, -1, -1, -1)
        return MemoryState(key_memory, value_memory)
