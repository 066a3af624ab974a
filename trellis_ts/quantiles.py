"""A distribution known by some of its quantiles: every other level lies between them, or on a normal tail."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float
    from torch import Tensor

# Normal scores are kept inside +-8, beyond which a level cannot be told from 0 or 1 in floating point anyway.
_LARGEST_SCORE = 8.0
# Counts read off an interpolated curve are rounded up; this much of a count is rounding of the arithmetic.
_COUNT_TOLERANCE = 1e-3


def normal_score(level: Tensor) -> Tensor:
    """Where the standard normal distribution reaches the level, inside +-8."""
    score: Tensor = torch.special.ndtri(level.double())
    return score.clamp(-_LARGEST_SCORE, _LARGEST_SCORE)


def rising(quantiles: Float[Tensor, "*shape quantile"], center: int) -> Float[Tensor, "*shape quantile"]:
    """The same without crossings: each quantile moved outwards, away from the one at ``center``, where it must be."""
    # Column by column: torch's cummin along a short last axis takes ten times as long.
    columns = list(quantiles.unbind(-1))
    for index in range(center - 1, -1, -1):
        columns[index] = torch.minimum(columns[index], columns[index + 1])
    for index in range(center + 1, len(columns)):
        columns[index] = torch.maximum(columns[index], columns[index - 1])
    return torch.stack(columns, dim=-1)


@dataclass(frozen=True, eq=False)
class QuantileCurve:
    """Quantiles at a few levels, ``values`` being ``[..., level]`` and rising, read as a whole distribution.

    Between two levels the quantile is linear in the level's normal score, which is exact for a normal distribution,
    monotone, and passes through what is known. Beyond the outermost level the line through the outermost two goes on:
    a normal tail. Data with heavier tails are therefore covered too narrowly out there; levels that matter are better
    among those known. ``is_count`` rounds what is read off up to whole numbers from 0 on.
    """

    levels: tuple[float, ...]
    values: Float[Tensor, "*shape quantile"]
    is_count: bool = False

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise ValueError(f"one quantile level ({self.levels}) says nothing of the others; give two or more")

    def quantile(self, level: Tensor) -> Tensor:
        """The quantile at a level for each element; ``level`` is broadcast against ``[...]``, extra axes in front."""
        level = level.to(self.values.device)
        shape = torch.broadcast_shapes(level.shape, self.values.shape[:-1])  # type: ignore[no-untyped-call]
        score = normal_score(level)
        knots = self._knots()
        upper = torch.searchsorted(knots, score).clamp(1, len(knots) - 1)
        weight = ((score - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).to(self.values.dtype)
        values, upper = self.values.expand(*shape, -1), upper.expand(shape)[..., None]
        left = values.gather(-1, upper - 1)[..., 0]
        right = values.gather(-1, upper)[..., 0]
        weight = weight.expand(shape)
        # Written so that a known level gives what is known, to the last bit.
        result = torch.where(weight == 1, right, left + (right - left) * weight)
        # Adding 0 takes the sign off a zero.
        return (result - _COUNT_TOLERANCE).ceil().clamp(min=0.0) + 0.0 if self.is_count else result

    def cdf(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The level at which each value lies: the inverse of ``quantile``."""
        knots = self._knots()
        upper = (self.values <= value[..., None]).sum(dim=-1).clamp(1, len(knots) - 1)
        values = self.values.double()
        left = values.gather(-1, upper[..., None] - 1)[..., 0]
        width = (values.gather(-1, upper[..., None])[..., 0] - left).clamp(min=1e-12)
        score = knots[upper - 1] + (value - left) / width * (knots[upper] - knots[upper - 1])
        level: Tensor = torch.special.ndtr(score.clamp(-_LARGEST_SCORE, _LARGEST_SCORE))
        return level

    def affine(self, loc: Tensor, scale: Tensor) -> QuantileCurve:
        """Of ``loc + scale`` times the quantity; ``scale`` is positive."""
        return replace(self, values=self.values * scale[..., None] + loc[..., None])

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantileCurve:
        """The same with a function applied to the tensors; it must leave the last axis alone."""
        return replace(self, values=function(self.values))

    def joined(self, others: Sequence[QuantileCurve], dim: int) -> QuantileCurve:
        """This one and others of the same levels, one after the other along an axis counted from the front."""
        return replace(self, values=torch.cat([self.values, *(each.values for each in others)], dim=dim))

    def _knots(self) -> Tensor:
        return normal_score(torch.tensor(self.levels, dtype=torch.float64, device=self.values.device))


def central_bands(levels: Sequence[float]) -> dict[float, tuple[int, int]]:
    """Nominal coverage of every band between two levels that lie symmetrically, rising, with their positions."""
    mirrored = {round(1 - level, 9): index for index, level in enumerate(levels)}
    return {
        round(1 - 2 * level, 9): (index, mirrored[round(level, 9)])
        for index, level in reversed(list(enumerate(levels)))
        if level < 0.5 and round(level, 9) in mirrored
    }
