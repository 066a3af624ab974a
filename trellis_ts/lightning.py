"""Thin Lightning wrappers: step, log, optimiser, loaders. No maths."""

from __future__ import annotations

import logging
import math
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

from trellis_ts.losses import forecast_loss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import Tensor

    from trellis_ts.config import TrainingConfig
    from trellis_ts.datasets.windows import WindowDataset
    from trellis_ts.model import ForecastModel
    from trellis_ts.types import Batch

_WARMUP_FRACTION = 0.05
_MAX_WARMUP_STEPS = 200


def learning_rate_factor(step: int, total_steps: int, time_fraction: float = 0.0) -> float:
    """Linear warm-up, then a cosine down to zero, along the steps or along the time allowed, whichever is further."""
    warmup = max(1, min(_MAX_WARMUP_STEPS, int(total_steps * _WARMUP_FRACTION)))
    progress = min(1.0, max(step / max(1, total_steps), time_fraction))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


class ForecastModule(lightning.LightningModule):
    """Trains a ``ForecastModel`` on batches of windows."""

    def __init__(self, model: ForecastModel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self._start_seconds = time.monotonic()

    def on_fit_start(self) -> None:
        self._start_seconds = time.monotonic()

    def _loss(self, batch: Batch) -> Tensor:
        if batch.future is None or batch.future_observed is None:
            raise ValueError("a training window needs a future")
        return forecast_loss(self.model(batch), batch.future, batch.future_observed, self.config.loss)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.context))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if batch.future_observed is None:
            raise ValueError("a validation window needs a future")
        # Weighted by what was observed, so that the mean over batches is the mean over values.
        weight = max(1, int(batch.future_observed.sum()))
        self.log("validation_loss", self._loss(batch), on_epoch=True, batch_size=weight)

    def time_fraction(self) -> float:
        """How much of the wall-clock limit is used up; 0 without a limit."""
        limit = self.config.max_time_seconds
        return 0.0 if limit is None else (time.monotonic() - self._start_seconds) / limit

    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = list(self.parameters())
        optimizer = AdamW(
            [
                {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.config.weight_decay},
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=self.config.learning_rate,
        )
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, self.time_fraction()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpochSampler(Sampler[int]):
    """A fresh random order of windows every epoch, fixed by the seed and the epoch alone, so that a resumed run sees
    the order an uninterrupted one would have seen."""

    def __init__(self, num_windows: int, *, seed: int, windows_per_epoch: int | None) -> None:
        self.num_windows = num_windows
        self.seed = seed
        self.length = min(num_windows, windows_per_epoch or num_windows)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.num_windows, generator=generator)[: self.length].tolist()


def _as_is(batch: Any) -> Any:
    """Batches come whole from the data set, not as lists of windows to be stacked."""
    return batch


class WindowDataModule(lightning.LightningDataModule):
    """Loaders over two window datasets, which gather whole batches themselves."""

    def __init__(self, train: WindowDataset, validation: WindowDataset, config: TrainingConfig) -> None:
        super().__init__()
        self.train, self.validation, self.config = train, validation, config

    def train_dataloader(self) -> DataLoader[Batch]:
        sampler = EpochSampler(len(self.train), seed=self.config.seed, windows_per_epoch=self.config.windows_per_epoch)
        return self._loader(self.train, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.validation)

    def _loader(self, windows: WindowDataset, **options: Any) -> DataLoader[Batch]:
        workers = self.config.num_workers
        return DataLoader(
            windows,
            batch_size=self.config.batch_size,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            **options,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_index: int) -> Batch:
        return batch.to(device)


@contextmanager
def quiet_lightning() -> Iterator[None]:
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
