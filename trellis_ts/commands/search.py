"""``trellis search``: settings tried on a table, and the best model kept."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trellis_ts.commands.configuration import experiment_config, flat_config
from trellis_ts.commands.console import Terminal, counted, read
from trellis_ts.commands.options import (
    COLUMN_OPTIONS,
    COVARIATE_OPTIONS,
    Parser,
    add_config_options,
    add_output_options,
    add_preset_option,
)
from trellis_ts.commands.progress import TrainingProgress
from trellis_ts.commands.train import check_free, fingerprint, output_of
from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from trellis_ts.config import ExperimentConfig
    from trellis_ts.search import Search, TrialReport
    from trellis_ts.training import EpochReport

_FOLDER, _ASKED_FILE = "search", "asked.sha256"


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "search",
        "DATA [-o MODEL] [--trials N] [--max-time 10m] [--preset fast] ...",
        "Trains models on DATA with settings proposed by Optuna, cuts short those that fall behind on the validation "
        "rows, and saves the best one. Number of layers, width, slots, dropout, learning rate and the seasonal cycle "
        "are searched, but for those given here; the rest is chosen as by `trellis train`. The same command goes on "
        'with a search that was stopped. Needs `pip install "trellis-ts[search]"`.',
    )
    options.add_argument("data", type=str, metavar="DATA", help="path of a table, or name of a data set")
    options.add_argument(
        "-o", "--output", type=str, metavar="MODEL", help="model directory to write (default: models/NAME)"
    )
    options.add_argument("--trials", type=int, default=20, metavar="N", help="trials in all (default: 20)")
    add_preset_option(options)
    options.add_argument("--overwrite", action="store_true", help="replace the model directory, and search anew")
    add_output_options(options)
    add_config_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = parser().parse_args(arguments)
    from trellis_ts.search import STUDY_FILE, Search, check_installed

    check_installed()
    if values.trials < 1:
        raise ConfigError(f"--trials {values.trials} must be at least 1")
    values.preset = values.preset or "balanced"
    config = experiment_config(values)
    if config.training.num_processes > 1:
        raise ConfigError("trellis search tries its settings on one device each; leave out --devices and --num-nodes")
    seconds = config.training.max_time_seconds
    # The limit is the search's; a trial's own is chosen by the preset.
    config = replace(config.replace_settings(max_time=None), named=tuple(n for n in config.named if n != "max_time"))
    output = output_of(values)
    folder = output / _FOLDER
    goes_on = (folder / STUDY_FILE).is_file() and not values.overwrite
    if not goes_on:
        check_free(output, overwrite=values.overwrite)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    columns = {name: getattr(config.data, name) for name in (*COLUMN_OPTIONS, *COVARIATE_OPTIONS)}
    panel = read(terminal, values.data, columns)
    asked = _asked(config, fingerprint(panel))
    if goes_on and (folder / _ASKED_FILE).read_text(encoding="utf-8") != asked:
        raise ConfigError(
            f"{folder} holds a search of other data or settings; choose another --output, or use --overwrite"
        )
    if not goes_on:
        shutil.rmtree(folder, ignore_errors=True)
    search = Search(panel, config, folder)
    (folder / _ASKED_FILE).write_text(asked, encoding="utf-8")
    if goes_on:
        terminal.note(f"going on after {counted(len(search.trials()), 'trial')}")
    with _SearchProgress(terminal) as progress:
        search.run(values.trials, seconds=seconds, told=lambda trial: terminal.note(_line(trial)), observer=progress)
    _finish(terminal, search, output, values.data)


def _finish(terminal: Terminal, search: Search, output: Path, data: str) -> None:
    """Saves the best model, and shows all trials."""
    from trellis_ts.forecaster import Forecaster

    best, loss = search.best(), search.best_loss
    Forecaster(best).save(output)
    trials = sorted(search.trials(), key=lambda each: (each.validation_loss is None, each.validation_loss or 0.0))
    names = list(search.space)
    rows = [["trial", *names, "validation loss", "state"]]
    rows += [
        [str(each.number), *(_shown(each.settings.get(name)) for name in names), _loss(each), each.state]
        for each in trials
    ]
    terminal.tables(
        [rows, f"best validation loss {loss:.4f}; saved to {output}; next: trellis evaluate {output} {data}"],
        {"model": str(output), "validation_loss": loss, "trials": [asdict(each) for each in trials]},
    )


def _asked(config: ExperimentConfig, data: str) -> str:
    """A checksum of what is searched on what data."""
    named = {key: value for key, value in flat_config(config).items() if key in (*config.named, "preset")}
    return hashlib.sha256((yaml.safe_dump(named) + data).encode()).hexdigest() + "\n"


def _line(trial: TrialReport) -> str:
    settings = ", ".join(f"{name} {_shown(value)}" for name, value in trial.settings.items())
    return f"trial {trial.number}: {_loss(trial)} ({trial.state}) with {settings}"


def _loss(trial: TrialReport) -> str:
    return "-" if trial.validation_loss is None else f"{trial.validation_loss:.4f}"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _SearchProgress(TrainingProgress):
    """One bar for the trial under way; trials, not epochs, are told of."""

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None:
        """Draws the bar anew."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        super().started(num_epochs=num_epochs, steps_per_epoch=steps_per_epoch, first_epoch=first_epoch)

    def epoch_ended(self, report: EpochReport) -> None:
        """Shows the epoch's losses on a terminal."""
        if self._is_live:
            super().epoch_ended(report)
