"""What training minimises. Every loss is a mean over the values that were observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trellis_ts.distributions import PredictiveDistribution

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Loss
    from trellis_ts.types import Forecast


def quantile_loss(
    quantiles: Float[Tensor, "*shape quantile"], future: Float[Tensor, "*shape"], levels: Sequence[float]
) -> Float[Tensor, "*shape"]:
    """Pinball loss, doubled and averaged over the levels: at the single level 0.5 it is the absolute error."""
    level = torch.as_tensor(levels, dtype=quantiles.dtype, device=quantiles.device)
    error = future[..., None] - quantiles
    return 2 * torch.maximum(level * error, (level - 1) * error).mean(dim=-1)


def forecast_loss(
    forecast: Forecast,
    future: Float[Tensor, "batch horizon channel"],
    observed: Bool[Tensor, "batch horizon channel"],
    loss: Loss,
) -> Float[Tensor, ""]:
    """The mean loss over observed values; 0 where a batch has none."""
    if loss == "quantile":
        if forecast.quantiles is None:
            raise ValueError("the quantile loss needs a model with quantile levels")
        values = quantile_loss(forecast.quantiles, future, forecast.quantile_levels)
    elif loss == "mse":
        values = (forecast.point - future).square()
    elif loss == "mae":
        values = (forecast.point - future).abs()
    elif loss == "huber":
        values = torch.nn.functional.huber_loss(forecast.point, future, reduction="none")
    else:
        if not isinstance(forecast.distribution, PredictiveDistribution):
            raise ValueError(f"the loss {loss} needs a model that forecasts a distribution")
        values = -forecast.distribution.log_prob(future)
    return torch.where(observed, values, 0.0).sum() / observed.sum().clamp(min=1)
