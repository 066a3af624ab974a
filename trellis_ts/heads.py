"""From tokens to the forecast: points, or quantiles that cannot cross."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor


def center_index(quantile_levels: Sequence[float]) -> int:
    """Position of the level nearest to the median."""
    return min(range(len(quantile_levels)), key=lambda index: abs(quantile_levels[index] - 0.5))


def spread_quantiles(raw: Float[Tensor, "*row quantile"], center: int) -> Float[Tensor, "*row quantile"]:
    """Turns free numbers into rising ones: the ``center`` stays, the others are steps away from it.

    Each step is a softplus, hence positive, and steps add up outwards, so no two quantiles can cross.
    """
    steps = F.softplus(raw)
    middle = raw[..., center : center + 1]
    above = middle + steps[..., center + 1 :].cumsum(dim=-1)
    below = middle - steps[..., :center].flip(-1).cumsum(dim=-1).flip(-1)
    return torch.cat((below, middle, above), dim=-1)


class ForecastHead(nn.Module):
    """Pools the tokens of each row and maps them to ``num_outputs`` numbers per future step."""

    def __init__(
        self,
        *,
        num_patches: int,
        width: int,
        prediction_length: int,
        num_outputs: int,
        pooling: Literal["flatten", "last", "mean"],
        dropout: float,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.num_outputs = num_outputs
        self.prediction_length = prediction_length
        self.norm = nn.RMSNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(
            width * (num_patches if pooling == "flatten" else 1), prediction_length * num_outputs
        )

    def forward(
        self, tokens: Float[Tensor, "row patch width"], observed: Bool[Tensor, "row patch"]
    ) -> Float[Tensor, "row horizon output"]:
        tokens = self.norm(tokens)
        if self.pooling == "flatten":
            pooled = tokens.flatten(1)
        elif self.pooling == "last":
            pooled = tokens[:, -1]
        else:
            weight = observed.to(tokens.dtype)[..., None]
            pooled = (tokens * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        projected: Tensor = self.projection(self.dropout(pooled))
        return projected.view(-1, self.prediction_length, self.num_outputs)
