"""What the commands that use a trained model have in common: loading it, and reading data for it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.console import noted, read
from trellis_ts.commands.options import COLUMN_OPTIONS
from trellis_ts.datasets.columns import MissingColumnError
from trellis_ts.datasets.covariates import covariate_options, unseen_categories
from trellis_ts.datasets.sources import load_data
from trellis_ts.devices import resolve_device
from trellis_ts.errors import DataError
from trellis_ts.forecaster import Forecaster

if TYPE_CHECKING:
    from collections.abc import Callable

    from jsonargparse import Namespace

    from trellis_ts.checkpoints import DataRecord
    from trellis_ts.commands.console import Terminal
    from trellis_ts.types import Panel


def load_forecaster(model: str, device: str, *, calibrated: bool = True) -> Forecaster:
    """A model directory on a device named as on the command line."""
    return Forecaster.load(model, device=resolve_device(device), calibrated=calibrated)


def read_for(terminal: Terminal, forecaster: Forecaster, values: Namespace) -> Panel:
    """Reads ``values.data`` by the columns the model was trained on, but for those named otherwise.

    Raises:
        DataError: the table cannot be read, or is not of the kind the model was trained on.
    """
    record, settings = forecaster.checkpoint.data, forecaster.checkpoint.experiment.data
    trained = {
        "time": record.time_column,
        "target": record.channels,
        "id": record.id_column,
        "freq": record.freq,
        "day_first": settings.day_first,
    }
    columns: dict[str, Any] = {name: trained[name] if values[name] is None else values[name] for name in COLUMN_OPTIONS}
    columns |= {**covariate_options(record.covariates), "regularize": settings.regularize}
    # Irregular stamps have no calendar of their own to compare with.
    is_freq_chosen = values.freq is not None or settings.freq is not None or settings.regularize
    try:
        if is_freq_chosen or not Path(values.data).is_file():
            panel = read(terminal, values.data, columns)
        else:
            panel = read_on_own_calendar(
                lambda freq: load_data(values.data, **{**columns, "freq": freq}), columns["freq"]
            )
            panel = noted(terminal, panel)
    except MissingColumnError as error:
        raise DataError(f"{error}; the model was trained on {spell_columns(record)}") from None
    for line in unseen_categories(panel, record.covariates):
        terminal.note(f"note: {panel.source}: {line}")
    return _renamed(terminal, panel, record)


def read_on_own_calendar(read: Callable[[str | None], Panel], freq: str) -> Panel:
    """Reads on the model's calendar, unless the table's own is coarser: daily rows lie on an hourly calendar too, and
    would be taken for hourly ones of which most are missing.

    Raises:
        DataError: it is coarser, or the table cannot be read.
    """
    own: Panel | None = None
    with suppress(DataError):  # too few rows to tell the calendar, or a mistake that is reported below
        own = read(None)
    if own is not None and own.freq == freq:
        return own
    panel = read(freq)
    if own is not None and sum(map(len, panel.series)) >= 2 * sum(map(len, own.series)):
        raise DataError(
            f"{panel.source}: the model was trained on steps of {panel.freq}, the data has steps of {own.freq}; "
            f"bring data of the same frequency, train on it, or insist with --freq {panel.freq}"
        )
    return panel


def spell_columns(record: DataRecord) -> str:
    """The columns of the training data, each with the option that names another."""
    names = [f"--time {record.time_column}"]
    if record.id_column is not None:
        names.append(f"--id {record.id_column}")
    names.append(f"--target {' '.join(record.channels[:12])}")
    if record.covariates:
        names.append(f"covariates {' '.join(each.name for each in record.covariates[:12])}")
    return ", ".join(names)


def _renamed(terminal: Terminal, panel: Panel, record: DataRecord) -> Panel:
    """Columns named with --target stand for those the model knows, in their order, where the names are others."""
    if set(panel.channels) == set(record.channels) or len(panel.channels) != len(record.channels):
        return panel
    pairs = [f"{new} for {old}" for new, old in zip(panel.channels, record.channels, strict=True) if new != old]
    terminal.note(f"note: {panel.source}: read {', '.join(pairs)}")
    return replace(panel, columns=replace(panel.columns, channels=record.channels))
