"""``trellis benchmark``: train and score on the standard data sets, under one protocol, and make the tables."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trellis_ts.commands.configuration import read_config
from trellis_ts.commands.console import Terminal, counted
from trellis_ts.commands.options import Parser, add_output_options
from trellis_ts.config import Mixer
from trellis_ts.errors import ConfigError, TrellisError
from trellis_ts.files import check_directory

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from trellis_ts.benchmark.plan import Cell
    from trellis_ts.benchmark.runner import Outcome

_RESULTS = "benchmarks/results/long_horizon"
_DATASETS = "ETTh1,ETTh2,ETTm1,ETTm2,Weather,Exchange,ILI"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "benchmark",
        "[--dataset NAME,...] [--mixer NAME,...] [--track 96|free] [--seeds N] ...",
        "Trains and scores models on the long-horizon data sets: published borders, every test window, epochs and "
        "look-backs chosen on the validation rows, one setting per data set for all horizons. Every run leaves one "
        "JSON file with its errors, settings, cost and machine; a run that has one is not run again, so an interrupted "
        "benchmark goes on where it was.",
    )
    options.add_argument(
        "--dataset",
        type=str,
        default=_DATASETS,
        metavar="NAME,...",
        help=f"data sets by name, or paths of wide tables (default: {_DATASETS})",
    )
    options.add_argument(
        "--mixer",
        type=str,
        default="trellis",
        metavar="NAME,...",
        help=f"contestants, of {', '.join(typing.get_args(Mixer))} (default: trellis)",
    )
    options.add_argument(
        "--track",
        type=str,
        default="96",
        metavar="{96,free}",
        help="96: look-back 96; free: every candidate look-back, of which the tables take the one with the lowest "
        "validation loss; 96,free: both (default: 96)",
    )
    options.add_argument(
        "--seeds",
        type=str,
        default="0,1,2",
        metavar="N,...",
        help="seeds of weights and windows by number: 1 is the seed 1, not one seed (default: 0,1,2)",
    )
    options.add_argument(
        "--each-horizon",
        action="store_true",
        help="a model for every horizon, instead of one for the longest whose first steps serve the others",
    )
    options.add_argument(
        "--horizons", type=str, default=None, metavar="N,...", help="instead of the data set's own horizons"
    )
    options.add_argument(
        "--look-backs", type=str, default=None, metavar="N,...", help="candidates, instead of the data set's own"
    )
    options.add_argument(
        "--variant",
        type=str,
        default=None,
        metavar="FILE",
        help="configuration file laid over the data set's settings; results are kept under the file's name",
    )
    options.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default: 1)")
    options.add_argument(
        "--results", type=str, default=_RESULTS, metavar="FOLDER", help=f"where results lie (default: {_RESULTS})"
    )
    options.add_argument("--list", action="store_true", help="say what is finished and what is not, and stop")
    options.add_argument("--tables", action="store_true", help="make tables and pictures of the results, and stop")
    add_output_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input, or a run failed.
    """
    values = parser().parse_args(arguments)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    folder = Path(values.results)
    if values.tables:
        _tables(terminal, folder)
        return
    if values.jobs < 1:
        raise ConfigError(f"--jobs: expected a whole number from 1, got {values.jobs}")
    check_directory(folder)
    cells = _cells(values)
    from trellis_ts.benchmark.runner import split_finished

    open_, finished = split_finished(cells, folder)
    terminal.note(f"{counted(len(finished), 'run')} finished, {len(open_)} to do")
    if values.list:
        rows = [*(f"finished  {cell.key}" for cell in finished), *(f"to do     {cell.key}" for cell in open_)]
        keys = {"finished": [cell.key for cell in finished], "to_do": [cell.key for cell in open_]}
        terminal.result("\n".join(rows), keys)
        return
    _run(terminal, open_, finished, folder, jobs=values.jobs)


def _cells(values: Namespace) -> list[Cell]:
    """All that the options ask for; every mistake in them is found here."""
    from trellis_ts.benchmark.plan import TRACKS, cells_of, choose_names, choose_numbers, plan_for

    def numbers(name: str, *, least: int) -> list[int] | None:
        text = values[name]
        return None if text is None else choose_numbers(f"--{name.replace('_', '-')}", text, least=least)

    contestants = choose_names("--mixer", values.mixer, typing.get_args(Mixer))
    tracks = choose_names("--track", values.track, TRACKS)
    variant, changes = "", None
    if values.variant is not None:
        changes = read_config(values.variant)
        variant = Path(values.variant).name.removesuffix(".yaml")
    datasets = list(dict.fromkeys(name.strip() for name in values.dataset.split(",") if name.strip()))
    if not datasets:
        raise ConfigError("--dataset is empty; name one or more, separated by commas")
    cells = [
        cell
        for name in datasets
        for cell in cells_of(
            plan_for(name),
            name,
            contestants=contestants,
            tracks=tracks,
            seeds=numbers("seeds", least=0) or [],
            horizons=numbers("horizons", least=1),
            look_backs=numbers("look_backs", least=1),
            each_horizon=values.each_horizon,
            variant=variant,
            changes=changes,
        )
    ]
    for cell in cells:
        cell.config()
    twice = {cell.key for cell in cells if sum(other.key == cell.key for other in cells) > 1}
    if twice:
        raise ConfigError(f"two data sets share the name of the run {min(twice)}; rename one of the tables")
    return cells


def _run(terminal: Terminal, open_: list[Cell], finished: list[Cell], folder: Path, *, jobs: int) -> None:
    from trellis_ts.benchmark.runner import run_cells

    failed: list[Outcome] = []
    done = 0

    def ended(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        terminal.note(f"{done}/{len(open_)} {outcome.cell.key}: {_line(outcome)}")
        if outcome.result is None:
            failed.append(outcome)

    run_cells(open_, folder, jobs=jobs, ended=ended)
    if failed:
        first = failed[0]
        more = f" ({len(failed)} of {len(open_)} runs failed)" if len(failed) > 1 else ""
        raise TrellisError(f"{first.cell.key} failed: {first.problem}{more}; the others' results are in {folder}")
    keys = [cell.key for cell in (*finished, *open_)]
    terminal.result(
        f"{counted(len(keys), 'result')} in {folder}; next: trellis benchmark --tables --results {folder}",
        {"results": str(folder), "runs": keys},
    )


def _line(outcome: Outcome) -> str:
    """How a run went, in one line."""
    result: dict[str, Any] | None = outcome.result
    if result is None:
        return f"failed: {outcome.problem}"
    errors = ", ".join(
        f"{horizon}: {score['mse']:.4f} / {score['mae']:.4f} on {score['num_windows']:,} windows"
        for horizon, score in result["scores"].items()
    )
    return f"MSE / MAE {errors}; {result['train_seconds']:.0f} s"


def _tables(terminal: Terminal, folder: Path) -> None:
    from trellis_ts.benchmark.tables import write_tables

    written = [str(path) for path in write_tables(folder)]
    terminal.result(f"written: {', '.join(written)}", {"written": written})
