"""``trellis forecast``: what follows the last rows of a table."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.commands.console import Terminal, counted
from trellis_ts.commands.options import (
    Parser,
    add_calibration_option,
    add_column_options,
    add_device_option,
    add_engine_options,
    add_output_options,
    check_engine,
)
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file, check_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
    from jsonargparse import Namespace
    from numpy.typing import NDArray

    from trellis_ts.doubts import SeriesDoubts
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.plots import ForecastPicture
    from trellis_ts.types import Forecast, Panel

_PLOT_FORMATS = (".png", ".pdf", ".svg", ".jpg")
_TABLE_FORMATS = (".csv", ".csv.gz", ".parquet")
_FLOAT_FORMAT = "%.10g"
_LONGEST_HORIZON = 1 << 20


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "forecast",
        "MODEL DATA [--future FILE] [-o forecast.csv] [--plot forecast.png] ...",
        "Forecasts what follows the last rows of DATA: one row per series (per channel of a wide table) and future "
        "stamp, with the forecast and its quantiles. DATA may be larger than memory: of a folder of Parquet files, "
        "-o FOLDER/ takes one Parquet file per block of series, and the same command goes on where it was stopped.",
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    options.add_argument(
        "data",
        type=str,
        metavar="DATA",
        help="the history to go on from: path of a table, path or URL of a folder of Parquet files, or name of a data "
        "set",
    )
    options.add_argument(
        "-o",
        "--output",
        type=str,
        metavar="FILE",
        help="table to write (.csv, .csv.gz, .parquet), or folder or URL for Parquet files; else CSV to standard "
        "output",
    )
    options.add_argument("--overwrite", action="store_true", help="replace the forecasts in a folder, if there are any")
    options.add_argument(
        "--future",
        type=str,
        metavar="FILE",
        help="table with the known covariates over the horizon; else rows of DATA after the last value of the target",
    )
    options.add_argument("--plot", type=str, metavar="FILE", help="picture to draw (.png, .pdf, .svg, .jpg)")
    options.add_argument(
        "--prediction-length",
        type=int | None,
        default=None,
        metavar="N",
        help="steps to forecast (default: as trained)",
    )
    options.add_argument(
        "--quantile-levels",
        type=str,
        nargs="+",
        metavar="X",
        help="levels to forecast, such as 0.05,0.5,0.95 (default: as trained)",
    )
    options.add_argument(
        "--samples",
        type=int | None,
        default=None,
        metavar="N",
        help="write N possible futures per series instead, as columns sample and value",
    )
    options.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the samples (default: 0)")
    add_calibration_option(options)
    add_engine_options(options)
    add_device_option(options)
    add_output_options(options)
    add_column_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    to_folder = _writes_folder(values.output, values.data)
    check_engine(values, is_partitioned=to_folder)
    if to_folder:
        for option in ("future", "plot"):
            if values[option] is not None:
                raise ConfigError(
                    f"--{option} goes with a table, not with a folder of forecasts; "
                    + ("put what is known into rows of DATA" if option == "future" else "draw some series of a table")
                )
        from trellis_ts.commands.partitioned import forecast_folder

        terminal = Terminal(quiet=values.quiet, as_json=values.json)
        forecast_folder(terminal, values, levels_of(values.quantile_levels))
        return
    if values.overwrite:
        raise ConfigError("--overwrite is for a folder of forecasts; a table is replaced without it")
    output, plot = (None if value is None else Path(value) for value in (values.output, values.plot))
    for path, formats, option in ((output, _TABLE_FORMATS, "--output"), (plot, _PLOT_FORMATS, "--plot")):
        if path is not None:
            check_output(path, formats, option, values.data)
            if values.future is not None and _is_same(path, values.future):
                raise ConfigError(f"{option} {path} is the table of --future itself; choose another path")
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    forecast(terminal, values, output, plot)


def _writes_folder(output: str | None, data: str) -> bool:
    """Whether the forecasts of Parquet files are to become Parquet files."""
    if output is None or output.lower().endswith(_TABLE_FORMATS):
        return False
    from trellis_ts.datasets.sources import is_partitioned
    from trellis_ts.datasets.stores import is_url

    if is_partitioned(data):
        return is_url(output) or output.endswith("/") or Path(output).is_dir() or not Path(output).suffix
    return data.lower().endswith(".parquet") and (output.endswith("/") or Path(output).is_dir())


def _is_same(path: Path, table: str) -> bool:
    return path.exists() and Path(table).exists() and path.samefile(table)


def forecast(terminal: Terminal, values: Namespace, output: Path | None, plot: Path | None) -> None:
    """Forecasts, then writes the table and the picture."""
    from trellis_ts.commands.loading import load_forecaster, read_for
    from trellis_ts.doubts import SeriesDoubts
    from trellis_ts.frames import forecast_frame, sample_frame

    levels = levels_of(values.quantile_levels)
    forecaster = load_forecaster(values.model, values.device, calibrated=not values.no_calibration)
    panel = forecaster.check(read_for(terminal, forecaster, values))
    check_horizon(panel, values.prediction_length)
    if values.future is not None:
        panel = _with_future(terminal, forecaster, panel, values)
    result = forecaster.forecast(panel, prediction_length=values.prediction_length, quantile_levels=levels)
    doubts = SeriesDoubts.of(panel, forecaster.checkpoint)
    steps, has_quantiles = result.point.shape[1], result.quantiles is not None
    note_doubts(terminal, forecaster, doubts, steps=steps, has_quantiles=has_quantiles)
    id_name, time_name = index_names(values, forecaster, panel.columns.keys)
    if values.samples is None:
        frame = forecast_frame(panel, result, id_name=id_name, time_name=time_name)
    else:
        paths = forecaster.sample_paths(
            panel, num_samples=values.samples, seed=values.seed, prediction_length=values.prediction_length
        )
        frame = sample_frame(panel, paths, id_name=id_name, time_name=time_name)
    text = _with_stamps_as_text(frame, panel, time_name)
    with ExitStack() as files:  # both files are whole before either is put in place
        if output is not None:
            _write(frame, text, files.enter_context(atomic_file(output)))
        drawn = 0 if plot is None else _plot(panel, result, files.enter_context(atomic_file(plot)))
    if plot is not None and drawn < (count := len(panel.series) * panel.num_channels):
        terminal.note(f"note: {plot} shows the first {drawn} of {count} forecasts")
    _say(terminal, text, panel, output, plot, num_samples=values.samples)


def _with_future(terminal: Terminal, forecaster: Forecaster, panel: Panel, values: Namespace) -> Panel:
    """The panel with the known covariates of ``--future``."""
    from trellis_ts.datasets.covariates import unseen_categories
    from trellis_ts.datasets.readers import add_future

    record, settings = forecaster.checkpoint.data, forecaster.checkpoint.experiment.data
    before = unseen_categories(panel, record.covariates)
    steps = values.prediction_length or forecaster.prediction_length
    day_first = settings.day_first if values.day_first is None else values.day_first
    panel = add_future(panel, values.future, steps, day_first=day_first)
    for line in unseen_categories(panel, record.covariates):
        if line not in before:
            terminal.note(f"note: {values.future}: {line}")
    return panel


def index_names(values: Namespace, forecaster: Forecaster, keys: Sequence[str]) -> tuple[str, str]:
    """What the columns of series and stamps are called: as named here or in training, else by their usual names.

    Several columns ``keys`` that name the series keep theirs.
    """
    from trellis_ts.frames import free_name

    data = forecaster.checkpoint.experiment.data
    named = values.id or data.id
    time_name = values.time or data.time or free_name("ds", keys or (named or "",))
    return named or free_name("unique_id", [time_name]), time_name


def check_horizon(panel: Panel, prediction_length: int | None) -> None:
    """Refuses what would be computed for hours and then not be given a date."""
    from trellis_ts.datasets import calendar

    if prediction_length is not None and prediction_length > _LONGEST_HORIZON:
        raise ConfigError(f"prediction_length={prediction_length} must lie between 1 and {_LONGEST_HORIZON}")
    for series in panel.series:
        calendar.future_times(series.time[-1], panel.freq, max(1, prediction_length or 1), panel.timezone)


def levels_of(texts: list[str] | None) -> list[float] | None:
    """Levels given one by one or with commas between them."""
    if texts is None:
        return None
    parts = [part for text in texts for part in text.split(",") if part.strip()]
    try:
        levels = [float(part) for part in parts]
    except ValueError:
        raise ConfigError(f"--quantile-levels {' '.join(texts)}: expected numbers such as 0.05,0.5,0.95") from None
    if not levels:
        raise ConfigError("--quantile-levels is empty; give at least one level, such as 0.5")
    return levels


def _say(
    terminal: Terminal,
    text: pd.DataFrame,
    panel: Panel,
    output: Path | None,
    plot: Path | None,
    *,
    num_samples: int | None,
) -> None:
    """Where the forecast went, or the forecast itself."""
    if output is None and not terminal.as_json:
        text.to_csv(sys.stdout, index=False, float_format=_FLOAT_FORMAT)
        return
    data: dict[str, object] = {"rows": len(text), "output": str(output) if output else None}
    data["plot"] = str(plot) if plot else None
    if output is None:
        data["forecast"] = text.to_dict(orient="records")
    paths = num_samples or 1
    steps = len(text) // (len(panel.series) * panel.num_channels * paths)
    rows, series = counted(len(text), "row"), "1 series" if len(panel.series) == 1 else f"{len(panel.series):,} series"
    channels, each = counted(panel.num_channels, "channel"), f", {counted(paths, 'sample')}" if num_samples else ""
    terminal.result(f"wrote {rows} ({series}, {channels}{each}, {counted(steps, 'step')}) to {output}", data)


def note_doubts(
    terminal: Terminal, forecaster: Forecaster, doubts: SeriesDoubts, *, steps: int, has_quantiles: bool
) -> None:
    """Says what a reader of the forecast should know."""
    if steps > forecaster.prediction_length:
        terminal.note(
            f"note: {steps} steps are beyond the trained {forecaster.prediction_length}: forecasts were fed back as if "
            "observed, so later bands are too narrow"
        )
    if not has_quantiles:
        loss = forecaster.checkpoint.experiment.training.loss
        hint = (
            "--quantile-levels 0.1,0.9 adds calibrated bands"
            if forecaster.calibrated
            else "--loss quantile gives bands"
        )
        terminal.note(f"note: this model was trained with --loss {loss} and gives points only; {hint}")
    for line in doubts.lines():
        terminal.note(f"note: {line}")


def _with_stamps_as_text(frame: pd.DataFrame, panel: Panel, time_name: str) -> pd.DataFrame:
    from trellis_ts.datasets import calendar

    stamps: NDArray[np.datetime64] = frame[time_name].to_numpy("datetime64[ns]")
    return frame.assign(**{time_name: calendar.format_times(stamps, panel.freq, panel.timezone)})


def _write(frame: pd.DataFrame, text: pd.DataFrame, path: Path) -> None:
    if path.suffix.lower() == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        text.to_csv(path, index=False, float_format=_FLOAT_FORMAT)


def pictures(panel: Panel, result: Forecast) -> list[ForecastPicture]:
    """One picture per series and channel: the last few horizons of history and the forecast."""
    from trellis_ts.datasets import calendar
    from trellis_ts.plots import ForecastPicture

    horizon, channels = result.point.shape[1:]
    shown = max(5 * horizon, 48)
    found = []
    for index, series in enumerate(panel.series):
        time = calendar.future_times(series.time[-1], panel.freq, horizon, panel.timezone)
        for channel in range(channels):
            name = panel.channels[channel]
            band = inner = None
            if result.quantiles is not None and len(result.quantile_levels) > 1:
                edges = result.quantiles[index, :, channel].numpy()
                band = (edges[:, 0], edges[:, -1])
                if (pair := inner_levels(result.quantile_levels)) is not None:
                    inner = (edges[:, pair[0]], edges[:, pair[1]])
            title = name if panel.is_wide else series.name if channels == 1 else f"{series.name} · {name}"
            found.append(
                ForecastPicture(
                    title=title,
                    history_time=series.time[-shown:],
                    history=series.values[-shown:, channel],
                    time=time,
                    point=result.point[index, :, channel].numpy(),
                    band=band,
                    band_label=band_label(result.quantile_levels),
                    inner_band=inner,
                    inner_band_label=_inner_label(result.quantile_levels),
                )
            )
    return found


def band_label(levels: tuple[float, ...]) -> str:
    """What the band between the outermost levels is called in a legend."""
    if len(levels) < 2:
        return ""
    return f"{100 * (levels[-1] - levels[0]):.0f} % band ({levels[0]:g} to {levels[-1]:g})"


def inner_levels(levels: tuple[float, ...]) -> tuple[int, int] | None:
    """Positions of the inner band's edges: the pair of levels around the median whose band is nearest to 80 %, inside
    the outermost. None where there is no such pair."""
    pairs = [
        (low, high)
        for low in range(1, len(levels) - 1)
        for high in range(low + 1, len(levels) - 1)
        if abs(levels[low] + levels[high] - 1) < 1e-6
    ]
    return min(pairs, key=lambda pair: abs(levels[pair[1]] - levels[pair[0]] - 0.8), default=None)


def _inner_label(levels: tuple[float, ...]) -> str:
    pair = inner_levels(levels)
    return "" if pair is None else band_label((levels[pair[0]], levels[pair[1]]))


def _plot(panel: Panel, result: Forecast, path: Path) -> int:
    from trellis_ts.plots import plot_forecasts

    return plot_forecasts(pictures(panel, result), path)
