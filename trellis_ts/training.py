"""From what was prepared to a trained model."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from trellis_ts.causal import CausalModel
from trellis_ts.checkpoints import Checkpoint, DataRecord, SeriesRecord, build_model
from trellis_ts.conformal import calibrate
from trellis_ts.devices import resolve_device
from trellis_ts.errors import CheckpointError, ConfigError, TrellisError
from trellis_ts.kernels import precompile
from trellis_ts.lightning import ForecastModule, SegmentDataModule, StreamModule, WindowDataModule, quiet_lightning
from trellis_ts.linear_start import start_from_linear
from trellis_ts.passes import HistoryPass

if TYPE_CHECKING:
    from trellis_ts.model import ForecastModel
    from trellis_ts.preparation import Preparation


StopReason = Literal["epochs", "patience", "time", "interrupted"]


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

    Logs (``log.csv`` and TensorBoard) and the state to resume from go to ``directory``, whose checkpoints are private:
    only those this function wrote itself are ever read back.

    Raises:
        TrellisError: training diverged before a first epoch ended well, or there is nothing to resume.
    """
    observer = observer or SilentObserver()
    training = preparation.config.training
    directory.mkdir(parents=True, exist_ok=True)
    last = directory / "last.ckpt"
    if resume:
        _check_state(last)
    model_config = preparation.config.model
    if "trellis" in (model_config.mixer, model_config.channel_mixing) and resolve_device(training.device) == "cpu":
        precompile()  # on the first run on a machine, before the clock starts
    start_seconds = time.monotonic()
    with quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(training.seed)
        model = build_model(preparation.config, preparation.shape, implementation=training.implementation)
        if start is not None:
            model.load_state_dict(start.model.state_dict())
        begin = None if isinstance(model, CausalModel) else _begin(model, preparation, directory, start, resume=resume)
        module, data = _wrapped(model, preparation)
        keep_best = ModelCheckpoint(
            dirpath=directory, filename="best", monitor="validation_loss", enable_version_counter=False
        )
        # Lightning's own save_last follows the best epoch only.
        keep_last = ModelCheckpoint(dirpath=directory, filename="last", enable_version_counter=False)
        patience = _Patience("validation_loss", patience=training.patience, check_finite=True)
        reports = _Reports(directory / "log.csv", observer, append=resume)
        trainer = lightning.Trainer(
            **_placement(training.device),
            precision=training.precision,
            max_epochs=training.max_epochs,
            gradient_clip_val=training.gradient_clip,
            callbacks=[patience, reports, keep_best, keep_last],
            logger=TensorBoardLogger(directory, name="", version="tensorboard"),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
        )
        trainer.fit(module, data, ckpt_path=last if resume else None, weights_only=True)
    if keep_best.best_model_score is None or not math.isfinite(float(keep_best.best_model_score)):
        raise TrellisError("training diverged: the validation loss is not a number; lower --learning-rate")
    best = torch.load(keep_best.best_model_path, map_location="cpu", weights_only=True)
    best_epoch, validation_loss = int(best["epoch"]) + 1, float(keep_best.best_model_score)
    module.load_state_dict(best["state_dict"])
    model = module.kept_model.requires_grad_(True)
    if begin is not None and begin.validation_loss <= validation_loss:
        best_epoch, validation_loss = 0, begin.validation_loss
        model.load_state_dict(begin.weights)
    summary = TrainingSummary(
        stop_reason=reports.stop_reason or ("patience" if patience.stopped_epoch else "epochs"),
        num_epochs=reports.num_epochs,
        best_epoch=best_epoch,
        validation_loss=validation_loss,
        seconds=time.monotonic() - start_seconds,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_windows=len(preparation.segments[0] if preparation.segments else preparation.train),
        validation_windows=len(preparation.validation),
        left_out_series=preparation.left_out_series,
    )
    device = torch.device(resolve_device(training.device))
    model.to(device).eval()
    predict = HistoryPass(model, preparation.validation.panel, device) if isinstance(model, CausalModel) else model
    calibration = calibrate(predict, preparation.validation, device=device)
    checkpoint = Checkpoint(model.cpu(), preparation.config, _record(preparation), calibration, preparation.reasons)
    return checkpoint, summary


class _Begin(NamedTuple):
    """The weights before the first step, which may remain the best."""

    validation_loss: float
    weights: dict[str, torch.Tensor]


def _begin(
    model: ForecastModel, preparation: Preparation, directory: Path, start: Checkpoint | None, *, resume: bool
) -> _Begin | None:
    """Solves for the weights to begin with, or takes those of the start, and scores them; None where they are random.

    A resumed run reads what it wrote.
    """
    training, path = preparation.config.training, directory / "begin.ckpt"
    if resume:
        return _Begin(**torch.load(path, map_location="cpu", weights_only=True)) if path.is_file() else None
    path.unlink(missing_ok=True)
    if start is None and training.initial_skip == "zero":
        return None
    if start is None:
        generator = torch.Generator().manual_seed(training.seed)
        start_from_linear(model, preparation.train, preparation.seasons, generator)
    module = ForecastModule(model.to(resolve_device(training.device)), training)
    data = WindowDataModule(preparation.train, preparation.validation, training)
    begin = _Begin(module.score(data.val_dataloader()), {k: v.cpu().clone() for k, v in model.state_dict().items()})
    model.cpu()
    torch.save(begin._asdict(), path)
    return begin


def _wrapped(
    model: ForecastModel | CausalModel, preparation: Preparation
) -> tuple[ForecastModule, WindowDataModule | SegmentDataModule]:
    """The model and its data as Lightning takes them."""
    training = preparation.config.training
    if isinstance(model, CausalModel) and preparation.segments is not None:
        return StreamModule(model, training), SegmentDataModule(*preparation.segments, training)
    return ForecastModule(model, training), WindowDataModule(preparation.train, preparation.validation, training)


def _check_state(path: Path) -> None:
    """Refuses a state that cannot be resumed from before anything is built."""
    if not path.is_file():
        raise ConfigError(f"nothing to resume: {path} does not exist; train without --resume")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in whatever way its bytes suggest
        raise CheckpointError(f"{path} is damaged and cannot be resumed from; train anew with --overwrite") from error


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


def _placement(device: str) -> dict[str, Any]:
    """Lightning's words for a device."""
    kind, _, index = resolve_device(device).partition(":")
    return {"accelerator": kind, "devices": [int(index)] if index else 1}


class _Patience(EarlyStopping):
    """Early stopping whose patience is today's after a resumption, not the one in the state that was resumed."""

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

    def _write(self, row: list[Any], mode: Literal["w", "a"] = "a") -> None:
        with self._log.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.observer.started(
            num_epochs=int(trainer.max_epochs or 0),
            steps_per_epoch=int(trainer.num_training_batches),
            first_epoch=trainer.current_epoch,
        )

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self.observer.stepped()
        if self.observer.should_stop():
            self.stop_reason = "interrupted"
        elif pl_module.time_fraction() >= 1:
            self.stop_reason = "time"
        if self.stop_reason is not None:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        metrics = trainer.callback_metrics
        validation_loss = float(metrics["validation_loss"])
        report = EpochReport(
            epoch=trainer.current_epoch + 1,
            step=trainer.global_step,
            seconds=time.monotonic() - self._start,
            train_loss=float(metrics["train_loss"]),
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
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]
