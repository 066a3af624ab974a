"""What a reader of forecasts should know about the series they are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trellis_ts.checkpoints import Checkpoint
    from trellis_ts.types import Panel


@dataclass(frozen=True)
class SeriesDoubts:
    """How many series are not quite what a model was trained for."""

    context_length: int
    short: int = 0
    """Series shorter than the context."""
    new: int = 0
    """Series the model was not trained on."""
    unseen: int = 0
    """Series with a channel that has no value within the context."""

    @classmethod
    def of(cls, panel: Panel, checkpoint: Checkpoint) -> SeriesDoubts:
        """Counts them in a panel."""
        context_length = checkpoint.model.shape.context_length
        known = {each.name for each in checkpoint.data.series}
        recent = (series.values[-context_length:] for series in panel.series)
        return cls(
            context_length,
            short=sum(len(series) < context_length for series in panel.series),
            new=sum(series.name not in known for series in panel.series),
            unseen=sum(bool(np.isnan(values).all(axis=0).any()) for values in recent),
        )

    def __add__(self, other: SeriesDoubts) -> SeriesDoubts:
        return SeriesDoubts(
            self.context_length, self.short + other.short, self.new + other.new, self.unseen + other.unseen
        )

    def lines(self) -> list[str]:
        """They in words, one line for each kind there is."""
        steps = self.context_length
        kinds = (
            (self.short, f"series shorter than the context of {steps}; padded as unobserved"),
            (self.new, "series the model was not trained on; scaled by their own history"),
            (self.unseen, f"series have a channel without a value in the last {steps} steps"),
        )
        return [f"{number:,} {text}" for number, text in kinds if number]
