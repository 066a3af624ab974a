"""``trellis evaluate``: scores on rows the model has not seen."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.console import Terminal, counted, table
from trellis_ts.commands.options import Parser, add_column_options, add_device_option, add_output_options

if TYPE_CHECKING:
    from trellis_ts.evaluation import Evaluation


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "evaluate",
        "MODEL DATA ...",
        "Scores MODEL on every window of DATA whose future it has not seen, none left out, beside seasonal naive on "
        "the same windows. MSE and MAE are on the scale of the standardised training rows, as benchmarks report them.",
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    options.add_argument("data", type=str, metavar="DATA", help="path of a table, or name of a data set")
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
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    from trellis_ts.commands.loading import load_forecaster, read_for
    from trellis_ts.evaluation import evaluate

    forecaster = load_forecaster(values.model, values.device)
    panel = read_for(terminal, forecaster, values)
    with terminal.progress("evaluating") as progress:
        evaluation = evaluate(forecaster, panel, progress=progress)
    terminal.result(evaluation_text(evaluation), evaluation_data(evaluation))


def evaluation_text(evaluation: Evaluation) -> str:
    """The scores as a table."""
    model, naive = evaluation.model, evaluation.seasonal_naive
    rows = [["", "model", "seasonal naive", "difference"]]
    for label, name in (
        ("MSE", "mse"),
        ("MAE", "mae"),
        ("RMSE, data units", "rmse_original"),
        ("MAE, data units", "mae_original"),
    ):
        ours, theirs = getattr(model, name), getattr(naive, name)
        difference = f"{100 * (ours / theirs - 1):+.1f} %" if theirs > 0 else ""
        rows.append([label, f"{ours:.4f}", f"{theirs:.4f}", difference])
    if model.quantile_loss is not None:
        rows.append(["quantile loss", f"{model.quantile_loss:.4f}", "", ""])
    if model.coverage is not None and evaluation.band is not None:
        rows.append([f"coverage of {100 * evaluation.band:.0f} % band", f"{100 * model.coverage:.1f} %", "", ""])
    head = (
        f"{counted(evaluation.num_windows, 'window')} of {counted(evaluation.prediction_length, 'step')}, "
        f"{evaluation.num_series:,} series, {counted(evaluation.num_values, 'value')}"
    )
    return f"{head}\n{table(rows)}"


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """The scores for a machine."""
    return asdict(evaluation)
