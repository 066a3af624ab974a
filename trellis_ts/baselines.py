"""Forecasts anyone can make without a model, to compare with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def seasonal_naive(
    context: Float[Tensor, "batch context channel"],
    observed: Bool[Tensor, "batch context channel"],
    season_length: int,
    prediction_length: int,
) -> Float[Tensor, "batch horizon channel"]:
    """Repeats the last season; a step missing there is taken from the season before, and so on.

    A step never observed gets the last observed value, and 0 (the training mean) where nothing was observed.
    """
    length = context.shape[1]
    steps = torch.arange(1, length + 1, device=context.device)[:, None]
    last = (observed * steps).amax(dim=1, keepdim=True)  # [B, 1, C]: 1 + the last observed step, 0 for none
    latest = torch.where(last > 0, context.gather(1, (last - 1).clamp(min=0)), 0.0)
    season = latest.repeat(1, season_length, 1)  # [B, S, C]; its last step is the last of the context
    for start in range(length % season_length - season_length, length, season_length):
        first = max(start, 0)
        place = slice(first - start, season_length)
        window = slice(first, start + season_length)
        season[:, place] = torch.where(observed[:, window], context[:, window], season[:, place])
    repeats = -(-prediction_length // season_length)
    return season.repeat(1, repeats, 1)[:, :prediction_length]
