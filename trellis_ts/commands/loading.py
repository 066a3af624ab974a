"""What the commands that use a trained model have in common: loading it, and reading data for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trellis_ts.commands.console import read
from trellis_ts.commands.options import COLUMN_OPTIONS
from trellis_ts.devices import resolve_device
from trellis_ts.forecaster import Forecaster

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from trellis_ts.commands.console import Terminal
    from trellis_ts.types import Panel


def load_forecaster(model: str, device: str) -> Forecaster:
    """A model directory on a device named as on the command line."""
    return Forecaster.load(model, device=resolve_device(device))


def read_for(terminal: Terminal, forecaster: Forecaster, values: Namespace) -> Panel:
    """Reads ``values.data`` by the columns the model was trained on, but for those named otherwise."""
    record, settings = forecaster.checkpoint.data, forecaster.checkpoint.experiment.data
    trained = {
        "time": record.time_column,
        "target": record.channels,
        "id": record.id_column,
        "freq": record.freq,
        "day_first": settings.day_first,
    }
    columns = {name: trained[name] if values[name] is None else values[name] for name in COLUMN_OPTIONS}
    return read(terminal, values.data, columns)
