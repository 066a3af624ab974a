"""Thin Lightning wrappers: step, log, optimiser, loaders. No maths."""

from __future__ import annotations

import copy
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
from trellis_ts.model import ForecastModel
from trellis_ts.shuffling import RandomOrder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import Tensor

    from trellis_ts.causal import CausalModel, CausalState
    from trellis_ts.config import TrainingConfig
    from trellis_ts.datasets.streams import Group, SegmentDataset
    from trellis_ts.datasets.windows import WindowDataset
    from trellis_ts.types import Batch, Segment

_WARMUP_FRACTION = 0.05
_MAX_WARMUP_STEPS = 200
# More windows than this are not shuffled in memory.
_MOST_SHUFFLED = 1 << 20
_DRAWN_AT_ONCE = 4096
# Of the learning rate, for weights that start from a solution: at the full rate a few steps would lose it.
_SOLVED_RATE = 0.1


def learning_rate_factor(step: int, total_steps: int, time_fraction: float = 0.0) -> float:
    """Linear warm-up, then a cosine down to zero, along the steps or along the time allowed, whichever is further."""
    warmup = max(1, min(_MAX_WARMUP_STEPS, int(total_steps * _WARMUP_FRACTION)))
    progress = min(1.0, max(step / max(1, total_steps), time_fraction))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


class ForecastModule(lightning.LightningModule):
    """Trains a ``ForecastModel`` on batches of windows."""

    def __init__(self, model: ForecastModel | CausalModel, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.average = copy.deepcopy(model).requires_grad_(False) if config.average_steps else None
        """What is validated and kept where the weights are averaged."""
        self._start_seconds = time.monotonic()

    def on_fit_start(self) -> None:
        self._start_seconds = time.monotonic()

    @property
    def kept_model(self) -> ForecastModel | CausalModel:
        """The model that is validated and kept: the average of the weights where there is one."""
        return self.model if self.average is None else self.average

    def _loss(self, model: ForecastModel | CausalModel, batch: Batch) -> Tensor:
        if batch.future is None or batch.future_observed is None:
            raise ValueError("a training window needs a future")
        return forecast_loss(model(batch), batch.future, batch.future_observed, self.config.loss)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        loss = self._loss(self.model, batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch.context))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if batch.future_observed is None:
            raise ValueError("a validation window needs a future")
        # Weighted by what was observed, so that the mean over batches is the mean over values.
        weight = max(1, int(batch.future_observed.sum()))
        self.log("validation_loss", self._loss(self.kept_model, batch), on_epoch=True, batch_size=weight)

    @torch.inference_mode()
    def score(self, loader: DataLoader[Batch]) -> float:
        """The loss of the kept model over a loader's windows, as a validation would find it; on the model's device."""
        device = next(self.model.parameters()).device
        total, count = 0.0, 0
        model = self.kept_model.eval()
        for batch in loader:
            weight = 0 if batch.future_observed is None else int(batch.future_observed.sum())
            total += weight * float(self._loss(model, batch.to(device)))
            count += weight
        model.train()
        return total / max(1, count)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.average is not None:
            # Early on the average is over fewer steps, so that the first weights are forgotten soon.
            share = 1 / min(self.config.average_steps, 1 + self.trainer.global_step / 2)
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, share)

    def time_fraction(self) -> float:
        """How much of the wall-clock limit is used up; 0 without a limit."""
        limit = self.config.max_time_seconds
        return 0.0 if limit is None else (time.monotonic() - self._start_seconds) / limit

    def _solved_parameters(self) -> list[torch.nn.Parameter]:
        """Those that start from a solution (``trellis_ts.linear_start``)."""
        if self.config.initial_skip == "zero" or not isinstance(self.model, ForecastModel) or self.model.skip is None:
            return []
        return [*self.model.skip.parameters(), *self.model.head.projection.parameters()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        rate, decay = self.config.learning_rate, self.config.weight_decay
        solved = self._solved_parameters()
        others = [each for each in self.model.parameters() if not any(each is one for one in solved)]
        groups: list[dict[str, Any]] = [
            {"params": [each for each in others if each.ndim >= 2], "weight_decay": decay},
            {"params": [each for each in others if each.ndim < 2], "weight_decay": 0.0},
        ]
        if solved:
            groups.append({"params": solved, "weight_decay": 0.0, "lr": rate * _SOLVED_RATE})
        optimizer = AdamW(groups, lr=rate)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, self.time_fraction()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StreamModule(ForecastModule):
    """Trains a ``CausalModel`` on segments that follow one another, the state carried along without its gradients."""

    model: CausalModel
    kept_model: CausalModel

    def __init__(self, model: CausalModel, config: TrainingConfig) -> None:
        super().__init__(model, config)
        self._state: CausalState | None = None

    def _score(self, model: CausalModel, segment: Segment) -> tuple[Tensor, int]:
        """The loss of a segment's forecasts, and over how many values it is the mean."""
        if segment.future is None or segment.future_observed is None:
            raise ValueError("a training segment needs a future")
        if segment.is_first or self._state is None:
            self._state = model.start(len(segment.values))
        forecast, is_started, state = model(segment, self._state)
        self._state = state.detach()
        is_scored = segment.future_observed & is_started[:, None]
        return forecast_loss(forecast, segment.future, is_scored, self.config.loss), int(is_scored.sum())

    def training_step(self, batch: Segment, batch_index: int) -> Tensor:  # type: ignore[override]
        loss, weight = self._score(self.model, batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=max(1, weight))
        return loss

    def validation_step(self, batch: Segment, batch_index: int) -> None:  # type: ignore[override]
        loss, weight = self._score(self.kept_model, batch)
        if weight:  # segments before the validation rows only bring the memory up to date
            self.log("validation_loss", loss, on_epoch=True, batch_size=weight)

    def on_validation_epoch_start(self) -> None:
        self._state = None


class EpochSampler(Sampler[int]):
    """A fresh random order of windows every epoch, fixed by the seed and the epoch alone, so that a resumed run sees
    the order an uninterrupted one would have seen.

    Of very many windows the order is computed as it is read, a few thousand at a time: an epoch of
    ``windows_per_epoch`` then costs the same however many there are, and no list of all is ever held.
    """

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
        if self.num_windows <= _MOST_SHUFFLED:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.num_windows, generator=generator)[: self.length]
            for start in range(0, self.length, _DRAWN_AT_ONCE):  # a list of all would hold five times the memory
                yield from order[start : start + _DRAWN_AT_ONCE].tolist()
            return
        computed = RandomOrder(self.num_windows, (self.seed, self.epoch))
        for start in range(0, self.length, _DRAWN_AT_ONCE):
            yield from computed.at(start, min(start + _DRAWN_AT_ONCE, self.length)).tolist()


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


