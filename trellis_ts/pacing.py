"""Epochs short enough for a time limit: measured before the clock starts, so that several validations happen."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts.checkpoints import build_model
from trellis_ts.devices import resolve_device
from trellis_ts.losses import forecast_loss
from trellis_ts.model import ForecastModel
from trellis_ts.preparation import windows_of

if TYPE_CHECKING:
    from trellis_ts.preparation import Preparation

# Validations that a run should come to see before its time is up.
_LEAST_VALIDATIONS = 8
# Of an epoch's time, for its validation; and of a training step's time, for as many windows without gradients.
_VALIDATION_SHARE, _FORWARD_SHARE = 0.25, 0.35
_MEASURED_STEPS = 3
# What the loop around a step takes, and the machine's other work, on top of what is measured.
_MARGIN = 1.3


def fit_to_time(preparation: Preparation) -> Preparation:
    """Shortens the epochs where the time limit would see fewer than eight of them (or of those asked for).

    A few steps of a copy of the model are timed, which also compiles the kernels. Without a limit, where all fits,
    where ``windows_per_epoch`` was named, and for several processes (which would measure different times), nothing is
    changed.
    """
    training = preparation.config.training
    limit = training.max_time_seconds
    if (
        limit is None
        or training.num_processes > 1
        or preparation.segments is not None
        or "windows_per_epoch" in preparation.config.named
    ):
        return preparation
    step_seconds = _seconds_per_step(preparation)
    batch_size, num_windows = training.batch_size, len(preparation.train)
    forward_seconds = _FORWARD_SHARE * step_seconds
    epoch_seconds = (
        math.ceil(min(training.windows_per_epoch or num_windows, num_windows) / batch_size) * step_seconds
        + math.ceil(len(preparation.validation) / batch_size) * forward_seconds
    )
    wanted = min(_LEAST_VALIDATIONS, training.max_epochs)
    if limit / epoch_seconds >= wanted:
        return preparation
    share = _VALIDATION_SHARE * limit / wanted
    validation_windows = len(preparation.validation)
    if "validation_windows" not in preparation.config.named:
        validation_windows = min(validation_windows, batch_size * max(1, int(share / forward_seconds)))
    rest = limit / wanted - math.ceil(validation_windows / batch_size) * forward_seconds
    windows_per_epoch = min(num_windows, batch_size * max(1, int(rest / step_seconds)))
    config = preparation.config.replace_settings(
        windows_per_epoch=windows_per_epoch, validation_windows=validation_windows
    )
    reason = (
        f"a step takes {1000 * step_seconds:,.0f} ms here: epochs of {windows_per_epoch:,} windows and "
        f"{validation_windows:,} to validate, so that {training.max_time} holds {wanted}"
    )
    return replace(
        preparation,
        config=config,
        validation=windows_of(
            preparation.validation.panel, preparation.splits, preparation.shape, "validation", validation_windows
        ),
        reasons=(*preparation.reasons, reason),
    )


def _seconds_per_step(preparation: Preparation) -> float:
    """The mean of a few training steps on windows from everywhere, after one that compiles, and a margin."""
    training, windows = preparation.config.training, preparation.train
    device = torch.device(resolve_device(training.device))
    index = np.linspace(0, len(windows) - 1, min(training.batch_size, len(windows))).round().astype(int).tolist()
    with torch.random.fork_rng():
        model = build_model(preparation.config, preparation.shape, implementation=training.implementation)
        if not isinstance(model, ForecastModel):
            raise TypeError("only a model of windows can be paced")
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        begin = time.perf_counter()
        for step in range(1 + _MEASURED_STEPS):
            begin = time.perf_counter() if step == 1 else begin
            batch = windows.__getitems__(index).to(device)
            if batch.future is None or batch.future_observed is None:
                raise ValueError("a training window needs a future")
            optimizer.zero_grad()
            forecast_loss(model(batch), batch.future, batch.future_observed, training.loss).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return _MARGIN * (time.perf_counter() - begin) / _MEASURED_STEPS
