"""Covariates as the model reads them: numbers on the training rows' scale, categories by the model's count, cycles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from trellis_ts.datasets import calendar
from trellis_ts.datasets.covariates import recode
from trellis_ts.datasets.cycles import positions, waves
from trellis_ts.types import Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.datasets.covariates import CovariateScaler
    from trellis_ts.types import Covariate, Panel, Role, Series

    Values = NDArray[np.float64]


class FeatureTable:
    """Rows of covariates, stored once: numbers in float32 with NaN where missing, codes in int32, cycles as positions.

    The sines and cosines of the cycles are looked up when a window is gathered.
    """

    def __init__(self, numbers: Tensor, codes: Tensor, cycles: Tensor, tables: Sequence[Tensor] = ()) -> None:
        self.numbers, self.codes, self.cycles, self.tables = numbers, codes, cycles, tuple(tables)

    def gather(self, rows: NDArray[np.int64], inside: NDArray[np.bool_]) -> Features:
        """The features of the given rows; those not ``inside`` come out as missing.

        Args:
            rows: any shape; clamped to the rows there are.
            inside: the same shape.
        """
        index = torch.from_numpy(np.clip(rows, 0, len(self.numbers) - 1)).flatten()
        there = torch.from_numpy(inside).flatten()[:, None]
        # Selecting and embedding whole rows is several times faster than indexing.
        numbers, codes = self.numbers.index_select(0, index), self.codes.index_select(0, index)
        observed = ~numbers.isnan() & there
        parts = [torch.where(observed, numbers, 0.0)]
        if self.tables:
            places = self.cycles.index_select(0, index).int()
            parts += [F.embedding(places[:, column], table) for column, table in enumerate(self.tables)]
            num_waves = sum(table.shape[1] for table in self.tables)
            observed = torch.cat((observed, there.expand(-1, num_waves)), dim=1)
        values = torch.cat(parts, dim=1)
        if not inside.all():
            values, codes = values * there, codes * there
        return Features(*(each.view(*rows.shape, each.shape[1]) for each in (values, observed, codes.long())))


def step_features(panel: Panel, scaler: CovariateScaler, role: Role, future_length: int = 0) -> FeatureTable | None:
    """The past or known covariates of all series end to end, each with ``future_length`` steps after its last row.

    None where there are none. Steps for which the panel has no covariates are missing; the calendar goes on.
    """
    covariates = scaler.of_role(role)
    cycles = scaler.cycles if role == "known" else ()
    if not covariates and not cycles:
        return None
    columns = _columns(panel, covariates, role)
    lengths = [len(series) + future_length for series in panel.series]
    total = sum(lengths)
    is_number = [each.categories is None for each in covariates]
    numbers = torch.full((total, sum(is_number)), float("nan"))
    codes = torch.zeros(total, len(covariates) - sum(is_number), dtype=torch.int32)
    where = torch.zeros(total, len(cycles), dtype=torch.int16)
    start = 0
    for series, length in zip(panel.series, lengths, strict=True):
        values = getattr(series, role)
        if covariates:
            values = values[:length]
            rows = slice(start, start + len(values))
            numbers[rows], codes[rows] = _encode(panel, covariates, columns, role, values)
        if cycles:
            where[start : start + length] = torch.from_numpy(
                positions(_stamps(panel, series, future_length), cycles, panel.timezone)
            )
        start += length
    return FeatureTable(numbers, codes, where, [torch.from_numpy(waves(each)) for each in cycles])


def static_features(panel: Panel, scaler: CovariateScaler) -> FeatureTable | None:
    """One row of static attributes per series; None where there are none."""
    covariates = scaler.of_role("static")
    if not covariates:
        return None
    values = np.stack([series.static for series in panel.series if series.static is not None])
    numbers, codes = _encode(panel, covariates, _columns(panel, covariates, "static"), "static", values)
    return FeatureTable(numbers, codes, torch.zeros(len(values), 0, dtype=torch.int16))


def _stamps(panel: Panel, series: Series, future_length: int) -> NDArray[np.datetime64]:
    if not future_length:
        return series.time
    future = calendar.future_times(series.time[-1], panel.freq, future_length, panel.timezone)
    return np.concatenate((series.time, future))


def _columns(panel: Panel, covariates: Sequence[Covariate], role: Role) -> list[int]:
    """Where in the panel each covariate is."""
    names = [each.name for each in panel.covariates(role)]
    return [names.index(each.name) for each in covariates]


def _encode(
    panel: Panel, covariates: Sequence[Covariate], columns: Sequence[int], role: Role, values: Values
) -> tuple[Tensor, Tensor]:
    """Numbers standardised, and categories counted from 1 in the scaler's order with 0 for others."""
    numbers, codes = [np.empty((len(values), 0))], [np.zeros((len(values), 0), dtype=np.int64)]
    there = panel.covariates(role)
    for covariate, column in zip(covariates, columns, strict=True):
        one = values[:, column]
        if covariate.categories is None:
            numbers.append(((one - covariate.loc) / covariate.scale)[:, None])
        else:
            code = np.nan_to_num(recode(one, there[column].categories or (), covariate.categories) + 1)
            codes.append(code.astype(np.int64)[:, None])
    return torch.from_numpy(np.hstack(numbers)).float(), torch.from_numpy(np.hstack(codes)).int()
