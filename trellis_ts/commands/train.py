"""``trellis train``: from a table to a model directory."""

from __future__ import annotations

import logging
import shutil
import signal
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trellis_ts.commands.console import Terminal, read
from trellis_ts.commands.options import (
    COLUMN_OPTIONS,
    Parser,
    add_config_options,
    add_output_options,
    config_path,
    experiment_config,
    flat_config,
    packaged_configs,
    resolve_config_names,
)
from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jsonargparse import Namespace

    from trellis_ts.config import ExperimentConfig
    from trellis_ts.training import EpochReport, Preparation, TrainingSummary

_RUN_FILE = "run.yaml"
# What a resumed run may change: how long and on what it runs, not what is computed.
_MAY_CHANGE_ON_RESUME = {"max_time", "max_epochs", "patience", "device", "num_workers", "implementation"}
_STOP_TEXT = {
    "epochs": "all epochs done",
    "patience": "no better validation loss for a while",
    "time": "time is up",
    "interrupted": "interrupted; go on with --resume",
}


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "train",
        "Trains a model on DATA and saves the best epoch. DATA is a CSV or Parquet file with a column of dates and one "
        "column per channel, or with a column that names the series; or the name of a data set (`trellis datasets`). "
        "Everything not given is chosen from the data.",
    )
    options.add_argument("data", type=str, help="path of a table, or name of a data set")
    options.add_argument(
        "-o", "--output", type=str, default=None, help="model directory to write (default: models/NAME)"
    )
    options.add_argument("--resume", action="store_true", help="go on with an unfinished run")
    options.add_argument("--overwrite", action="store_true", help="replace the model directory if there is one")
    add_output_options(options)
    add_config_options(options)
    return options


def run(arguments: list[str]) -> None:
    """Runs the command.

    Raises:
        TrellisError: bad input.
    """
    values = _parse(arguments)
    terminal = Terminal(quiet=values.quiet, as_json=values.json)
    config = experiment_config(values)
    output = _output(values)
    if values.resume:
        _check_resumable(output, config)
    elif output.exists() and not values.overwrite:
        raise ConfigError(
            f"{output} exists; choose another --output, go on with --resume, or replace it with --overwrite"
        )
    train(terminal, values.data, output, config, resume=values.resume)


def train(terminal: Terminal, data: str, output: Path, config: ExperimentConfig, *, resume: bool = False) -> None:
    """Reads, trains, saves, and says how it went."""
    panel = read(terminal, data, {name: getattr(config.data, name) for name in COLUMN_OPTIONS})
    from trellis_ts.checkpoints import TRAINING_FOLDER
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.sizing import explain_shape
    from trellis_ts.training import fit, prepare

    preparation = prepare(panel, config)
    if preparation.left_out_series:
        terminal.note(f"note: {preparation.left_out_series} series too short to train on; they can still be forecast")
    terminal.note(
        f"{panel.source}: {len(panel.series)} series of {panel.num_channels} channel(s), every {panel.freq}; the model "
        f"{explain_shape(preparation.shape, panel)}"
    )
    work = output / TRAINING_FOLDER
    try:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        (work / _RUN_FILE).write_text(yaml.safe_dump(flat_config(config), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {output}: {(error.strerror or str(error)).lower()}; choose another --output"
        ) from None
    with _Observer(terminal) as observer, _stop_on_interrupt(observer), _quiet_lightning():
        checkpoint, summary = fit(preparation, work, observer=observer, resume=resume)
    Forecaster(checkpoint).save(output)
    terminal.result(_summary_text(output, data, preparation, summary), _summary_data(output, preparation, summary))


def _parse(arguments: list[str]) -> Namespace:
    """The options; a data set with a configuration of its name starts from that one, a resumed run from its own."""
    options = parser()
    arguments = resolve_config_names(arguments)
    values = options.parse_args(arguments)
    if values.resume:
        run_file = _output(values) / "training" / _RUN_FILE
        if not run_file.is_file():
            raise ConfigError(f"nothing to resume: {run_file} does not exist; train without --resume")
        return options.parse_args(["--config", str(run_file), *arguments])
    if values.config is None and not Path(values.data).exists() and _default_config(values.data) in packaged_configs():
        return options.parse_args(["--config", config_path(_default_config(values.data)), *arguments])
    return values


def _default_config(data: str) -> str:
    return "demo" if data.lower() == "co2" else data.lower()


def _output(values: Namespace) -> Path:
    if values.output is not None:
        return Path(values.output)
    return Path("models") / Path(values.data).name.split(".")[0]


def _check_resumable(output: Path, config: ExperimentConfig) -> None:
    stored = yaml.safe_load((output / "training" / _RUN_FILE).read_text(encoding="utf-8"))
    now = flat_config(config)
    changed = [key for key in now if key not in _MAY_CHANGE_ON_RESUME and stored.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--resume cannot change {key} from {stored.get(key)} to {now[key]}; train anew with another --output"
        )


def _summary_text(output: Path, data: str, preparation: Preparation, summary: TrainingSummary) -> str:
    loss = preparation.config.training.loss
    return "\n".join(
        [
            f"trained {summary.num_epochs} epoch(s) in {summary.seconds:.0f} s ({_STOP_TEXT[summary.stop_reason]})",
            f"best epoch {summary.best_epoch}: validation loss {summary.validation_loss:.4f} ({loss}, standardised)",
            f"{summary.num_parameters:,} parameters, {summary.train_windows:,} training windows, "
            f"{summary.validation_windows:,} validation windows",
            f"saved to {output}; next: trellis evaluate {output} {data}",
        ]
    )


def _summary_data(output: Path, preparation: Preparation, summary: TrainingSummary) -> dict[str, Any]:
    return {"model": str(output), **asdict(summary), "shape": asdict(preparation.shape)}


class _Observer:
    """Draws one bar for the whole training on a terminal, or prints a line per epoch elsewhere."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.interrupted = False
        self._is_live = not terminal.quiet and terminal.err.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=terminal.err,
            disable=not self._is_live,
        )
        self._task: Any = None
        self._best = ""

    def __enter__(self) -> _Observer:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None:
        self._num_epochs = num_epochs
        self._task = self._bar.add_task(
            f"epoch {first_epoch + 1}/{num_epochs}",
            total=num_epochs * steps_per_epoch,
            completed=first_epoch * steps_per_epoch,
            losses="",
        )

    def stepped(self) -> None:
        self._bar.advance(self._task)

    def epoch_ended(self, report: EpochReport) -> None:
        if report.is_best:
            self._best = f"best {report.validation_loss:.4f} in epoch {report.epoch}"
        losses = f"train {report.train_loss:.4f}  validation {report.validation_loss:.4f}"
        following = min(report.epoch + 1, self._num_epochs)
        self._bar.update(
            self._task, description=f"epoch {following}/{self._num_epochs}", losses=f"{losses}  {self._best}"
        )
        if not self._is_live:
            self.terminal.note(
                f"epoch {report.epoch}/{self._num_epochs}: {losses}{'  (best)' if report.is_best else ''}"
            )

    def should_stop(self) -> bool:
        return self.interrupted


@contextmanager
def _stop_on_interrupt(observer: _Observer) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends training after the current step; a second one ends the program."""

    def stop(number: int, frame: object) -> None:
        if observer.interrupted:
            raise KeyboardInterrupt
        observer.interrupted = True
        observer.terminal.note("stopping after this step; the best model is kept (press Ctrl-C again to give up)")

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's remarks are for the authors of training scripts; the user gets our own."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning|torch")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
