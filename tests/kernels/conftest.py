"""Inputs and comparisons shared by the tests of the memory operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trellis_ts.kernels import MemoryState


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """Random inputs as a layer would give them: unit query, key and value, gates inside their ranges."""

    def make(
        *, batch: int = 2, time: int = 5, head: int = 2, slot: int = 4, dim: int = 3, seed: int = 0
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def unit() -> Tensor:
            return torch.nn.functional.normalize(normal(batch, time, head, dim), dim=-1)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand((batch, time, head), generator=generator, dtype=torch.float64)

        return {
            "query": unit(),
            "key": unit(),
            "value": unit(),
            "target": normal(batch, time, head, slot),
            "log_forget": uniform(-0.5, 0.0),
            "step_size": uniform(0.05, 0.5),
        }

    return make


@pytest.fixture(scope="session")
def make_state() -> Callable[..., MemoryState]:
    """A random state of order one, away from the zero memory."""

    def make(*, batch: int = 2, head: int = 2, slot: int = 4, dim: int = 3, seed: int = 0) -> MemoryState:
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        shape = (2, batch, head, slot, dim)
        return MemoryState(*torch.randn(shape, generator=generator, dtype=torch.float64).unbind())

    return make


@pytest.fixture(scope="session")
def relative_rms() -> Callable[[Tensor, Tensor], float]:
    """Root mean square of the difference over that of the expected value, in float64."""

    def compare(expected: Tensor, actual: Tensor) -> float:
        expected, actual = expected.detach().double(), actual.detach().double()
        return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())

    return compare
