"""Forecasts of a streaming model at any rows of a table, from passes over its history."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.causal import CausalState
from trellis_ts.datasets import calendar
from trellis_ts.datasets.streams import SegmentShape, gather_segment
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.kernels import MemoryState
from trellis_ts.layers.causal import CausalLayerState
from trellis_ts.scaling import ScaleState
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.causal import CausalModel
    from trellis_ts.datasets.splits import Scaler
    from trellis_ts.types import Batch, Panel

# Tokens read in one go on the way to an origin; a power of two, and no forecast depends on it.
_TOKENS_PER_STRIDE = 64


class HistoryPass:
    """Forecasts series from the memory of all their rows before an origin.

    A call goes on where the last one of the same series stopped, so origins are best asked for in rising order; an
    earlier one starts the series anew. Nothing after an origin is read.

    Args:
        model: the network, in evaluation mode.
        panel: the series on the scale of the training rows.
        device: where the network is.
        after: a pass over shorter histories of the same series, to go on from.
    """

    def __init__(
        self, model: CausalModel, panel: ScaledPanel, device: torch.device, *, after: HistoryPass | None = None
    ) -> None:
        self.model, self.panel, self.device = model, panel, device
        self._kept: dict[int, tuple[int, CausalState]] = {} if after is None else after._kept

    def __call__(self, batch: Batch) -> Forecast:
        """For the windows of a batch; their contexts are not looked at."""
        if batch.origin is None:
            raise ValueError("a streaming model needs the windows' origins")
        return self.forecast(batch.series.cpu().numpy(), batch.origin.cpu().numpy())

    @torch.inference_mode()
    def forecast(self, series: NDArray[np.int64], origins: NDArray[np.int64]) -> Forecast:
        """Forecasts ``[batch, horizon, channel]`` from the given rows on, NaN where too few values lie before."""
        patch = self.model.shape.patch_length
        chosen, of_request = np.unique(series, return_inverse=True)
        tokens, offsets = origins // patch - 1, origins % patch  # the last sealed token, -1 for none, and what follows
        first, last = np.full(len(chosen), np.iinfo(np.int64).max), np.full(len(chosen), -1)
        np.minimum.at(first, of_request, tokens)
        np.maximum.at(last, of_request, tokens)
        state = self._advance(chosen, first)
        num_tokens = int((last - first).max()) + 1
        places = of_request * num_tokens + tokens - first[of_request]
        # Requests that fall on one place differ in their offsets: a pass for the first of each, another for the second.
        order = np.lexsort((offsets, places))
        rank = np.empty(len(order), dtype=np.int64)
        starts = np.flatnonzero(np.diff(places[order], prepend=-1))
        rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        pieces, where = [], []
        for number in range(int(rank.max()) + 1):
            index = np.flatnonzero(rank == number)
            asked = torch.zeros(len(chosen) * num_tokens, dtype=torch.int64)
            asked[places[index]] = torch.from_numpy(offsets[index])
            pieces.append(self._ask(chosen, first, asked.view(len(chosen), num_tokens), state, places[index]))
            where.append(index)
        back = torch.from_numpy(np.argsort(np.concatenate(where)))
        return Forecast.joined(pieces, dim=0).map(lambda each: each[back])

    def _ask(
        self,
        series: NDArray[np.int64],
        tokens: NDArray[np.int64],
        offsets: Tensor,
        state: CausalState,
        places: NDArray[np.int64],
    ) -> Forecast:
        forecast, is_started, _ = self._run(series, tokens, offsets, state)
        index = torch.from_numpy(places).to(self.device)

        def take(each: Tensor) -> Tensor:
            known = is_started[index][:, None]
            picked = each[index]
            mask = known.view(*known.shape, *([1] * (picked.ndim - 3)))
            return torch.where(mask, picked, torch.nan).cpu()

        return forecast.map(take)

    def _run(
        self, series: NDArray[np.int64], tokens: NDArray[np.int64], offsets: Tensor, state: CausalState
    ) -> tuple[Forecast, Tensor, CausalState]:
        """One segment of each series from the given token on."""
        shape = self.model.shape
        lengths = SegmentShape(shape.history_length, shape.prediction_length, shape.patch_length, offsets.shape[1])
        segment = gather_segment(self.panel, series, tokens * shape.patch_length, offsets, lengths)
        found: tuple[Forecast, Tensor, CausalState] = self.model(segment.to(self.device), state)
        return found

    def _advance(self, series: NDArray[np.int64], first: NDArray[np.int64]) -> CausalState:
        """The state of each series before the given token, which is kept for the next call."""
        new = self.model.start(1)
        reached = np.array([self._kept.get(int(each), (-1, new))[0] for each in series])
        reached = np.where(reached > first, -1, reached)
        state = _joined([new if at < 0 else self._kept[int(each)][1] for each, at in zip(series, reached, strict=True)])
        stride = _TOKENS_PER_STRIDE
        while stride:
            # Whole strides, then half ones and so on: series of any length go side by side, each exactly to its token.
            while len(index := np.flatnonzero(first - reached >= stride)):
                offsets = torch.zeros(len(index), stride, dtype=torch.int64)
                rows = self._rows_of(index)
                _, _, moved = self._run(series[index], reached[index], offsets, _selected(state, rows))
                state = _replaced(state, moved, rows)
                reached[index] += stride
            stride //= 2
        for position, each in enumerate(series):
            rows = self._rows_of(np.array([position]))
            self._kept[int(each)] = (int(first[position]), _selected(state, rows))
        return state

    def _rows_of(self, index: NDArray[np.int64]) -> Tensor:
        channels = self.model.shape.num_channels
        return torch.from_numpy((index[:, None] * channels + np.arange(channels)).ravel()).to(self.device)


def roll_out(model: CausalModel, panel: Panel, scaler: Scaler, horizon: int, device: torch.device) -> Forecast:
    """Forecasts each series from its end on the scale of the scaler, as far as asked: past the trained horizon, point
    forecasts are read as if observed."""
    season, trained = model.shape.season_length, model.shape.prediction_length
    loc, scale = scaler.loc[:, None], scaler.scale[:, None]
    passed: HistoryPass | None = None
    forecasts: list[Forecast] = []
    while len(forecasts) * trained < horizon:
        if forecasts:
            ahead = forecasts[-1].point.double().numpy() * scale + loc
            panel = _continued(panel, ahead)
        scaled = ScaledPanel(panel, scaler, season)
        passed = HistoryPass(model, scaled, device, after=passed)
        ends = np.array([len(each) for each in panel.series], dtype=np.int64)
        forecasts.append(passed.forecast(np.arange(len(ends)), ends))
    return Forecast.joined(forecasts, dim=1).map(lambda each: each[:, :horizon])


def _continued(panel: Panel, values: NDArray[np.float64]) -> Panel:
    """The panel with more rows at the end of each series."""
    series = []
    for each, more in zip(panel.series, values, strict=True):
        stamps = calendar.future_times(each.time[-1], panel.freq, len(more), panel.timezone)
        time = np.concatenate((each.time, stamps))
        series.append(replace(each, time=time, values=np.concatenate((each.values, more))))
    return replace(panel, series=tuple(series))


def _tensors(state: CausalState) -> list[Tensor]:
    flat = [each for layer in state.layers for each in (*layer.memory, layer.waiting)]
    return [*flat, *state.scale]


def _of_tensors(flat: Sequence[Tensor]) -> CausalState:
    layers = tuple(CausalLayerState(MemoryState(*flat[at : at + 2]), flat[at + 2]) for at in range(0, len(flat) - 3, 3))
    return CausalState(layers, ScaleState(*flat[-3:]))


def _selected(state: CausalState, rows: Tensor) -> CausalState:
    return _of_tensors([each[rows] for each in _tensors(state)])


def _joined(states: Sequence[CausalState]) -> CausalState:
    return _of_tensors([torch.cat(parts) for parts in zip(*map(_tensors, states), strict=True)])


def _replaced(state: CausalState, part: CausalState, rows: Tensor) -> CausalState:
    return _of_tensors(
        [whole.index_copy(0, rows, new) for whole, new in zip(_tensors(state), _tensors(part), strict=True)]
    )
