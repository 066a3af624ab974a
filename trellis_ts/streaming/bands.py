"""Bands of live forecasts: calibrated as the model's, and adapted to what came true."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from trellis_ts import conformal
from trellis_ts.conformal import AdaptiveConformal
from trellis_ts.heads import center_index
from trellis_ts.quantiles import normal_score
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.conformal import Calibration

    Quantiles = NDArray[np.float64]


def band_pairs(levels: Sequence[float]) -> list[tuple[float, int, int]]:
    """The symmetric pairs among quantile levels: coverage, and where the two edges are."""
    pairs = []
    for low, level in enumerate(levels):
        for high in range(low + 1, len(levels)):
            if abs(level + levels[high] - 1) < 1e-9:
                pairs.append((round(levels[high] - level, 9), low, high))
    return pairs


class LiveBands:
    """Calibration and adaptation of quantile forecasts ``[series, horizon, channel, quantile]``.

    Args:
        levels: the model's quantile levels.
        calibration: the model's, None for none.
        is_adaptive: whether bands learn from what comes true.
        rate: how fast (``AdaptiveConformal``).
    """

    def __init__(
        self, levels: Sequence[float], calibration: Calibration | None, *, is_adaptive: bool, rate: float
    ) -> None:
        self.levels = tuple(levels)
        self.rate = rate
        self._center = center_index(levels) if levels else 0
        pairs = band_pairs(levels) if is_adaptive else []
        self.bands = [band for band, _, _ in pairs]
        self._edges = [low for _, low, _ in pairs] + [high for _, _, high in pairs]
        self._offsets: Quantiles | None = None
        if calibration is not None and levels:
            self._offsets = self._offsets_of(calibration)
        self._knots = normal_score(torch.tensor(self.levels, dtype=torch.float64)).numpy()

    def _offsets_of(self, calibration: Calibration) -> Quantiles | None:
        """``[horizon, 1, quantile]``: what calibration adds on the scale of the training rows."""
        horizon, count = calibration.prediction_length, len(self.levels)
        if len(self.levels) == 1:
            return None
        # A forecast whose quantiles lie far apart shows the offsets alone.
        apart = torch.arange(count, dtype=torch.float64).expand(1, horizon, 1, count) * 1e6
        forecast = Forecast(apart[..., self._center], apart, self.levels)
        moved = conformal.apply(calibration, forecast).quantiles
        if moved is None:
            return None
        offsets: Quantiles = (moved - apart)[0].numpy()
        return offsets

    def calibrated(self, quantiles: Quantiles, unit: NDArray[np.float64]) -> Quantiles:
        """The model's calibration; ``unit`` is ``[series, channel]``, what its scale is on the quantiles' scale."""
        if self._offsets is None:
            return quantiles
        return self._rising(quantiles + self._offsets * unit[:, None, :, None])

    def plan(self, alpha: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Where the edges of the bands lie at their levels, looked up once for all forecasts until they move.

        Args:
            alpha: ``[series, band, horizon, channel]``.

        Returns:
            ``[series, horizon, channel, edge]``, the lower edges first: the known quantile above each edge, and how far
            the edge lies from the one below it, as a share of their distance (of any size on a tail, infinite where no
            finite edge would keep the promise).
        """
        level = np.clip(alpha, 0.0, 1.0) / 2
        level = np.moveaxis(np.concatenate((level, 1 - level), axis=1), 1, -1)
        is_open = np.moveaxis(np.concatenate((alpha, alpha), axis=1) <= 0, 1, -1)
        score = normal_score(torch.from_numpy(level)).numpy()
        upper = np.clip(np.searchsorted(self._knots, score), 1, len(self._knots) - 1)
        weight = (score - self._knots[upper - 1]) / (self._knots[upper] - self._knots[upper - 1])
        weight = np.where(is_open, np.where(np.arange(level.shape[-1]) < len(self.bands), -np.inf, np.inf), weight)
        return upper.astype(np.int8), weight.astype(np.float32)

    def adapted(self, quantiles: Quantiles, upper: NDArray[np.int8], weight: NDArray[np.float32]) -> Quantiles:
        """The quantiles with the edges of the bands where ``plan`` has them; one of zeros stands for no plan yet."""
        if not self.bands or not upper.any():
            return quantiles
        is_planned = upper[:, :1, :1, :1] > 0
        above = np.maximum(upper, 1) + len(self.levels) * np.arange(upper[..., 0].size).reshape(*upper.shape[:3], 1)
        right, left = quantiles.ravel()[above], quantiles.ravel()[above - 1]
        with np.errstate(invalid="ignore"):  # an infinite share of no distance
            edges = left + (right - left) * weight
        if np.isinf(weight).any():
            edges = np.where(np.isinf(weight), weight, edges)
        result = quantiles.copy()
        result[..., self._edges] = np.where(is_planned, edges, quantiles[..., self._edges])
        return self._rising(result)

    def learn(
        self, alpha: NDArray[np.float64], quantiles: NDArray[np.float32], actual: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The levels after a forecast whose values have come true.

        Args:
            alpha: ``[series, band, horizon, channel]``.
            quantiles: the forecast before adaptation, on the scale of the actual values.
            actual: ``[series, horizon, channel]``, NaN where missing.
        """
        adaptive = AdaptiveConformal(self.bands, rate=self.rate)
        adaptive.set_alpha(dict(zip(self.bands, torch.from_numpy(alpha).unbind(dim=1), strict=True)))
        values = torch.from_numpy(quantiles).double()
        adaptive.update(torch.from_numpy(actual), Forecast(values[..., self._center], values, self.levels))
        return torch.stack([adaptive.alpha(band) for band in self.bands], dim=1).numpy()

    def _rising(self, quantiles: Quantiles) -> Quantiles:
        """As ``quantiles.rising``."""
        center, result = self._center, quantiles.copy()
        np.maximum.accumulate(quantiles[..., center:], axis=-1, out=result[..., center:])
        below = quantiles[..., center::-1]
        result[..., center::-1] = np.minimum.accumulate(below, axis=-1)
        return result
