"""Stretches of series cut into segments that follow one another, for training with a state that is carried along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from trellis_ts.types import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Int
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.datasets.windows import ScaledPanel


@dataclass(frozen=True)
class SegmentShape:
    """Lengths of a segment: ``num_tokens`` patches, with what is read before and predicted after them."""

    history_length: int
    prediction_length: int
    patch_length: int
    num_tokens: int

    @property
    def steps(self) -> int:
        """From one segment of a stream to the next."""
        return self.num_tokens * self.patch_length


def gather_segment(
    panel: ScaledPanel,
    series: NDArray[np.int64],
    starts: NDArray[np.int64],
    offsets: Int[Tensor, "batch token"],
    shape: SegmentShape,
    *,
    stops: NDArray[np.int64] | None = None,
    scored: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    is_first: bool = True,
) -> Segment:
    """The segment of each series that starts at the given step of its own; it may begin before the series does.

    Args:
        panel: the scaled series.
        series: ``[batch]``, which series.
        starts: ``[batch]``, the first step of the first token.
        offsets: where the queries stand after their tokens.
        shape: lengths of the segment.
        stops: ``[batch]``, steps from here on are not read; the end of the series unless given.
        scored: ``[batch]`` first and last query, exclusive, counted as the first step predicted, whose future is to be
            scored; the segment comes with futures if it is given.
        is_first: whether the state starts anew.
    """
    reach = shape.steps + shape.patch_length - 1
    horizon = shape.prediction_length if scored is not None else 0
    batch = panel.gather(series, starts, shape.history_length, reach + horizon)
    if batch.future is None or batch.future_observed is None:
        raise AssertionError("a segment has steps")
    values = torch.cat((batch.context, batch.future), dim=1)
    observed = torch.cat((batch.observed, batch.future_observed), dim=1)
    steps = np.arange(-shape.history_length, reach + horizon)
    if stops is not None:
        observed &= torch.from_numpy(starts[:, None] + steps < stops[:, None])[..., None]
        values = values * observed
    length = shape.history_length
    segment = Segment(
        values=values[:, : length + reach],
        observed=observed[:, : length + reach],
        offsets=offsets,
        phase=batch.phase,
        calendar=None if batch.known is None else batch.known.values[:, length : length + reach],
        loc=batch.loc,
        scale=batch.scale,
        is_first=is_first,
        series=torch.from_numpy(series),
        origin=torch.from_numpy(starts),
    )
    if scored is None:
        return segment
    origins = torch.arange(1, shape.num_tokens + 1) * shape.patch_length + offsets  # [B, N], counted from the start
    index = (origins[..., None] + length + torch.arange(horizon)).flatten(1)[..., None].expand(-1, -1, values.shape[2])
    first, last = (torch.from_numpy(each - starts)[:, None] for each in scored)
    is_scored = ((origins >= first) & (origins < last)).flatten()[:, None, None]

    def cut(each: Tensor) -> Tensor:
        return each.gather(1, index).view(-1, horizon, values.shape[2])

    return segment._replace(future=cut(values), future_observed=cut(observed) & is_scored)


@dataclass(frozen=True, eq=False)
class Group:
    """Streams that are read side by side, segment after segment."""

    series: NDArray[np.int64]
    starts: NDArray[np.int64]
    num_segments: int
    seed: int
    """Of the queries' offsets."""
    max_offset: int
    """Offsets are below this."""


