"""Covariates as the model reads them: numbers on the training rows' scale, categories by the model's count, cycles."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.datasets import calendar
from trellis_ts.datasets.covariates import recode
from trellis_ts.datasets.cycles import num_features, positions, waves
from trellis_ts.types import Features

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Cycle
    from trellis_ts.datasets.covariates import CovariateScaler
    from trellis_ts.types import Covariate, Panel, Role

    Values = NDArray[np.float64]

# Stamps whose positions in the cycles are computed at once, for it takes ten times the memory of the result.
_STAMPS_AT_ONCE = 1 << 16


class StepFeatures:
    """The past or the known covariates of all series, read out of the panel when a window is gathered.

    Only where in each cycle of the calendar a row lies is stored, as a small whole number.

    Args:
        panel: the series.
        scaler: which covariates to read, their statistics and categories, and the cycles.
        role: past or known.
        future_length: steps after each series' last row that can be read too. Those for which the panel has no
            covariates are missing; the calendar goes on.
    """

    def __init__(self, panel: Panel, scaler: CovariateScaler, role: Role, future_length: int = 0) -> None:
        cycles = scaler.cycles if role == "known" else ()
        nothing = np.empty((0, 0))
        self._values = [_contiguous(getattr(series, role), nothing) for series in panel.series]
        self._stops = [len(series) + future_length for series in panel.series]
        self._coding = _Coding(panel, scaler.of_role(role), role)
        self._ends = np.cumsum(self._stops).tolist()
        self._positions = _positions(panel, cycles, future_length)
        self._waves, self._widths = _wave_table(cycles)
        self._num_features = len(self._coding.loc) + num_features(cycles)

    def gather(self, series: NDArray[np.int64], starts: NDArray[np.int64], num_steps: int) -> Features:
        """Windows of the given series and length, from the given rows of theirs on."""
        from trellis_ts.datasets.gathering import features_windows

        copy, coding = features_windows(), self._coding
        shape = (len(series), num_steps, self._num_features)
        window, observed = np.empty(shape, dtype=np.float32), np.empty(shape, dtype=bool)
        codes = np.empty((*shape[:2], len(coding.recoded)), dtype=np.int64)
        for index, places in places_by_series(series):
            stop = self._stops[index]
            copy(
                self._values[index],
                coding.number_columns,
                coding.loc,
                coding.scale,
                coding.category_columns,
                coding.recoded,
                self._positions[self._ends[index] - stop : self._ends[index]],
                self._waves,
                self._widths,
                stop,
                starts[places],
                places,
                window,
                observed,
                codes,
            )
        return Features(*map(torch.from_numpy, (window, observed, codes)))


def places_by_series(series: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each series of a batch, and where in the batch it is."""
    order = np.argsort(series, kind="stable")
    there = series[order]
    edges = [0, *(np.flatnonzero(there[1:] != there[:-1]) + 1).tolist(), len(order)]
    for start, stop in pairwise(edges if len(order) else ()):
        yield int(there[start]), order[start:stop]


def step_features(panel: Panel, scaler: CovariateScaler, role: Role, future_length: int = 0) -> StepFeatures | None:
    """The past or known covariates of a panel; None where there are none."""
    if not scaler.of_role(role) and not (role == "known" and scaler.cycles):
        return None
    return StepFeatures(panel, scaler, role, future_length)


def static_features(panel: Panel, scaler: CovariateScaler) -> Features | None:
    """The static attributes of all series, ``[series, feature]``; None where there are none."""
    covariates = scaler.of_role("static")
    if not covariates:
        return None
    values = np.stack([series.static for series in panel.series if series.static is not None])
    coding = _Coding(panel, covariates, "static")
    numbers = torch.from_numpy((values[:, coding.number_columns] - coding.loc) / coding.scale).float()
    picked = values[:, coding.category_columns]
    places = np.nan_to_num(picked).astype(np.int64)
    codes = np.where(np.isnan(picked), 0, coding.recoded[np.arange(len(coding.recoded)), places])
    observed = ~numbers.isnan()
    return Features(torch.where(observed, numbers, 0.0), observed, torch.from_numpy(codes))


class _Coding:
    """Where the covariates of a role are in a panel, and what makes of them what the model reads."""

    def __init__(self, panel: Panel, covariates: Sequence[Covariate], role: Role) -> None:
        there = panel.covariates(role)
        names = [each.name for each in there]
        numbers = [each for each in covariates if each.categories is None]
        categories = [each for each in covariates if each.categories is not None]
        self.number_columns = np.array([names.index(each.name) for each in numbers], dtype=np.int64)
        self.loc = np.array([each.loc for each in numbers], dtype=np.float64)
        self.scale = np.array([each.scale for each in numbers], dtype=np.float64)
        self.category_columns = np.array([names.index(each.name) for each in categories], dtype=np.int64)
        own = [there[column].categories or () for column in self.category_columns]
        # Categories counted from 1 in the scaler's order, with 0 for others; one of the panel's own is never out of it.
        self.recoded = np.zeros((len(categories), max([1, *map(len, own)])), dtype=np.int64)
        for row, (each, listed) in enumerate(zip(categories, own, strict=True)):
            codes = recode(np.arange(len(listed), dtype=np.float64), listed, each.categories or ())
            self.recoded[row, : len(listed)] = np.nan_to_num(codes + 1)


def _contiguous(values: Values | None, nothing: Values) -> Values:
    return nothing if values is None else np.ascontiguousarray(values)


def _positions(panel: Panel, cycles: Sequence[Cycle], future_length: int) -> NDArray[np.int16]:
    """Where in the table of waves each row is read, ``[row, cycle]``; the series, with their futures, end to end."""
    stamps = [each.time for each in panel.series]
    if not cycles:
        return np.empty((sum(map(len, stamps)) + len(stamps) * future_length, 0), dtype=np.int16)
    if future_length:
        last = np.array([each[-1] for each in stamps], dtype="datetime64[ns]")
        future = calendar.future_grid(last, panel.freq, future_length, panel.timezone)
        stamps = [part for pair in zip(stamps, future, strict=True) for part in pair]
    together = np.concatenate(stamps)
    found = np.empty((len(together), len(cycles)), dtype=np.int16)
    offsets = np.cumsum([0, *(len(waves(each)) for each in cycles)], dtype=np.int16)[:-1]
    for start in range(0, len(together), _STAMPS_AT_ONCE):
        rows = slice(start, start + _STAMPS_AT_ONCE)
        found[rows] = positions(together[rows], cycles, panel.timezone) + offsets
    return found


def _wave_table(cycles: Sequence[Cycle]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The waves of all cycles one below the other, and how wide those of each are."""
    tables = [waves(each) for each in cycles]
    widths = [table.shape[1] for table in tables]
    table = np.zeros((sum(map(len, tables)), max(widths, default=0)), dtype=np.float32)
    start = 0
    for each in tables:
        table[start : start + len(each), : each.shape[1]] = each
        start += len(each)
    return table, np.array(widths, dtype=np.int64)
