"""From what was prepared to a trained model."""

from __future__ import annotations

import csv
import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from trellis_ts.causal import CausalModel
from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord, build_model
from trellis_ts.conformal import calibrate
from trellis_ts.devices import resolve_device
from trellis_ts.errors import ConfigError, TrellisError
from trellis_ts.files import replace_file
from trellis_ts.kernels import precompile
from trellis_ts.lightning import ForecastModule, StreamModule, quiet_lightning
from trellis_ts.linear_start import start_from_linear
from trellis_ts.loaders import SegmentDataModule, WindowDataModule
from trellis_ts.passes import HistoryPass
from trellis_ts.recovery import STATE_FILE, KeepBest, KeepState, SafeCheckpoints, read_state
from trellis_ts.safety import AnomalyFinder, StepGuard

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trellis_ts.config import TrainingConfig
    from trellis_ts.model import ForecastModel
    from trellis_ts.preparation import Preparation


StopReason = Literal["epochs", "patience", "time", "interrupted", "diverged"]


@dataclass(frozen=True)
class EpochReport:
    """One finished epoch; losses are means over observed values on the standardised scale."""

    epoch: int
    step: int
    seconds: float
    train_loss: float
    validation_loss: float
    learning_rate: float
    is_best: bool


class TrainingObserver(Protocol):
    """Hears how training goes; the command line draws its progress bar this way."""

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None: ...

    def stepped(self) -> None: ...

    def epoch_ended(self, report: EpochReport) -> None: ...

    def should_stop(self) -> bool: ...

    def warned(self, line: str) -> None: ...


