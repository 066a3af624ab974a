"""``trellis demo``: the whole way on a real series that needs no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trellis_ts.commands.configuration import experiment_config, packaged_path
from trellis_ts.commands.console import Terminal, as_json, read
from trellis_ts.commands.options import Parser, add_output_options
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file, check_directory, reason_of

if TYPE_CHECKING:
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.types import Panel

_DATA = "co2"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "demo",
        "[-o FOLDER]",
        "Trains a model on the weekly CO2 record of Mauna Loa (1958-2001, with its real gaps) without the last year, "
        "scores it on that year beside seasonal naive, forecasts that year and the next, and draws both.",
    )
    options.add_argument(
        "-o", "--output", type=str, default="demo", metavar="FOLDER", help="folder to write (default: demo)"
    )
    add_output_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    folder = Path(values.output)
    check_directory(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {reason_of(error)}; name another folder with -o") from None
    _demo(terminal, folder)


def _demo(terminal: Terminal, folder: Path) -> None:
    from trellis_ts.commands import train
    from trellis_ts.commands.evaluate import evaluation_data, evaluation_text
    from trellis_ts.evaluation import evaluate
    from trellis_ts.forecaster import Forecaster

    config = experiment_config(train.parser().parse_args([_DATA, "--config", packaged_path("demo")]))
    model = folder / "model"
    train.check_free(model, overwrite=True)
    train.train(_WithoutSummary(terminal) if terminal.as_json else terminal, _DATA, model, config)
    forecaster = Forecaster.load(model)
    panel = read(Terminal(quiet=True, as_json=False), _DATA, {})
    evaluation = evaluate(forecaster, panel)
    with atomic_file(folder / "evaluation.json") as temporary:
        temporary.write_text(as_json(evaluation_data(evaluation), indent=2) + "\n", encoding="utf-8")
    _forecast(forecaster, panel, folder)
    terminal.result(
        f"\nthe last year, which the model has not seen:\n{evaluation_text(evaluation)}\n\n"
        f"wrote {folder}/forecast.csv, {folder}/forecast.png and {folder}/evaluation.json; "
        f"the model is in {model}",
        {
            "model": str(model),
            "forecast": str(folder / "forecast.csv"),
            "plot": str(folder / "forecast.png"),
            "evaluation": evaluation_data(evaluation),
        },
    )


class _WithoutSummary(Terminal):
    """Keeps the training summary out of the one JSON object a machine expects."""

    def __init__(self, terminal: Terminal) -> None:
        super().__init__(quiet=terminal.quiet, as_json=True)

    def result(self, text: str, data: object) -> None:
        pass


def _forecast(forecaster: Forecaster, panel: Panel, folder: Path) -> None:
    """The held-out last year as it would have been forecast, and the year to come."""
    from trellis_ts.commands.forecast import pictures
    from trellis_ts.datasets import calendar
    from trellis_ts.frames import forecast_frame
    from trellis_ts.plots import plot_forecasts

    horizon = forecaster.prediction_length
    series = panel.series[0]
    past = replace(panel, series=(replace(series, time=series.time[:-horizon], values=series.values[:-horizon]),))
    drawn = []
    for title, history in (
        ("the last year, held out (history goes on under the forecast)", past),
        ("the year to come", panel),
    ):
        result = forecaster.forecast(history)
        picture = pictures(history, result)[0]
        shown = len(picture.history) + (horizon if history is past else 0)
        drawn.append(
            replace(
                picture,
                title=f"CO2 at Mauna Loa, weekly, ppm: {title}",
                history_time=series.time[-shown:] if history is past else picture.history_time,
                history=series.values[-shown:, 0] if history is past else picture.history,
            )
        )
    frame = forecast_frame(panel, result, time_name="ds")
    frame["ds"] = calendar.format_times(frame["ds"].to_numpy("datetime64[ns]"), panel.freq, panel.timezone)
    with atomic_file(folder / "forecast.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.10g")
    with atomic_file(folder / "forecast.png") as temporary:
        plot_forecasts(drawn, temporary)
