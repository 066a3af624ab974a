"""Thin Lightning wrappers: step, log, optimiser. No maths."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from trellis_ts.loaders import NOT_COUNTED
from trellis_ts.losses import forecast_loss
from trellis_ts.model import ForecastModel
from trellis_ts.safety import AnomalyFinder, Problem, StepGuard
from trellis_ts.types import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import Tensor
    from torch.utils.data import DataLoader

    from trellis_ts.causal import CausalModel, CausalState
    from trellis_ts.config import TrainingConfig
    from trellis_ts.types import Segment

_LOGGER = logging.getLogger(__name__)
_WARMUP_FRACTION = 0.05
_MAX_WARMUP_STEPS = 200
# Of the learning rate, for weights that start from a solution: at the full rate a few steps would lose it.
_SOLVED_RATE = 0.1
# Seeds of processes and epochs are to differ.
_MOST_RANKS = 1009


def learning_rate_factor(step: int, total_steps: int, time_fraction: float = 0.0) -> float:
    """Linear warm-up, then a cosine down to zero, along the steps or along the time allowed, whichever is further."""
    warmup = max(1, min(_MAX_WARMUP_STEPS, int(total_steps * _WARMUP_FRACTION)))
    progress = min(1.0, max(step / max(1, total_steps), time_fraction))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))


class _Step(NamedTuple):
    """A step under way."""

    batch: Batch | Segment
    loss: Tensor
    """Over all processes."""
    weight: int
    """In the mean of the epoch."""


class ForecastModule(lightning.LightningModule):
    """Trains a ``ForecastModel`` on batches of windows."""

    def __init__(
        self, model: ForecastModel | CausalModel, config: TrainingConfig, guard: StepGuard | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.guard = guard or StepGuard(None, _LOGGER.warning)
        self.anomalies: AnomalyFinder | None = None
        self._step: _Step | None = None
        self._clock: float | None = None
        self.average = copy.deepcopy(model).requires_grad_(False) if config.average_steps else None
        """What is validated and kept where the weights are averaged."""
        self._start_seconds = time.monotonic()

    def on_fit_start(self) -> None:
        self._start_seconds = time.monotonic()

    @property
    def kept_model(self) -> ForecastModel | CausalModel:
        """The model that is validated and kept: the average of the weights where there is one."""
        return self.model if self.average is None else self.average

    def on_train_epoch_start(self) -> None:
        # Dropout's numbers are fixed by the epoch alone, so that a resumed run draws those of an uninterrupted one.
        epoch = self.config.seed * 1_000_003 + self.trainer.current_epoch
        torch.manual_seed(epoch * _MOST_RANKS + self.trainer.global_rank)

    def on_train_batch_start(self, batch: Batch | Segment, batch_index: int) -> None:
        if self.anomalies is not None:
            self.anomalies.batch = batch

    def on_validation_batch_start(self, batch: Batch | Segment, batch_index: int, loader_index: int = 0) -> None:
        self.on_train_batch_start(batch, batch_index)

    def _loss(self, model: ForecastModel | CausalModel, batch: Batch) -> Tensor:
        if batch.future is None or batch.future_observed is None:
            raise ValueError("a training window needs a future")
        return forecast_loss(model(batch), batch.future, batch.future_observed, self.config.loss)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self._trained_on(batch, self._loss(self.model, batch), len(batch.context))

    def _trained_on(self, batch: Batch | Segment, loss: Tensor, weight: int) -> Tensor:
        """Notes the loss of a batch, by its weight in the epoch's mean; gives what is to be differentiated.

        Lightning averages gradients over processes, so each one's loss is weighted by its share of observed values.
        """
        self._step = _Step(batch, loss.detach(), weight)
        if self.trainer.world_size == 1 or not isinstance(batch, Batch):
            return loss
        num_values, num_windows = _num_values(batch), int((batch.series != NOT_COUNTED).sum())
        total, num_all, num_windows_all = self._over_ranks(float(loss.detach()) * num_values, num_values, num_windows)
        self._step = _Step(batch, torch.tensor(total / max(1.0, num_all)), round(num_windows_all))
        return loss * (num_values * self.trainer.world_size / max(1.0, num_all))

    def _over_ranks(self, *values: float) -> list[float]:
        """Sums over the processes that train together."""
        if self.trainer.world_size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        summed: Tensor = self.trainer.strategy.reduce(together, reduce_op="sum")
        return summed.tolist()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clips the gradient, or leaves the step out if it or the loss is not finite: the same on all processes."""
        if self._step is None:
            raise AssertionError("a step begins with a loss")
        weights = [each for group in optimizer.param_groups for each in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.config.gradient_clip)
        loss = self._step.loss.to(norm.device)
        # In half precision the gradient scaler tries scales that overflow, and leaves those steps out by itself.
        if torch.isfinite(loss if self.config.precision == "16-mixed" else loss + norm):
            self.guard.passed()
            return
        for each in weights:
            each.grad = None  # the optimizer passes over weights without a gradient, and keeps their moments
        what = "gradient" if torch.isfinite(loss) else "loss"
        self.guard.left_out(Problem(self._step.batch, what), self.trainer.global_step + 1)
        self._step = None

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        # Weighted by what was observed, so that the mean over batches is the mean over values.
        self._validated_on(self._loss(self.kept_model, batch), _num_values(batch))

    def _validated_on(self, loss: Tensor, num_values: int) -> None:
        if self.trainer.world_size > 1:
            total, count = self._over_ranks(float(loss) * num_values, num_values)
            loss, num_values = torch.tensor(total / max(1.0, count)), round(count)
        self.log("validation_loss", loss, on_epoch=True, batch_size=max(1, num_values))

    @torch.inference_mode()
    def score(self, loader: DataLoader[Batch]) -> float:
        """The loss of the kept model over a loader's windows, as a validation would find it; on the model's device."""
        device = next(self.model.parameters()).device
        total, count = 0.0, 0
        model = self.kept_model.eval()
        for batch in loader:
            weight = _num_values(batch)
            total += weight * float(self._loss(model, batch.to(device)))
            count += weight
        model.train()
        return total / max(1, count)

    def on_train_batch_end(self, *_: Any) -> None:
        if self._step is not None:
            self.log("train_loss", self._step.loss, on_step=False, on_epoch=True, batch_size=self._step.weight)
            self._step = None
        if self.trainer.world_size > 1 and self.config.max_time is not None:
            self._clock = self.trainer.strategy.broadcast(time.monotonic() - self._start_seconds)
        if self.average is not None:
            # Early on the average is over fewer steps, so that the first weights are forgotten soon.
            share = 1 / min(self.config.average_steps, 1 + self.trainer.global_step / 2)
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                    mean.lerp_(value, share)

    def time_fraction(self) -> float:
        """How much of the wall-clock limit is used up; 0 without a limit. Of several processes the first one's clock
        counts, as it was read after the last step."""
        limit = self.config.max_time_seconds
        if limit is None:
            return 0.0
        seconds = time.monotonic() - self._start_seconds if self._clock is None else self._clock
        return seconds / limit

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

    def __init__(self, model: CausalModel, config: TrainingConfig, guard: StepGuard | None = None) -> None:
        super().__init__(model, config, guard)
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
        loss, num_values = self._score(self.model, batch)
        if not math.isfinite(float(loss.detach())):
            self._state = None  # what was carried along may be to blame
        return self._trained_on(batch, loss, max(1, num_values))

    def validation_step(self, batch: Segment, batch_index: int) -> None:  # type: ignore[override]
        loss, weight = self._score(self.kept_model, batch)
        if weight:  # segments before the validation rows only bring the memory up to date
            self._validated_on(loss, weight)

    def on_validation_epoch_start(self) -> None:
        self._state = None


def _num_values(batch: Batch) -> int:
    """Observed values of the futures, over which a loss is the mean."""
    if batch.future_observed is None:
        raise ValueError("a window to learn from needs a future")
    return int(batch.future_observed.sum())


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
