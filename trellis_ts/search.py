"""Hyper-parameter search: Optuna proposes, validation judges, and trials that fall behind are cut short."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from trellis_ts.checkpoints import load_checkpoint, save_checkpoint
from trellis_ts.errors import ConfigError, TrellisError
from trellis_ts.pacing import fit_to_time
from trellis_ts.preparation import prepare
from trellis_ts.training import SilentObserver, fit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import optuna

    from trellis_ts.checkpoints import Checkpoint
    from trellis_ts.config import ExperimentConfig
    from trellis_ts.training import EpochReport, TrainingObserver
    from trellis_ts.types import Panel

STUDY_FILE = "study.log"
BEST_FOLDER = "best"
# Trials drawn at random before the sampler models what it has seen, and before which none is cut short.
_RANDOM_TRIALS, _UNPRUNED_TRIALS = 6, 4
# Small and sensible: what matters most on panels of all kinds. Each setting that is named drops out.
SPACE: dict[str, tuple[Any, ...]] = {
    "num_layers": (1, 2, 3),
    "width": (16, 32, 64),
    "num_slots": (8, 16, 32),
    "dropout": (0.0, 0.1, 0.3),
    "learning_rate": (3e-4, 1e-3, 3e-3),
    "seasonal_cycle": (False, True),
}
"""Settings searched, with their values; the learning rate is drawn between its least and its greatest."""


@dataclass(frozen=True)
class TrialReport:
    """One trial: what was tried, and how well it validated."""

    number: int
    settings: dict[str, Any]
    validation_loss: float | None
    """None of a trial that was cut short, failed or was interrupted."""
    state: str
    """complete, pruned, fail or running."""


def check_installed() -> None:
    """Refuses to search without Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("optuna") is None:
        raise ConfigError('searching needs Optuna; install it with `pip install "trellis-ts[search]"`')


class Search:
    """A study in a folder, which goes on where it was left.

    Args:
        panel: the series.
        config: what is named stays as it is; the preset chooses the rest of what is not searched.
        folder: of the study and of the best model so far.

    Raises:
        ConfigError: Optuna is not installed, or everything that could be searched is named.
    """

    def __init__(self, panel: Panel, config: ExperimentConfig, folder: Path) -> None:
        check_installed()
        import optuna
        from optuna.storages.journal import JournalFileBackend

        self.panel, self.config, self.folder = panel, config, folder
        self.space = {name: values for name, values in SPACE.items() if name not in config.named}
        if not self.space:
            raise ConfigError(f"nothing is left to search: {', '.join(SPACE)} are all given; leave one out")
        folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            study_name="trellis",
            storage=optuna.storages.JournalStorage(JournalFileBackend(str(folder / STUDY_FILE))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS, n_warmup_steps=2),
            load_if_exists=True,
        )

    def run(
        self,
        num_trials: int,
        *,
        seconds: float | None = None,
        told: Callable[[TrialReport], None] | None = None,
        observer: TrainingObserver | None = None,
    ) -> None:
        """Runs trials until there are so many finished ones, the time is up or the observer asks to stop.

        Args:
            num_trials: in all, those of earlier runs included.
            seconds: wall-clock limit of this run; a trial under way is ended by it.
            told: hears of every finished trial.
            observer: hears of every training.
        """
        end = math.inf if seconds is None else time.monotonic() + seconds
        outer = observer or SilentObserver()
        while len(self._finished()) < num_trials and time.monotonic() < end and not outer.should_stop():
            trial = self._study.ask()
            self._study.sampler = self._sampler(trial.number)
            watch = _TrialObserver(trial, outer, end)
            try:
                loss = self._train(self._suggest(trial), watch, trial.number)
            except TrellisError as error:
                # This one diverged, others may not; but where even the first fails, the data or a setting are to blame.
                self._tell(trial, state="fail")
                if trial.number == 0:
                    raise error
            else:
                # One cut short by the clock counts for nothing, but its model may be the best.
                state = "pruned" if watch.was_pruned else "fail" if watch.was_stopped else "complete"
                self._tell(trial, loss, state=state)
            if told is not None:
                told(self.trials()[trial.number])

    def trials(self) -> list[TrialReport]:
        """All trials so far."""
        return [
            TrialReport(each.number, dict(each.params), each.value, each.state.name.lower())
            for each in self._study.get_trials(deepcopy=False)
        ]

    def best(self) -> Checkpoint:
        """The model of the best trial.

        Raises:
            TrellisError: no trial has ended well.
        """
        if not (self.folder / BEST_FOLDER).is_dir():
            raise TrellisError("no trial came to a first validation; allow more --max-time or more --trials")
        return load_checkpoint(self.folder / BEST_FOLDER)

    def _finished(self) -> list[TrialReport]:
        return [each for each in self.trials() if each.state in ("complete", "pruned")]

    def _tell(self, trial: optuna.Trial, loss: float | None = None, *, state: str) -> None:
        from optuna.trial import TrialState

        # The loss of a pruned trial is what it reported last.
        self._study.tell(trial, loss if state == "complete" else None, state=TrialState[state.upper()])

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """What proposes a trial's settings; drawn by the trial's number, so that neither searches side by side nor one
        that goes on propose what was proposed before."""
        import optuna

        seed = int(np.random.SeedSequence((self.config.training.seed, number)).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        settings = {}
        for name, values in self.space.items():
            if name == "learning_rate":
                settings[name] = trial.suggest_float(name, min(values), max(values), log=True)
            else:
                settings[name] = trial.suggest_categorical(name, values)
        return settings

    def _train(self, settings: dict[str, Any], observer: _TrialObserver, number: int) -> float:
        """Trains with these settings; the best model of all trials is kept."""
        config = self.config.replace_settings(**settings)
        config = replace(config, named=tuple(sorted({*config.named, *settings})))
        work = self.folder / f"trial-{number}"
        try:
            checkpoint, summary = fit(fit_to_time(prepare(self.panel, config)), work, observer=observer)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if summary.validation_loss < self.best_loss:
            save_checkpoint(self.folder / BEST_FOLDER, checkpoint, package_version=version("trellis-ts"))
            self._study.set_user_attr("best_loss", summary.validation_loss)
        return summary.validation_loss

    @property
    def best_loss(self) -> float:
        """The lowest validation loss of all trials; infinite before there is one."""
        return float(self._study.user_attrs.get("best_loss", math.inf))


class _TrialObserver:
    """Reports every epoch, and ends the trial where it falls behind or the search is over."""

    def __init__(self, trial: optuna.Trial, outer: TrainingObserver, end: float) -> None:
        self._trial, self._outer, self._end = trial, outer, end
        self.was_pruned = self.was_stopped = False

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None:
        self._outer.started(num_epochs=num_epochs, steps_per_epoch=steps_per_epoch, first_epoch=first_epoch)

    def stepped(self) -> None:
        self._outer.stepped()

    def epoch_ended(self, report: EpochReport) -> None:
        self._outer.epoch_ended(report)
        self._trial.report(report.validation_loss, report.epoch)
        self.was_pruned = self.was_pruned or self._trial.should_prune()

    def should_stop(self) -> bool:
        self.was_stopped = self.was_stopped or self._outer.should_stop() or time.monotonic() >= self._end
        return self.was_pruned or self.was_stopped

    def warned(self, line: str) -> None:
        self._outer.warned(line)
