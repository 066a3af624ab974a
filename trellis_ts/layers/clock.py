"""When it is, as the streaming model's queries and keys tell it: so that the memory can be asked what followed at this
hour of the day, of the week, or at this place in the season."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from trellis_ts.datasets.cycles import num_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float, Int
    from torch import Tensor

    from trellis_ts.config import Cycle

_MOST_WAVES = 8


class Clock:
    """The calendar's features, their products of day and week (which tell the hours of a week apart), and the season.

    Only distances between two places in the season count, so a season may be counted from anywhere.

    Args:
        cycles: what the model reads of the calendar.
        season_length: steps in a season; the longest waves, eight at most, tell where in it a step is.
    """

    def __init__(self, cycles: Sequence[Cycle], season_length: int) -> None:
        self.season_length = season_length
        self.num_waves = min(_MOST_WAVES, season_length // 2)
        self.num_calendar = num_features(cycles)
        pairs: list[tuple[int, int]] = []
        if "day" in cycles and "week" in cycles:
            of_day, of_week = self._columns(cycles, "day"), self._columns(cycles, "week")
            pairs = [(day, week) for day in of_day for week in of_week]
        self.factors = [day for day, _ in pairs], [week for _, week in pairs]
        """Columns of the calendar's features that are multiplied."""
        self.size = self.num_calendar + len(pairs) + 2 * self.num_waves

    def features(
        self, calendar: Float[Tensor, "*place feature"] | None, steps: Int[Tensor, "*place"], dtype: torch.dtype
    ) -> Float[Tensor, "*place clock"]:
        """Of places whose last step has these calendar features; ``steps`` are the steps after them, in the season."""
        # Places are multiplied as whole numbers, so that little precision will do.
        places = steps[..., None] * torch.arange(1, self.num_waves + 1, device=steps.device) % self.season_length
        angles = (2 * math.pi / self.season_length) * places.to(dtype)
        parts = [angles.sin(), angles.cos()]
        if self.num_calendar:
            if calendar is None:
                raise ValueError("this model reads the calendar")
            parts = [calendar, calendar[..., self.factors[0]] * calendar[..., self.factors[1]], *parts]
        return torch.cat(parts, dim=-1)

    @staticmethod
    def _columns(cycles: Sequence[Cycle], name: Cycle) -> range:
        at = num_features(cycles[: list(cycles).index(name)])
        return range(at, at + num_features((name,)))
