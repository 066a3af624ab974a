"""The sums of a backtest, which those of other series can be added to, and the evaluation they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trellis_ts.scores import MODEL, Evaluation, ScoreSums, summaries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Scored:
    """Losses of a model (the first) and baselines on the windows of some series."""

    sums: dict[str, ScoreSums]
    items: tuple[tuple[str, str], ...]
    """Name of the series and of the channel, in the order of the sums."""
    num_windows: int
    num_series: int
    starts: NDArray[np.datetime64]
    """The different stamps that windows start at, in order; those of the sums' origins."""
    ends: NDArray[np.datetime64]
    """The last stamp of a horizon that begins at each of them."""
    prediction_length: int
    season_length: int
    step: int
    fallbacks: dict[str, int]

    @property
    def num_values(self) -> int:
        """Values scored."""
        return self.sums[MODEL].count

    @staticmethod
    def joined(parts: Sequence[Scored]) -> Scored:
        """The sums over the series of all parts, which hold different ones."""
        first = parts[0]
        starts, where = np.unique(np.concatenate([each.starts for each in parts]), return_index=True)
        places = [np.searchsorted(starts, each.starts) for each in parts]
        return Scored(
            sums={
                name: ScoreSums.joined([each.sums[name] for each in parts], places, len(starts)) for name in first.sums
            },
            items=tuple(item for each in parts for item in each.items),
            num_windows=sum(each.num_windows for each in parts),
            num_series=sum(each.num_series for each in parts),
            starts=starts,
            ends=np.concatenate([each.ends for each in parts])[where],
            prediction_length=first.prediction_length,
            season_length=first.season_length,
            step=first.step,
            fallbacks={name: sum(each.fallbacks[name] for each in parts) for name in first.fallbacks},
        )

    def evaluation(self, *, seed: int = 0) -> Evaluation:
        """Means, tests and intervals; ``seed`` is that of the bootstrap."""
        levels = self.sums[MODEL].levels
        return Evaluation(
            num_windows=self.num_windows,
            num_series=self.num_series,
            num_values=self.num_values,
            num_origins=len(self.starts),
            prediction_length=self.prediction_length,
            season_length=self.season_length,
            step=self.step,
            band=levels[-1] - levels[0] if len(levels) > 1 else None,
            items=self.items,
            **summaries(self.sums, overlap=most_overlapping(self.starts, self.ends), seed=seed),
            fallbacks=self.fallbacks,
        )


def most_overlapping(starts: NDArray[np.datetime64], ends: NDArray[np.datetime64]) -> int:
    """The most of the given origins that lie within one horizon; ``ends`` are the last stamps of theirs."""
    within = np.searchsorted(starts, ends, side="right") - np.arange(len(starts))
    return int(within.max(initial=1))
