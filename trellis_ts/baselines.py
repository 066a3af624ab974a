"""Forecasts anyone can make without a model, to compare with.

Quantiles are those of a normal distribution around the point whose standard deviation grows with the step as Hyndman
and Athanasopoulos give it ("Forecasting: principles and practice", 3rd edition, section 5.5), from the residuals of
the context. A context without a residual gives no spread: all quantiles are the point.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

NAIVE_BASELINES = ("naive", "seasonal_naive", "drift")


def naive(
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    prediction_length: int,
    quantile_levels: Sequence[float] = (),
) -> Forecast:
    """Repeats the last observed value; 0 (the training mean) where nothing was observed.

    The standard deviation is ``s sqrt(h)``, with ``s`` the root mean square of the steps between neighbours and ``h``
    counted from the last observed value.
    """
    last, value = _last_observed(context, observed)
    deviation = _residual_deviation(context, observed, 1)
    steps = _steps_ahead(context.shape[1], last, prediction_length)
    return _with_quantiles(value.expand(-1, prediction_length, -1), deviation * steps.sqrt(), quantile_levels)


def drift(
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    prediction_length: int,
    quantile_levels: Sequence[float] = (),
) -> Forecast:
    """Goes on along the line from the first observed value of the context to the last one.

    The standard deviation is ``s sqrt(h (1 + h / (T - 1)))``, with ``s`` that of the steps between neighbours about the
    slope (one degree of freedom is the slope's), ``T`` the steps from the first to the last observed value inclusive
    and ``h`` counted from the last.
    """
    last, end = _last_observed(context, observed)
    reversed_last, beginning = _last_observed(context.flip(1), observed.flip(1))
    length = context.shape[1]
    span = last + reversed_last - length - 1  # steps from the first observed value to the last: T - 1
    slope = torch.where(span > 0, (end - beginning) / span.clamp(min=1), 0.0)
    deviation = _residual_deviation(context, observed, 1, slope, degrees=1)
    steps = _steps_ahead(length, last, prediction_length)
    growth = (steps * (1 + steps / span.clamp(min=1))).sqrt()
    return _with_quantiles(end + slope * steps, deviation * growth, quantile_levels)


def seasonal_naive(
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    season_length: int,
    prediction_length: int,
    quantile_levels: Sequence[float] = (),
) -> Forecast:
    """Repeats the last season; a step missing there is taken from the season before, and so on.

    A step never observed gets the last observed value, and 0 (the training mean) where nothing was observed. The
    standard deviation is ``s sqrt(k)``, with ``s`` the root mean square of the changes over one season and ``k`` how
    many seasons lie between the step and the value it repeats.
    """
    length = context.shape[1]
    season = _last_observed(context, observed)[1].repeat(1, season_length, 1)  # [B, S, C]; ends where the context ends
    age = torch.full_like(season, max(1, -(-length // season_length)))
    for start in range(length % season_length - season_length, length, season_length):
        first = max(start, 0)
        place = slice(first - start, season_length)
        window = slice(first, start + season_length)
        season[:, place] = torch.where(observed[:, window], context[:, window], season[:, place])
        age[:, place] = torch.where(observed[:, window], float((length - start) // season_length), age[:, place])
    repeats = -(-prediction_length // season_length)
    more = torch.arange(repeats, device=context.device).repeat_interleave(season_length)[None, :, None]
    deviation = _residual_deviation(context, observed, season_length)
    growth = (age.repeat(1, repeats, 1) + more).sqrt()
    return _with_quantiles(
        season.repeat(1, repeats, 1)[:, :prediction_length],
        (deviation * growth)[:, :prediction_length],
        quantile_levels,
    )


def naive_forecast(
    name: str,
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    *,
    season_length: int,
    prediction_length: int,
    quantile_levels: Sequence[float] = (),
) -> Forecast:
    """One of ``NAIVE_BASELINES`` by name."""
    if name == "seasonal_naive":
        return seasonal_naive(context, observed, season_length, prediction_length, quantile_levels)
    return {"naive": naive, "drift": drift}[name](context, observed, prediction_length, quantile_levels)


def _last_observed(
    context: Float[Tensor, "batch context channel"], observed: Bool[Tensor, "batch context channel"]
) -> tuple[Int[Tensor, "batch 1 channel"], Float[Tensor, "batch 1 channel"]]:
    """One more than the last observed step (0 for none), and the value there (0 for none)."""
    steps = torch.arange(1, context.shape[1] + 1, device=context.device)[:, None]
    last = (observed * steps).amax(dim=1, keepdim=True)
    return last, torch.where(last > 0, context.gather(1, (last - 1).clamp(min=0)), 0.0)


def _steps_ahead(
    length: int, last: Int[Tensor, "batch 1 channel"], prediction_length: int
) -> Int[Tensor, "batch horizon channel"]:
    """How far each future step lies from the last observed value; from the context's end where there is none."""
    ahead = torch.arange(1, prediction_length + 1, device=last.device)[None, :, None]
    return ahead + torch.where(last > 0, length - last, 0)


def _residual_deviation(
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    lag: int,
    slope: Float[Tensor, "batch 1 channel"] | float = 0.0,
    degrees: int = 0,
) -> Float[Tensor, "batch 1 channel"]:
    """Root of the mean squared ``y[t] - y[t - lag] - slope`` over the pairs observed; 0 where there is none."""
    if context.shape[1] <= lag:
        return torch.zeros_like(context[:, :1])
    known = observed[:, lag:] & observed[:, :-lag]
    residual = torch.where(known, context[:, lag:] - context[:, :-lag] - slope, 0.0)
    count = (known.sum(dim=1, keepdim=True) - degrees).clamp(min=1)
    return (residual.square().sum(dim=1, keepdim=True) / count).sqrt()


def _with_quantiles(
    point: Float[Tensor, "batch horizon channel"],
    deviation: Float[Tensor, "batch horizon channel"],
    quantile_levels: Sequence[float],
) -> Forecast:
    if not quantile_levels:
        return Forecast(point)
    normal = torch.tensor([NormalDist().inv_cdf(level) for level in quantile_levels], dtype=point.dtype)
    quantiles = point[..., None] + deviation[..., None] * normal.to(point.device)
    return Forecast(point, quantiles, tuple(quantile_levels))