class SegmentSampler(Sampler["tuple[Group, int]"]):
    """Segments in order, groups of streams drawn anew every epoch, fixed by the seed and the epoch alone."""

    def __init__(self, segments: SegmentDataset, *, seed: int) -> None:
        self.segments, self.seed, self.epoch = segments, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def _groups(self) -> list[Group]:
        return self.segments.random_groups(self.seed * 1_000_003 + self.epoch)

    def __len__(self) -> int:
        return sum(group.num_segments for group in self._groups())

    def __iter__(self) -> Iterator[tuple[Group, int]]:
        for group in self._groups():
            yield from ((group, number) for number in range(group.num_segments))


class SegmentDataModule(lightning.LightningDataModule):
    """Loaders over segments: at random for training, all in order for validation."""

    def __init__(self, train: SegmentDataset, validation: SegmentDataset, config: TrainingConfig) -> None:
        super().__init__()
        self.train, self.validation, self.config = train, validation, config

    def train_dataloader(self) -> DataLoader[Segment]:
        return self._loader(self.train, SegmentSampler(self.train, seed=self.config.seed))

    def val_dataloader(self) -> DataLoader[Segment]:
        groups = self.validation.all_groups(self.config.validation_windows)
        return self._loader(
            self.validation, [(group, number) for group in groups for number in range(group.num_segments)]
        )

    def _loader(self, segments: SegmentDataset, order: Any) -> DataLoader[Segment]:
        workers = self.config.num_workers
        return DataLoader(segments, batch_size=None, sampler=order, num_workers=workers, persistent_workers=workers > 0)

    def transfer_batch_to_device(self, batch: Segment, device: torch.device, dataloader_index: int) -> Segment:
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