class SegmentDataset(Dataset[Segment]):
    """Groups of streams through the given rows of each series, drawn at random or all rows in order.

    Args:
        panel: the scaled series.
        ranges: half-open rows ``[start, stop)`` per series in which the futures lie.
        shape: lengths of the segments.
        stream_segments: segments over which the state is carried.
        batch_streams: streams side by side.
        max_forecasts: forecasts per pass at most; else one from every row.
    """

    def __init__(
        self,
        panel: ScaledPanel,
        ranges: Sequence[tuple[int, int]],
        shape: SegmentShape,
        *,
        stream_segments: int,
        batch_streams: int,
        max_forecasts: int | None = None,
    ) -> None:
        self.panel, self.shape = panel, shape
        self.batch_streams = batch_streams
        self._starts, self._stops = np.array(ranges, dtype=np.int64).reshape(-1, 2).T
        # What lies before rows that do not begin a series is read too, so a horizon of them is enough.
        least = shape.prediction_length + np.where(self._starts > 0, 0, shape.patch_length)
        rows = np.where(self._stops - self._starts >= least, self._stops - self._starts, 0)
        self._rows = rows
        self.num_forecasts = int(rows.sum()) if max_forecasts is None else min(int(rows.sum()), max_forecasts)
        longest = -(-int(rows.max(initial=0)) // shape.steps)
        self.stream_segments = max(1, min(stream_segments, longest))

    def __len__(self) -> int:
        """Forecasts of one pass."""
        return self.num_forecasts

    def random_groups(self, seed: int) -> list[Group]:
        """Streams that start anywhere, about as many as give every row one forecast."""
        generator = np.random.default_rng(seed)
        per_stream = self.stream_segments * self.shape.num_tokens
        num_groups = max(1, round(self.num_forecasts / (per_stream * self.batch_streams)))
        length = self.stream_segments * self.shape.steps
        groups = []
        for number in range(num_groups):
            series = generator.choice(len(self._rows), size=self.batch_streams, p=self._rows / self._rows.sum())
            room = np.maximum(self._rows[series] - length, 0)
            # A little before the first row, so that patches fall differently in short series too.
            early = generator.integers(0, self.shape.patch_length, size=len(series))
            starts = self._starts[series] + generator.integers(0, room + early + 1) - early
            seed_of_group = seed * 1_000_003 + number
            groups.append(Group(series, starts, self.stream_segments, seed_of_group, self.shape.patch_length))
        return groups

    def all_groups(self, max_forecasts: int | None = None) -> list[Group]:
        """Every series from a stream's length before its rows to their end, one forecast per patch.

        Where that gives more forecasts than wanted, series are chosen evenly, but one at least.
        """
        chosen = np.flatnonzero(self._rows)
        if max_forecasts is not None:
            share = max_forecasts * self.shape.patch_length / max(1, int(self._rows.sum()))
            num_streams = max(1, int(len(chosen) * min(1.0, share)))
            chosen = chosen[np.linspace(0, len(chosen) - 1, num_streams).round().astype(np.int64)]
        # A token ends where the rows begin, so that even of few rows one at least is predicted.
        patch = self.shape.patch_length
        warm = np.minimum(self.stream_segments * self.shape.steps, -(-self._starts[chosen] // patch) * patch)
        starts = self._starts[chosen] - warm
        order = np.argsort(starts - self._stops[chosen], kind="stable")  # longest first: groups of like length
        groups = []
        for at in range(0, len(chosen), self.batch_streams):
            index = order[at : at + self.batch_streams]
            longest = int((self._stops[chosen[index]] - starts[index]).max())
            fewest = int(self._rows[chosen[index]].min())
            num_segments = -(-longest // self.shape.steps)
            groups.append(Group(chosen[index], starts[index], num_segments, at, min(patch, fewest)))
        return groups

    def segment(self, group: Group, number: int) -> Segment:
        """One segment of a group, with its futures."""
        generator = torch.Generator().manual_seed(group.seed * 10_007 + number)
        offsets = torch.randint(group.max_offset, (len(group.series), self.shape.num_tokens), generator=generator)
        stops = self._stops[group.series]
        first = np.maximum(self._starts[group.series], 1)
        return gather_segment(
            self.panel,
            group.series,
            group.starts + number * self.shape.steps,
            offsets,
            self.shape,
            stops=stops,
            scored=(first, stops),
            is_first=number == 0,
        )

    def __getitem__(self, key: tuple[Group, int]) -> Segment:
        return self.segment(*key)
