"""Forecasts and sample paths as frames, in the columns and the library of the caller's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import narwhals as nw
import numpy as np
import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import torch

from trellis_ts.datasets import calendar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray

    from trellis_ts.types import Forecast, Panel


def forecast_frame(
    panel: Panel, forecast: Forecast, *, id_name: str | None = None, time_name: str | None = None
) -> pd.DataFrame:
    """Forecasts as a long frame: series, stamp, ``forecast`` and one column per quantile (``q0.1``, ...).

    For a wide table the channels are the series. A long table with several targets gets a column ``channel`` as well.
    Stamps are wall-clock times, or aware ones where the panel has a time zone. The table's own columns keep their
    names; a column of ours whose name is taken among them gets underscores after it: ``forecast_``.

    Args:
        panel: the history that was forecast.
        forecast: ``[series, horizon, channel]`` in the units of the data.
        id_name: name of the first column; the table's own, or ``unique_id`` for a wide one, unless given. Several
            columns that name the series keep their own.
        time_name: name of the time column; the table's own unless given.
    """
    columns = _index_columns(panel, forecast.point.shape[1], id_name, time_name)
    taken = tuple(columns)
    names, values = ["forecast"], forecast.point[..., None]
    if forecast.quantiles is not None:
        names += [f"q{level:g}" for level in forecast.quantile_levels]
        values = torch.cat((values, forecast.quantiles), dim=-1)
    by_column = values.permute(3, 0, 2, 1).flatten(1).to(torch.float64, copy=True).numpy()
    columns |= zip([free_name(name, taken) for name in names], by_column, strict=True)
    return pd.DataFrame(columns, copy=False)


def _index_columns(panel: Panel, horizon: int, id_name: str | None, time_name: str | None) -> dict[str, Any]:
    """What the rows of a forecast are about: series, channel where there is a choice, and stamp."""
    channels = panel.num_channels
    last = np.array([each.time[-1] for each in panel.series], dtype="datetime64[ns]")
    stamps = calendar.future_grid(last, panel.freq, horizon, panel.timezone)
    of_channels = np.tile(np.repeat(np.array(panel.channels, dtype=object), horizon), len(panel.series))
    time_name, id_name = time_name or panel.columns.time, id_name or panel.columns.id
    columns: dict[str, Any] = {}
    if panel.is_wide:
        columns[id_name or free_name("unique_id", (time_name,))] = of_channels
    elif panel.columns.keys:
        for position, name in enumerate(panel.columns.keys):
            columns[name] = _repeated([each.key[position] for each in panel.series], channels * horizon)
    else:
        columns[id_name or ""] = _repeated([each.name for each in panel.series], channels * horizon)
    if not panel.is_wide and channels > 1:
        columns[free_name("channel", (*columns, time_name))] = of_channels
    columns[time_name] = _as_index(np.repeat(stamps[:, None], channels, axis=1).ravel(), panel)
    return columns


def _repeated(names: Sequence[str], times: int) -> NDArray[np.object_]:
    return np.repeat(np.array(names, dtype=object), times)


def free_name(name: str, taken: Sequence[str]) -> str:
    """A name that none of the table's own columns has: the name itself, or with underscores after it."""
    while name in taken:
        name += "_"
    return name


def as_library_of(native: Any, frame: pd.DataFrame) -> Any:
    """The frame as one of the library that another frame is of."""
    if isinstance(native, pd.DataFrame):
        return frame
    backend = nw.from_native(native, eager_only=True).implementation
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    return nw.from_arrow(table, backend=backend).to_native()


def sample_frame(
    panel: Panel,
    paths: Float[torch.Tensor, "sample series horizon channel"],
    *,
    id_name: str | None = None,
    time_name: str | None = None,
) -> pd.DataFrame:
    """Sample paths as a long frame: series, stamp, ``sample`` and ``value``, one path after the other.

    Args:
        panel: the history that was forecast.
        paths: in the units of the data.
        id_name: as for ``forecast_frame``.
        time_name: as for ``forecast_frame``.
    """
    num_samples, _, horizon, _ = paths.shape
    columns: dict[str, Any] = {}
    for name, values in _index_columns(panel, horizon, id_name, time_name).items():
        rows = np.arange(len(values)).reshape(-1, 1, horizon).repeat(num_samples, axis=1).ravel()
        columns[name] = values[rows]
    taken = tuple(columns)
    numbers = np.tile(np.repeat(np.arange(num_samples), horizon), len(rows) // (num_samples * horizon))
    columns[free_name("sample", taken)] = numbers
    columns[free_name("value", taken)] = paths.permute(1, 3, 0, 2).reshape(-1).double().numpy()
    return pd.DataFrame(columns)


def _as_index(stamps: NDArray[np.datetime64], panel: Panel) -> pd.DatetimeIndex:
    index = pd.DatetimeIndex(stamps)
    return index if panel.timezone is None else index.tz_localize("UTC").tz_convert(panel.timezone)
