"""The states of live series taken forward, and asked: everything that goes by slots of the table, not by names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trellis_ts import conformal
from trellis_ts.distributions import shape_distribution
from trellis_ts.heads import center_index
from trellis_ts.streaming.bands import LiveBands
from trellis_ts.streaming.clock import Clock
from trellis_ts.streaming.engine import DRIFT_RATE, Engine
from trellis_ts.streaming.table import COUNT, GAPS, PENDING, PHASE, TIME, SeriesTable
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trellis_ts.causal import CausalModel
    from trellis_ts.checkpoints import Checkpoint

    Slots = NDArray[np.int64]
    Values = NDArray[np.float64]


class LiveStates:
    """A model with the states of the series that follow it.

    Args:
        checkpoint: of a streaming model.
        model: its network.
        adaptive: as for ``StreamingForecaster``, and so are the rest.
        rate: see there.
        calibrated: see there.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: CausalModel, *, adaptive: bool, rate: float, calibrated: bool
    ) -> None:
        self.model, self.engine = model, Engine(model)
        self.calibration = checkpoint.calibration if calibrated else None
        shape, data = model.shape, checkpoint.data
        self.clock = Clock(
            data.freq,
            data.timezone,
            shape.season_length,
            shape.covariates.cycles,
            day_first=data.day_first,
        )
        levels = () if model.family else model.quantile_levels
        self.bands = LiveBands(levels, self.calibration, is_adaptive=adaptive and len(levels) > 1, rate=rate)
        self.table = SeriesTable(self.engine, self.bands.bands)

    def begin(self, slot: int, stamp: int) -> None:
        """Gives a series that has no step yet the stamp of its first one."""
        own = self.table.arrays["clock"][slot]
        own[PHASE], own[TIME] = self.clock.season_position(stamp), stamp

    def skip(self, slot: int, steps: int) -> None:
        """Takes in steps that are missing; of a long gap all but the length of the windows only moves the clock."""
        self.table.arrays["clock"][slot, GAPS] += steps
        engine, table = self.engine, self.table
        real = engine.history + engine.patch
        channels = self.model.shape.num_channels
        slots = np.array([slot])
        if steps > real:
            self.push(slots, np.full((1, real, channels), np.nan))
            patches = (steps - real) // engine.patch
            jumped = patches * engine.patch
            clock = table.arrays["clock"][slot]
            clock[TIME] = self.clock.after(int(clock[TIME]), jumped)
            clock[COUNT] += jumped
            clock[PHASE] = (clock[PHASE] + jumped) % self.model.shape.season_length
            engine.rest(table.rows(slots), patches)
            table.arrays["pending_from"][slot] = -1
            steps -= real + jumped
        if steps:
            self.push(slots, np.full((1, steps, channels), np.nan))

    def push(self, slots: Slots, values: Values) -> None:
        """Takes in ``[series, step, channel]`` on the series' own scale, sealing patches on the way."""
        clock, table, patch = self.table.arrays["clock"], self.table, self.engine.patch
        done, total = 0, values.shape[1]
        while done < total:
            steps = min(total - done, patch - int((clock[slots, COUNT] % patch).max()))
            piece = values[:, done : done + steps]
            self._note_error(slots, piece[:, 0])
            table.shift(slots, piece)
            self._move_clocks(slots, steps)
            self._seal(slots[clock[slots, COUNT] % patch == 0])
            if self.bands.bands:
                self._learn(slots)
            done += steps

    def _move_clocks(self, slots: Slots, steps: int) -> None:
        clock = self.table.arrays["clock"]
        # The stamp of a series' very first step is in place already.
        moved = steps - (clock[slots, COUNT] == 0)
        clock[slots, TIME] = self.clock.advance(clock[slots, TIME], moved)
        clock[slots, COUNT] += steps
        clock[slots, PHASE] = (clock[slots, PHASE] + steps) % self.model.shape.season_length

    def _seal(self, slots: Slots) -> None:
        if not len(slots):
            return
        rows = self.table.rows(slots)
        self.engine.seal(rows, self._calendar(slots), self._per_row(slots, PHASE))
        self.table.put_rows(slots, rows)

    def _per_row(self, slots: Slots, what: int) -> NDArray[np.int64]:
        values: NDArray[np.int64] = self.table.arrays["clock"][slots, what]
        return values.repeat(self.model.shape.num_channels)

    def _calendar(self, slots: Slots) -> NDArray[np.float32] | None:
        if not self.model.shape.covariates.cycles:
            return None
        features = self.clock.features(self.table.arrays["clock"][slots, TIME])
        return None if features is None else features.repeat(self.model.shape.num_channels, axis=0)

    def forecast(self, slots: Slots) -> Forecast:
        table, channels, count = self.table, self.model.shape.num_channels, len(slots)
        rows = table.rows(slots)
        output, loc, scale = self.engine.ask(rows, self._calendar(slots), self._per_row(slots, PHASE))
        unit = table.arrays["unit"][slots]  # [S, C, 2]
        by_channel = (count, channels)
        loc, scale = loc.reshape(by_channel), scale.reshape(by_channel)
        output = output.reshape(*by_channel, *output.shape[1:]).transpose(0, 2, 1, 3)  # [S, horizon, C, Q]
        # Where the model knows no scale of a series' training rows, its running scale stands in for the calibration.
        yard = np.where(np.isnan(unit[..., 2]), scale, unit[..., 2])
        if self.model.family is not None or not self.model.quantile_levels:
            return self._without_levels(slots, output, loc, scale, unit, np.where(yard > 0, yard, 1.0))
        scaled = output * scale[:, None, :, None] + loc[:, None, :, None]  # float64
        center = center_index(self.model.quantile_levels)
        table.arrays["expected"][slots] = scaled[:, 0, :, center]
        quantiles = self.bands.calibrated(scaled, yard)
        if self.bands.bands:
            self._remember(slots, quantiles, loc)
            quantiles = self.bands.adapted(
                quantiles, table.arrays["edge_upper"][slots], table.arrays["edge_weight"][slots]
            )
        values = torch.from_numpy(quantiles * unit[:, None, :, 1:2] + unit[:, None, :, :1])
        return Forecast(values[..., center], values, self.model.quantile_levels)

    def _without_levels(
        self, slots: Slots, output: NDArray[Any], loc: Values, scale: Values, unit: Values, yard: Values
    ) -> Forecast:
        """Forecasts of a model of points or of distributions."""
        location = torch.from_numpy(output[..., 0] * scale[:, None] + loc[:, None])
        if self.model.family is None:
            forecast = Forecast(location)
        else:
            rest, spread = torch.from_numpy(output[..., 1:]), torch.from_numpy(scale[:, None])
            units = (torch.from_numpy(unit[:, None, :, 0]), torch.from_numpy(unit[:, None, :, 1]))
            distribution = shape_distribution(self.model.family, location, rest, spread, units)
            forecast = Forecast(distribution.mean, distribution=distribution)
        self.table.arrays["expected"][slots] = forecast.point[:, 0].numpy()
        own = torch.from_numpy(yard[:, None])
        forecast = forecast.affine(torch.zeros_like(own), 1 / own)
        if self.model.family is not None:
            forecast = forecast.at_levels(self.model.quantile_levels)
        if self.calibration is not None:
            forecast = conformal.apply(self.calibration, forecast)
        first, second = (torch.from_numpy(unit[:, None, :, index]) for index in (0, 1))
        forecast = forecast.affine(first, second * own)
        return forecast.as_counts() if self.model.family == "negative_binomial" else forecast

    def _remember(self, slots: Slots, quantiles: Values, loc: Values) -> None:
        """Keeps forecasts to learn from, a quarter of a horizon apart at least."""
        arrays = self.table.arrays
        count, begun = arrays["clock"][slots, COUNT], arrays["pending_from"][slots]
        apart = -(-self.model.shape.prediction_length // PENDING)
        due = (begun < 0).any(axis=1) & (count - begun.max(axis=1) >= apart) & ~np.isnan(loc).any(axis=1)
        for index in np.flatnonzero(due | ((begun < 0).all(axis=1) & ~np.isnan(loc).any(axis=1))):
            place, slot = int(np.argmin(begun[index])), slots[index]
            arrays["pending"][slot, place] = quantiles[index] - loc[index][:, None]
            arrays["pending_loc"][slot, place] = loc[index]
            arrays["pending_from"][slot, place] = count[index]

    def _learn(self, slots: Slots) -> None:
        """Moves the bands of series whose forecasts have come true."""
        arrays, horizon = self.table.arrays, self.model.shape.prediction_length
        count, begun = arrays["clock"][slots, COUNT], arrays["pending_from"][slots]
        due = (begun >= 0) & (count[:, None] >= begun + horizon)
        if not due.any():
            return
        for index, place in zip(*np.nonzero(due), strict=True):
            slot = slots[index]
            behind = int(count[index] - begun[index, place] - horizon)
            window = arrays["window"][slot]
            actual = window[:, window.shape[1] - behind - horizon : window.shape[1] - behind].T
            loc = arrays["pending_loc"][slot, place]
            arrays["alpha"][slot] = self.bands.learn(
                arrays["alpha"][None, slot], arrays["pending"][None, slot, place], actual[None] - loc
            )[0]
            upper, weight = self.bands.plan(arrays["alpha"][None, slot])
            arrays["edge_upper"][slot], arrays["edge_weight"][slot] = upper[0], weight[0]
            arrays["pending_from"][slot, place] = -1

    def _note_error(self, slots: Slots, values: Values) -> None:
        """Averages the error of the last forecast's first step, where there was a forecast."""
        arrays = self.table.arrays
        expected = arrays["expected"][slots]
        if np.isnan(expected).all():
            return
        scale = arrays["scale"][slots][..., 1]
        seen = np.abs(values - expected) / np.where(scale > 0, scale, np.nan)
        old = arrays["error"][slots]
        moved = np.where(np.isnan(old), seen, old + DRIFT_RATE * (seen - old))
        arrays["error"][slots] = np.where(np.isnan(seen), old, moved)
        arrays["expected"][slots] = np.nan
