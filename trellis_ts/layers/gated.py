"""Recurrent mixers in the place of the Trellis mixer, for comparison in the same shell and of about its size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from trellis_ts.layers.convolution import CausalConvolution
from trellis_ts.layers.recurrences import gated_linear_attention, gated_slot_attention
from trellis_ts.layers.trellis import INITIAL_FORGET_GATE, logit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import ModelConfig

# Slots take the 8th root of their gates, which opens them (arXiv 2409.07146): they start near 0.92.
_DAMPING = 8.0


class _GatedMixer(nn.Module):
    """Query and key are ``silu`` of a short causal convolution of a linear map, value and gates linear in the token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key = nn.Linear(config.width, 2 * config.width, bias=False)
        self.value = nn.Linear(config.width, config.width, bias=False)
        self.convolution = CausalConvolution(2 * config.width, config.conv_width)

    def _project(
        self, tokens: Float[Tensor, "row token width"], present: Float[Tensor, "row token 1"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key (0 where unobserved) and value per head, the query over the root of its width."""
        query, key = F.silu(self.convolution(self.query_key(tokens) * present)).chunk(2, dim=-1)
        query, key, value = (self._heads(part) for part in (query, key * present, self.value(tokens)))
        return query / math.sqrt(query.shape[-1]), key, value

    def _heads(self, features: Float[Tensor, "row token width"]) -> Float[Tensor, "row head token dim"]:
        """In single precision at least, which decays need: under autocast the projections come in half."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        return features.to(dtype).view(*features.shape[:2], self.num_heads, -1).transpose(1, 2)


class LinearMixer(_GatedMixer):
    """Gated linear attention: a matrix per head that decays by one learned number per token, as in Mamba-2.

    Without a forget gate nothing decays, which is linear attention.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gate = nn.Linear(config.width, config.num_heads) if config.forget_gate else None
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, logit(INITIAL_FORGET_GATE))

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """Reads after writing, at every token; unobserved tokens read but neither write nor forget."""
        present = observed[..., None].to(tokens.dtype)
        query, key, value = self._project(tokens, present)
        log_forget = torch.zeros_like(query[..., 0])
        if self.gate is not None:
            log_forget = F.logsigmoid(self._heads(self.gate(tokens))[..., 0]) * present.mT
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = gated_linear_attention(query, key, value, log_forget)
        return mixed.transpose(1, 2).flatten(2).to(tokens.dtype)


class SlotMixer(_GatedMixer):
    """Gated slot attention: what is read from ``num_slots`` slots is weighed by a softmax; each has its own gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gates = nn.Linear(config.width, config.num_heads * config.num_slots)

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        """Reads after writing, at every token; unobserved tokens read but neither write nor forget."""
        present = observed[..., None].to(tokens.dtype)
        query, key, value = self._project(tokens, present)
        log_forget = F.logsigmoid(self._heads(self.gates(tokens))) / _DAMPING * present[:, None]
        with torch.autocast(tokens.device.type, enabled=False):
            mixed = gated_slot_attention(query, key, value, log_forget)
        return mixed.transpose(1, 2).flatten(2).to(tokens.dtype)
