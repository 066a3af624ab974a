"""``trellis forecast``: what follows the last rows of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.commands.console import Terminal
from trellis_ts.commands.options import Parser, add_column_options, add_output_options
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file, check_writable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from jsonargparse import Namespace
    from numpy.typing import NDArray

    from trellis_ts.forecaster import Forecaster
    from trellis_ts.plots import ForecastPicture
    from trellis_ts.types import Forecast, Panel

_PLOT_FORMATS = (".png", ".pdf", ".svg", ".jpg")
_TABLE_FORMATS = (".csv", ".gz", ".parquet")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "forecast",
        "Forecasts what follows the last rows of DATA: one row per series (per channel of a wide table) and future "
        "stamp, with the forecast and its quantiles.",
    )
    options.add_argument("model", type=str, help="model directory written by `trellis train`")
    options.add_argument("data", type=str, help="path of a table, or name of a data set: the history to go on from")
    options.add_argument(
        "-o",
        "--output",
        type=str,
        default=None,
        help="table to write (.csv, .csv.gz, .parquet); else CSV to standard output",
    )
    options.add_argument("--plot", type=str, default=None, help="picture to draw (.png, .pdf, .svg)")
    options.add_argument(
        "--prediction-length", type=int | None, default=None, help="steps to forecast (default: as trained)"
    )
    options.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add_output_options(options)
    add_column_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    output, plot = (Path(value) if value else None for value in (values.output, values.plot))
    for path, formats, what in ((output, _TABLE_FORMATS, "--output"), (plot, _PLOT_FORMATS, "--plot")):
        if path is not None:
            if path.suffix.lower() not in formats:
                raise ConfigError(f"{what} {path}: unknown ending; use one of {', '.join(formats)}")
            check_writable(path)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    forecast(terminal, values, output, plot)


def forecast(terminal: Terminal, values: Namespace, output: Path | None, plot: Path | None) -> None:
    """Forecasts, then writes the table and the picture."""
    from trellis_ts.commands.loading import load_forecaster, read_for
    from trellis_ts.forecaster import forecast_frame

    forecaster = load_forecaster(values.model, values.device)
    panel = forecaster.check(read_for(terminal, forecaster, values))
    result = forecaster.forecast(panel, prediction_length=values.prediction_length)
    _note_doubts(terminal, forecaster, panel, result)
    data = forecaster.checkpoint.experiment.data
    frame = forecast_frame(
        panel,
        result,
        id_name=values.id or data.id or "unique_id",
        time_name=values.time or data.time or "ds",
    )
    _write(terminal, frame, panel, output)
    if plot is not None:
        _plot(terminal, panel, result, plot)
    if output is not None:
        text = f"wrote {len(frame)} rows ({len(panel.series)} series, {result.point.shape[1]} steps) to {output}"
        terminal.result(text, {"output": str(output), "rows": len(frame), "plot": str(plot) if plot else None})


def _note_doubts(terminal: Terminal, forecaster: Forecaster, panel: Panel, result: Forecast) -> None:
    """Says what a reader of the forecast should know."""
    import numpy as np

    if (steps := result.point.shape[1]) > forecaster.prediction_length:
        terminal.note(
            f"note: {steps} steps are beyond the trained {forecaster.prediction_length}: forecasts were fed back as if "
            "observed, so later bands are too narrow"
        )
    if result.quantiles is None:
        loss = forecaster.checkpoint.experiment.training.loss
        terminal.note(
            f"note: this model was trained with --loss {loss} and gives points only; --loss quantile gives bands"
        )
    context_length = forecaster.checkpoint.model.shape.context_length
    known = {each.name for each in forecaster.checkpoint.data.series}
    short = sum(len(series) < context_length for series in panel.series)
    new = sum(series.name not in known for series in panel.series)
    unseen = sum(bool(np.isnan(series.values[-context_length:]).all(axis=0).any()) for series in panel.series)
    if short:
        terminal.note(f"note: {short} series shorter than the context of {context_length}; padded as unobserved")
    if new:
        terminal.note(f"note: {new} series the model was not trained on; scaled by their own history")
    if unseen:
        terminal.note(f"note: {unseen} series have a channel without a value in the last {context_length} steps")


def _write(terminal: Terminal, frame: pd.DataFrame, panel: Panel, output: Path | None) -> None:
    from trellis_ts.datasets import calendar

    if output is not None and output.suffix.lower() == ".parquet":
        with atomic_file(output) as temporary:
            frame.to_parquet(temporary, index=False)
        return
    time_name = frame.columns[list(frame.columns).index("forecast") - 1]
    stamps: NDArray[np.datetime64] = frame[time_name].to_numpy("datetime64[ns]")
    text = frame.assign(**{time_name: calendar.format_times(stamps, panel.freq, panel.timezone)})
    if output is not None:
        with atomic_file(output) as temporary:
            text.to_csv(temporary, index=False, float_format="%.10g")
    elif terminal.as_json:
        sys.stdout.write(text.to_json(orient="records") + "\n")
    else:
        text.to_csv(sys.stdout, index=False, float_format="%.10g")


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
            band = None
            if result.quantiles is not None and len(result.quantile_levels) > 1:
                band = (result.quantiles[index, :, channel, 0].numpy(), result.quantiles[index, :, channel, -1].numpy())
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
                )
            )
    return found


def band_label(levels: tuple[float, ...]) -> str:
    """What the band between the outermost levels is called in a legend."""
    if len(levels) < 2:
        return ""
    return f"{100 * (levels[-1] - levels[0]):.0f} % band ({levels[0]:g} to {levels[-1]:g})"


def _plot(terminal: Terminal, panel: Panel, result: Forecast, path: Path) -> None:
    from trellis_ts.plots import plot_forecasts

    all_pictures = pictures(panel, result)
    with atomic_file(path) as temporary:
        drawn = plot_forecasts(all_pictures, temporary)
    if drawn < len(all_pictures):
        terminal.note(f"note: {path} shows the first {drawn} of {len(all_pictures)} forecasts")
