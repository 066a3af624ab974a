"""Tiny networks and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trellis_ts.config import ModelConfig, WindowShape
from trellis_ts.model import ForecastModel
from trellis_ts.types import Batch


@pytest.fixture(scope="session")
def make_config() -> Callable[..., ModelConfig]:
    """Settings of a network a test can afford."""

    def make(**settings: Any) -> ModelConfig:
        small: dict[str, Any] = {"width": 8, "num_heads": 2, "num_slots": 3, "num_layers": 2, "feedforward_width": 6}
        return ModelConfig(**(small | settings))

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., ModelConfig]) -> Callable[..., ForecastModel]:
    """A network with random weights, float64 unless told otherwise; keywords go to its configuration."""

    def make(
        *,
        context_length: int = 13,
        horizon: int = 5,
        patch_length: int = 4,
        patch_stride: int = 3,
        season_length: int = 7,
        channels: int = 3,
        levels: tuple[float, ...] = (0.1, 0.5, 0.8),
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        **settings: Any,
    ) -> ForecastModel:
        shape = WindowShape(context_length, horizon, patch_length, patch_stride, season_length, channels)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = ForecastModel(make_config(**settings), shape, levels)
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Random contexts, about a quarter of them unobserved."""

    def make(
        *,
        rows: int = 4,
        context_length: int = 13,
        channels: int = 3,
        horizon: int = 5,
        missing: float = 0.25,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def values(length: int) -> tuple[torch.Tensor, torch.Tensor]:
            numbers = torch.randn(rows, length, channels, generator=generator, dtype=torch.float64)
            observed = torch.rand(rows, length, channels, generator=generator) >= missing
            return torch.where(observed, numbers, 0.0).to(dtype), observed

        context, observed = values(context_length)
        future, future_observed = values(horizon)
        phase = torch.randint(0, 7, (rows,), generator=generator)
        loc, scale = (torch.rand(rows, 1, channels, generator=generator, dtype=torch.float64) for _ in range(2))
        return Batch(context, observed, phase, torch.arange(rows), future, future_observed, loc=loc, scale=1 + scale)

    return make
