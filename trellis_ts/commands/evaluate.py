"""``trellis evaluate``: scores on rows the model has not seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.console import Terminal, as_json, counted, table
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
    from jsonargparse import Namespace

    from trellis_ts.scores import Evaluation, Scores

_FORMATS = (".json", ".csv", ".png")
_MOST_ROWS = 40
_OVERALL = (
    ("MSE", "mse"),
    ("MAE", "mae"),
    ("RMSE, data units", "rmse_original"),
    ("MAE, data units", "mae_original"),
    ("MASE", "mase"),
    ("RMSSE", "rmsse"),
    ("sMAPE", "smape"),
    ("quantile loss", "quantile_loss"),
    ("weighted quantile loss", "weighted_quantile_loss"),
    ("CRPS, from quantiles", "crps"),
    ("interval score", "interval_score"),
)


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "evaluate",
        "MODEL DATA [--baselines NAME,...] [--by series|step] [--output FILE] ...",
        "Scores MODEL on every window of DATA whose future it has not seen, none left out unless --step or "
        "--max-origins says so, beside baselines on the same windows. MSE and MAE are on the scale of the standardised "
        "training rows, as benchmarks report them.",
    )
    options.add_argument("model", type=str, metavar="MODEL", help="model directory written by `trellis train`")
    options.add_argument(
        "data",
        type=str,
        metavar="DATA",
        help="path of a table, path or URL of a folder of Parquet files, or name of a data set",
    )
    options.add_argument(
        "--step", type=int, default=1, metavar="N", help="rows from one window to the next (default: 1)"
    )
    options.add_argument(
        "--max-origins",
        type=int | None,
        default=None,
        metavar="N",
        help="most windows per series, the newest ones (default: all)",
    )
    options.add_argument(
        "--baselines",
        type=str,
        default="seasonal_naive",
        metavar="NAME,...",
        help="naive, seasonal_naive, drift; with pip install 'trellis-ts[baselines]' also auto_ets, auto_theta, "
        "auto_arima, mstl, fitted anew for every window; or none (default: seasonal_naive)",
    )
    options.add_argument(
        "--by", type=str, default=None, metavar="{series,step}", help="also the MAE per series, or per step ahead"
    )
    options.add_argument(
        "-o",
        "--output",
        type=str,
        metavar="FILE",
        help="write all scores (.json), a tidy table of them (.csv), or a picture (.png)",
    )
    options.add_argument(
        "--adaptive",
        action="store_true",
        help="let the model's bands follow what came true: at every origin they are widened or narrowed by how the "
        "bands of earlier origins did, up to there",
    )
    options.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (default: 0)")
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
    if values.by not in (None, "series", "step"):
        raise ConfigError(f"--by: expected series or step, got '{values.by}'")
    output = None if values.output is None else Path(values.output)
    if output is not None:
        check_output(output, _FORMATS, "--output", values.data)
    check_engine(values, is_partitioned=_is_folder(values))
    evaluate(Terminal(quiet=values.quiet, as_json=values.json), values, output)


def evaluate(terminal: Terminal, values: Namespace, output: Path | None) -> None:
    """Scores, says how, and writes the file."""
    from trellis_ts.commands.loading import load_forecaster, read_for
    from trellis_ts.evaluation import backtest

    names = [] if values.baselines == "none" else [name.strip() for name in values.baselines.split(",")]
    if _is_folder(values):
        from trellis_ts.commands.partitioned import evaluate_folder

        _tell(terminal, evaluate_folder(terminal, values, names), values, output)
        return
    forecaster = load_forecaster(values.model, values.device, calibrated=not values.no_calibration)
    panel = read_for(terminal, forecaster, values)
    with terminal.progress("evaluating") as progress:
        evaluation = backtest(
            forecaster,
            panel,
            step=values.step,
            max_origins=values.max_origins,
            baselines=names,
            adaptive=values.adaptive,
            seed=values.seed,
            progress=progress,
        )
    _tell(terminal, evaluation, values, output)


def _is_folder(values: Namespace) -> bool:
    from trellis_ts.datasets.sources import is_partitioned

    return is_partitioned(values.data) or (values.engine == "ray" and values.data.lower().endswith(".parquet"))


def _tell(terminal: Terminal, evaluation: Evaluation, values: Namespace, output: Path | None) -> None:
    """The scores, on the terminal and in the file."""
    _note_doubts(terminal, evaluation)
    if output is not None:
        _write(evaluation, output)
    blocks: list[Any] = [_head(evaluation), _overall_rows(evaluation)]
    blocks += _comparison_lines(evaluation)
    if values.by is not None:
        blocks += _detail(evaluation, values.by)
    if output is not None:
        blocks.append(f"wrote {output}")
    terminal.tables(blocks, evaluation_data(evaluation))


def _note_doubts(terminal: Terminal, evaluation: Evaluation) -> None:
    for name, count in evaluation.fallbacks.items():
        if count:
            fits = counted(count, "forecast")
            terminal.note(f"note: {name} could not be fitted for {fits}; seasonal naive stands in")
    for name, scores in evaluation.scores.items():
        if math.isnan(scores.mse):
            terminal.note(f"note: some forecasts of {_spelled(name)} are no number, hence neither are its scores")


def evaluation_text(evaluation: Evaluation) -> str:
    """The overall scores as a table."""
    return f"{_head(evaluation)}\n{table(_overall_rows(evaluation))}"


def evaluation_data(evaluation: Evaluation) -> dict[str, Any]:
    """The scores for a machine."""
    return evaluation.data()


def _head(evaluation: Evaluation) -> str:
    step = "" if evaluation.step == 1 else f", {counted(evaluation.step, 'row')} apart"
    return (
        f"{counted(evaluation.num_windows, 'window')} of {counted(evaluation.prediction_length, 'step')}{step}, "
        f"{evaluation.num_series:,} series, {counted(evaluation.num_values, 'value')}"
    )


def _overall_rows(evaluation: Evaluation) -> list[list[str]]:
    """One row per score, one column per forecaster; beside a single baseline the difference."""
    names = evaluation.forecasters
    pair = names if len(names) == 2 else None
    rows = [["", *map(_spelled, names), *(["difference"] if pair else [])]]
    for label, metric in _OVERALL:
        values = [getattr(evaluation.scores[name], metric) for name in names]
        if all(value is None for value in values):
            continue
        row = [label, *map(_number, values)]
        if pair:
            row.append(_difference(*values))
        rows.append(row)
    rows += [[*row, *([""] if pair else [])] for row in _coverage_rows(evaluation)]
    return rows


def _coverage_rows(evaluation: Evaluation) -> list[list[str]]:
    """Coverage of every central band, else of the one between the outermost levels."""
    names, calibration = evaluation.forecasters, evaluation.calibration
    bands = calibration[names[0]].bands if names[0] in calibration else ()
    rows = [
        [f"coverage of {100 * band:g} % band", *(_percent(calibration[name].coverage[place]) for name in names)]
        for place, band in enumerate(bands)
    ]
    if not rows and evaluation.band is not None:
        label = f"coverage of {100 * evaluation.band:.0f} % band"
        rows.append([label, *(_percent(evaluation.scores[name].coverage) for name in names)])
    return rows


def _comparison_lines(evaluation: Evaluation) -> list[str]:
    """Whether the difference in MAE, or in quantile loss where there are quantiles, is more than chance."""
    loss = "mae" if evaluation.model.quantile_loss is None else "quantile_loss"
    lines = []
    for each in evaluation.comparisons:
        if each.loss != loss:
            continue
        line = f"{_spelled(loss)} beside {_spelled(each.baseline)}: {100 * each.difference:+.1f} %"
        if each.bootstrap is not None:
            low, high = 100 * each.bootstrap.low, 100 * each.bootstrap.high
            line += f" ({low:+.1f} to {high:+.1f} % over {each.bootstrap.num_items:,} series redrawn)"
        if each.diebold_mariano is None:
            line += "; too few origins to test"
        else:
            line += f"; Diebold-Mariano p = {_p_value(each.diebold_mariano.p_value)}"
        lines.append(line)
    return lines


def _detail(evaluation: Evaluation, by: str) -> list[Any]:
    """MAE per series (the worst first) or per step, with the model's coverage."""
    names = evaluation.forecasters
    scores = evaluation.by_series if by == "series" else evaluation.by_step
    if by == "step":
        labels = [str(step + 1) for step in range(evaluation.prediction_length)]
        order = list(range(len(labels)))
    else:
        labels = [_item_label(evaluation, *item) for item in evaluation.items]
        maes = [each.mae for each in scores[names[0]]]
        order = sorted(range(len(labels)), key=lambda index: -maes[index] if maes[index] == maes[index] else 0.0)
    has_band = evaluation.band is not None
    rows = [[by, *(f"MAE {_spelled(name)}" for name in names), *(["coverage"] if has_band else [])]]
    for index in order[:_MOST_ROWS]:
        cells: list[Scores] = [scores[name][index] for name in names]
        row = [labels[index], *(_number(each.mae) for each in cells)]
        rows.append([*row, *([_percent(cells[0].coverage)] if has_band else [])])
    blocks: list[Any] = ["", rows]
    if len(labels) > _MOST_ROWS:
        which = "with the largest MAE" if by == "series" else "first"
        blocks.append(f"the {_MOST_ROWS} {which} of {len(labels):,}; --output has all")
    return blocks


def _item_label(evaluation: Evaluation, series: str, channel: str) -> str:
    is_single = len({each for _, each in evaluation.items}) == 1
    return channel if not series else series if is_single else f"{series} · {channel}"


def _spelled(name: str) -> str:
    return name.replace("_", " ").replace("mae", "MAE")


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _p_value(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _difference(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None or math.isnan(ours) or not theirs > 0:
        return ""
    return f"{100 * (ours / theirs - 1):+.1f} %"


def _write(evaluation: Evaluation, path: Path) -> None:
    ending = path.suffix.lower()
    with atomic_file(path) as temporary:
        if ending == ".json":
            temporary.write_text(as_json(evaluation_data(evaluation), indent=2) + "\n", encoding="utf-8")
        elif ending == ".csv":
            evaluation.frame().to_csv(temporary, index=False, float_format="%.10g")
        else:
            from trellis_ts.plots import plot_evaluation

            plot_evaluation(evaluation, temporary)