class SilentObserver:
    """Hears and says nothing."""

    def started(self, *, num_epochs: int, steps_per_epoch: int, first_epoch: int) -> None:
        pass

    def stepped(self) -> None:
        pass

    def epoch_ended(self, report: EpochReport) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def warned(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class TrainingSummary:
    """How a training run went."""

    stop_reason: StopReason
    num_epochs: int
    best_epoch: int
    validation_loss: float
    seconds: float
    num_parameters: int
    train_windows: int
    validation_windows: int
    left_out_series: int
    """Series too short to train on; they can still be forecast."""
    left_out_steps: int
    """Steps left out because their loss or gradient was not finite."""


def fit(
    preparation: Preparation,
    directory: Path,
    *,
    observer: TrainingObserver | None = None,
    resume: bool = False,
    start: Checkpoint | None = None,
) -> tuple[Checkpoint, TrainingSummary]:
    """Trains, keeping the weights of the epoch with the lowest validation loss, and calibrates on the same windows.

    Where training begins from a solved or a trained model, that one is kept if no epoch is better ("epoch 0").
    ``start`` is a model of the same network, whose weights are the first.

    Logs (``log.csv`` and TensorBoard) and the state to resume from go to ``directory``. A step whose loss or gradient
    is not finite is left out; ten in a row end the training, with the best epoch before them.

    Of several processes (``devices``), each returns the whole model, and the first one writes.

    Raises:
        CheckpointError: the state to resume from is damaged.
        ConfigError: there is nothing to resume, or there are not so many devices.
        TrellisError: training diverged before a first epoch ended well.
    """
    observer = observer or SilentObserver()
    training = preparation.config.training
    placement = _placement(training)
    directory.mkdir(parents=True, exist_ok=True)
    state = directory / STATE_FILE
    if resume:
        _check_state(state)
    for each in directory.glob(f".{STATE_FILE}.*"):  # what a killed run was writing
        each.unlink(missing_ok=True)
    model_config = preparation.config.model
    if "trellis" in (model_config.mixer, model_config.channel_mixing) and resolve_device(training.device) == "cpu":
        precompile()  # on the first run on a machine, before the clock starts
    start_seconds = time.monotonic()
    with quiet_lightning(), torch.random.fork_rng(), _deterministic(training.deterministic):
        torch.manual_seed(training.seed)
        model = build_model(preparation.config, preparation.shape, implementation=training.implementation)
        if start is not None:
            model.load_state_dict(start.model.state_dict())
        best = KeepBest()
        if not resume and not isinstance(model, CausalModel):
            best = _begin(model, preparation, is_start_known=start is not None)
        guard = StepGuard(preparation.splits.panel, observer.warned)
        module, data = _wrapped(model, preparation, guard)
        patience = _Patience("validation_loss", patience=training.patience, check_finite=True)
        reports = _Reports(directory / "log.csv", observer, append=resume)
        trainer = lightning.Trainer(
            **placement,
            precision=training.precision,
            max_epochs=training.max_epochs,
            gradient_clip_val=training.gradient_clip,
            callbacks=[best, patience, reports, KeepState(state, lambda: reports.stop_reason == "interrupted")],
            plugins=[SafeCheckpoints(), *_surroundings(training)],
            logger=TensorBoardLogger(directory, name="", version="tensorboard"),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            use_distributed_sampler=False,
        )
        if training.detect_anomaly:
            module.anomalies = AnomalyFinder(model, preparation.splits.panel)
        trainer.fit(module, data, ckpt_path=state if resume else None)
        if module.anomalies is not None:
            module.anomalies.remove()
        stop_reason: StopReason = reports.stop_reason or patience.reason or "epochs"
        if best.weights is None or not best.num_finite or (stop_reason == "diverged" and not best.epoch):
            raise TrellisError("training diverged: losses are no longer finite; lower --learning-rate")
        model.load_state_dict(best.weights)
        summary = TrainingSummary(
            stop_reason=stop_reason,
            num_epochs=reports.num_epochs,
            best_epoch=best.epoch,
            validation_loss=best.validation_loss,
            seconds=time.monotonic() - start_seconds,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            train_windows=len(preparation.segments[0] if preparation.segments else preparation.train),
            validation_windows=len(preparation.validation),
            left_out_series=preparation.left_out_series,
            left_out_steps=guard.num_left_out,
        )
        device = torch.device(resolve_device(training.device))
        model.to(device).eval()
        predict = HistoryPass(model, preparation.validation.panel, device) if isinstance(model, CausalModel) else model
        calibration = calibrate(predict, preparation.validation, device=device)
    checkpoint = Checkpoint(model.cpu(), preparation.config, _record(preparation), calibration, preparation.reasons)
    return checkpoint, summary


def _begin(model: ForecastModel, preparation: Preparation, *, is_start_known: bool) -> KeepBest:
    """Solves for the weights to begin with, or takes those of a trained model, and scores them: they may remain the
    best. Nothing is remembered of random ones."""
    training = preparation.config.training
    if not is_start_known and training.initial_skip == "zero":
        return KeepBest()
    if not is_start_known:
        generator = torch.Generator().manual_seed(training.seed)
        start_from_linear(model, preparation.train, preparation.seasons, generator)
    module = ForecastModule(model.to(resolve_device(training.device)), training)
    data = WindowDataModule(preparation.train, preparation.validation, training)
    best = KeepBest(module.score(data.val_dataloader()), {k: v.cpu().clone() for k, v in model.state_dict().items()})
    model.cpu()
    return best


def _wrapped(
    model: ForecastModel | CausalModel, preparation: Preparation, guard: StepGuard
) -> tuple[ForecastModule, WindowDataModule | SegmentDataModule]:
    """The model and its data as Lightning takes them."""
    training = preparation.config.training
    if isinstance(model, CausalModel) and preparation.segments is not None:
        return StreamModule(model, training, guard), SegmentDataModule(*preparation.segments, training)
    return ForecastModule(model, training, guard), WindowDataModule(preparation.train, preparation.validation, training)


def _check_state(path: Path) -> None:
    """Refuses a state that cannot be resumed from before anything is built."""
    if not path.is_file():
        raise ConfigError(f"nothing to resume: {path} does not exist; train without --resume")
    read_state(path)


def _record(preparation: Preparation) -> DataRecord:
    panel, scaler = preparation.splits.panel, preparation.splits.scaler
    series = []
    for index, (each, border) in enumerate(zip(panel.series, preparation.splits.borders, strict=True)):
        known = border.validation[1]
        if known == 0:  # all its rows are held out: it is as new to the model as one training never saw
            continue
        series.append(
            SeriesRecord(
                name=each.name,
                loc=tuple(scaler.loc[index].tolist()),
                scale=tuple(scaler.scale[index].tolist()),
                known_until=int(each.time[known - 1].astype("datetime64[ns]").astype("int64")),
            )
        )
    return DataRecord(
        time_column=panel.columns.time,
        id_column=panel.columns.id,
        channels=panel.channels,
        freq=panel.freq,
        timezone=panel.timezone,
        dataset=panel.dataset,
        series=(*series, *preparation.known),
        covariates=scaler.covariates.covariates,
        day_first=panel.day_first,
    )


@contextmanager
def _deterministic(is_asked_for: bool) -> Iterator[None]:
    """Operations that repeat their bits, until the end of the block."""
    before = torch.are_deterministic_algorithms_enabled()
    if is_asked_for:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's linear algebra is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _placement(training: TrainingConfig) -> dict[str, Any]:
    """Lightning's words for where to train.

    Raises:
        ConfigError: there are not so many devices.
    """
    kind, _, index = resolve_device(training.device).partition(":")
    if training.num_processes == 1:
        return {"accelerator": kind, "devices": [int(index)] if index else 1}
    if index or kind == "mps" or (kind == "cuda" and training.devices > torch.cuda.device_count()):
        raise ConfigError(
            f"devices={training.devices} cannot be had of device '{training.device}'; lower --devices, or use --device "
            "cpu for as many processes"
        )
    strategy = DDPStrategy(process_group_backend="gloo" if kind == "cpu" else "nccl")
    return {"accelerator": kind, "devices": training.devices, "num_nodes": training.num_nodes, "strategy": strategy}


def _surroundings(training: TrainingConfig) -> list[LightningEnvironment]:
    """Several trainings of one process each, started by torchrun or SLURM, are no business of one another."""
    return [LightningEnvironment()] if training.num_processes == 1 else []


class _Patience(EarlyStopping):
    """Early stopping whose patience is today's after a resumption, not the one in the state that was resumed."""

    is_finite = True
    """Whether the last validation loss was."""

    @property
    def reason(self) -> StopReason | None:
        """Why it ended the training, if it did."""
        if self.wait_count >= self.patience:
            return "patience"
        return None if self.is_finite else "diverged"

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.is_finite = math.isfinite(float(trainer.callback_metrics["validation_loss"]))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.wait_count >= self.patience:  # it had run out when the run was ended
            trainer.should_stop = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience, "stopped_epoch": 0})


