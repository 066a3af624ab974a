"""How the steps of a horizon hang together: a Gaussian copula, estimated on validation windows, for sample paths.

The marginals of a path come from the forecast; the copula says only how the normal scores of its steps correlate. It is
autoregressive: the correlations of each step with the few before it are free to differ from step to step, and what lies
further back follows from those (the extension of largest entropy). A path of any length costs a handful of numbers per
step, and every score keeps mean 0 and variance 1, whatever was estimated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

LARGEST_LAG = 8
# Of a step's variance at least this much is new: a path is never a copy of its past.
_LEAST_INNOVATION = 1e-3
_RIDGE = 1e-6
# Windows imagined beside those seen, whose correlations are the mean over steps, and 0.
_PRIOR_OF_MEAN, _PRIOR_OF_ZERO = 5, 2


def lag_correlations(values: NDArray[np.float64], *, num_independent: int) -> tuple[tuple[float, ...], ...]:
    """Correlations ``[step][lag - 1]`` of the normal scores of each step with up to eight steps before it.

    Args:
        values: ``[window, horizon, channel]``, anything that rises with the value observed: its place in its forecast
            distribution, or the error. NaN where nothing was. Only ranks within a step count.
        num_independent: how many of the windows (times channels) may pass for independent; the fewer, the closer each
            correlation is drawn to the mean over all steps of its lag, and that to 0.
    """
    scores = _normal_scores(values)
    horizon = scores.shape[0]
    result = np.zeros((horizon, min(LARGEST_LAG, horizon - 1)))
    for lag in range(1, result.shape[1] + 1):
        now, before = scores[lag:], scores[:-lag]
        both = ~(np.isnan(now) | np.isnan(before))
        now, before = np.where(both, now, 0.0), np.where(both, before, 0.0)
        size = np.sqrt((now**2).sum(axis=1) * (before**2).sum(axis=1))
        found = (now * before).sum(axis=1) / np.where(size > 0, size, 1.0)
        result[lag:, lag - 1] = _shrunk(found, both.sum(axis=1), num_independent)
    return tuple(tuple(float(f"{each:.6g}") for each in row) for row in result)


def _normal_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[horizon, window * channel]``: ranks within each step as normal scores, NaN where nothing was observed."""
    from scipy import special, stats  # slow to import, and needed here alone

    rows = values.transpose(1, 0, 2).reshape(values.shape[1], -1)
    ranks = stats.rankdata(rows, axis=1, nan_policy="omit")
    count = (~np.isnan(rows)).sum(axis=1, keepdims=True)
    scores: NDArray[np.float64] = special.ndtri((ranks - 0.5) / np.maximum(count, 1))
    return scores


def _shrunk(found: NDArray[np.float64], pairs: NDArray[np.int64], num_independent: int) -> NDArray[np.float64]:
    """Towards the mean over steps by the share of their spread that sampling alone would cause (empirical Bayes), and
    further towards it, and it towards 0, as if a few more windows had been seen that showed nothing."""
    known = pairs > 1
    if not known.any():
        return np.zeros_like(found)
    mean = float(np.average(found, weights=np.where(known, pairs, 0)))
    noise = (1 - mean**2) ** 2 / max(1, num_independent - 1)
    spread = float(((found[known] - mean) ** 2).mean())
    weight = max(1.0 if spread <= noise else noise / spread, _PRIOR_OF_MEAN / (num_independent + _PRIOR_OF_MEAN))
    drawn = np.where(known, (1 - weight) * found + weight * mean, mean)
    shrunk: NDArray[np.float64] = drawn * num_independent / (num_independent + _PRIOR_OF_ZERO)
    return shrunk


def sample_scores(
    correlations: Sequence[Sequence[float]],
    shape: tuple[int, int, int],
    num_samples: int,
    generator: torch.Generator,
) -> Float[Tensor, "sample batch horizon channel"]:
    """Standard normal scores whose steps correlate as estimated; series, channels and samples are independent.

    Args:
        correlations: ``[step][lag - 1]``; the last step's go on for a longer horizon.
        shape: batch, horizon, channel.
        num_samples: paths per series and channel.
        generator: where the randomness comes from.
    """
    batch, horizon, channels = shape
    table = np.array(correlations, dtype=np.float64)
    noise = torch.randn(horizon, num_samples, batch, channels, generator=generator, dtype=torch.float64)
    steps: list[Tensor] = []
    covariance = np.zeros((0, 0))  # of the last few steps, oldest first
    for step in range(horizon):
        lags = min(step, table.shape[1])
        wanted = table[min(step, len(table) - 1), :lags][::-1]  # oldest first, as the covariance
        covariance = covariance[len(covariance) - lags :, len(covariance) - lags :]
        weights, explained = _regression(covariance, wanted)
        value = noise[step] * float(np.sqrt(1 - explained))
        for weight, earlier in zip(weights, steps[step - lags :], strict=True):
            value = value + float(weight) * earlier
        steps.append(value)
        cross = covariance @ weights
        covariance = np.block([[covariance, cross[:, None]], [cross[None], np.ones((1, 1))]])
    return torch.stack(steps, dim=2)


def _regression(covariance: NDArray[np.float64], wanted: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Weights of the earlier steps, and the variance they explain, kept below 1."""
    if not len(wanted):
        return np.zeros(0), 0.0
    weights = np.linalg.solve(covariance + _RIDGE * np.eye(len(wanted)), wanted).astype(np.float64)
    explained = float(weights @ covariance @ weights)
    if explained > 1 - _LEAST_INNOVATION:
        weights = weights * float(np.sqrt((1 - _LEAST_INNOVATION) / explained))
        explained = 1 - _LEAST_INNOVATION
    return weights, explained