class _Reports(lightning.Callback):
    """Writes the log, tells the observer, and stops on time or on request."""

    def __init__(self, log: Path, observer: TrainingObserver, *, append: bool) -> None:
        self.observer = observer
        self.stop_reason: StopReason | None = None
        self.num_epochs = 0
        self._best = math.inf
        self._start = time.monotonic()
        self._log = log
        if not append or not log.exists():
            self._write(["epoch", "step", "seconds", "train_loss", "validation_loss", "learning_rate"], mode="w")

    @rank_zero_only
    def _cut_log(self, num_epochs: int) -> None:
        """Takes out what a killed run wrote after the state that is resumed from."""
        header, *rows = self._log.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= num_epochs]
        if len(kept) < len(rows):
            replace_file(self._log, "".join([header, *kept]).encode())

    @rank_zero_only
    def _write(self, row: list[Any], mode: Literal["w", "a"] = "a") -> None:
        with self._log.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._cut_log(trainer.current_epoch)
        self.observer.started(
            num_epochs=int(trainer.max_epochs or 0),
            steps_per_epoch=int(trainer.num_training_batches),
            first_epoch=trainer.current_epoch,
        )

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.observer.stepped()
        # The user may have told only one of several processes, and all have to stop at the same step.
        if trainer.strategy.reduce_boolean_decision(self.observer.should_stop(), all=False):
            self.stop_reason = "interrupted"
        elif pl_module.time_fraction() >= 1:
            self.stop_reason = "time"
        elif pl_module.guard.has_given_up:
            self.stop_reason = "diverged"
        if self.stop_reason is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        validation_loss = float(metrics["validation_loss"])
        report = EpochReport(
            epoch=trainer.current_epoch + 1,
            step=trainer.global_step,
            seconds=time.monotonic() - self._start,
            train_loss=float(metrics.get("train_loss", math.nan)),  # all steps of it may have been left out
            validation_loss=validation_loss,
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            is_best=validation_loss < self._best,
        )
        self._best = min(self._best, validation_loss)
        self.num_epochs = report.epoch
        self._write(
            [
                report.epoch,
                report.step,
                f"{report.seconds:.2f}",
                f"{report.train_loss:.6g}",
                f"{report.validation_loss:.6g}",
                f"{report.learning_rate:.3g}",
            ]
        )
        self.observer.epoch_ended(report)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "num_epochs": self.num_epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best, self.num_epochs = state_dict["best"], state_dict["num_epochs"]
