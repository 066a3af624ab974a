"""A trained streaming model that follows live series."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trellis_ts.causal import CausalModel
from trellis_ts.checkpoints import Checkpoint, load_checkpoint
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.streaming.clock import UNKNOWN
from trellis_ts.streaming.live import LiveStates
from trellis_ts.streaming.snapshots import Store, read_state, write_state
from trellis_ts.streaming.table import COUNT, GAPS, LATE, TIME, SeriesTable
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from trellis_ts.streaming.clock import Clock, Stamp

    Slots = NDArray[np.int64]
    Values = NDArray[np.float64]

SINGLE = ""
"""The name of the series where none is given."""
# Series worked on at once: their windows and memories stay in a core's cache. No forecast depends on it.
_SERIES_PER_BLOCK = 64


class Drift(NamedTuple):
    """How a series has lately behaved, per channel; NaN where there was nothing to measure yet."""

    forget_gate: Values
    """What a token leaves of the memory, averaged over the last tokens, heads and layers; near 1 it remembers long."""
    surprise: Values
    """Size of a token's write relative to the memory, averaged likewise; it rises when the series changes its ways."""
    error: Values
    """Absolute one-step error in units of the series' running standard deviation, averaged over the last forecasts."""


class StreamingForecaster:
    """Follows live series with a streaming model: every observation costs the same, whatever came before it.

    Observations come in the order of their time. A step left out counts as missing, as does a NaN; one that lies before
    the last is refused, counted (``late``), and changes nothing. Without times every observation is the next step.

    Example:
        >>> live = StreamingForecaster("models/load")                   # doctest: +SKIP
        >>> live.update(41.7, time="2026-01-01T00:00")                  # doctest: +SKIP
        >>> live.forecast().quantile(0.9)                               # doctest: +SKIP
        >>> live.snapshot("load.state")                                 # doctest: +SKIP

    Args:
        model: a model directory, or a loaded checkpoint, of a model trained with ``mode="streaming"``.
        adaptive: whether the bands learn from what comes true, in the forecasts that were asked for
            (``AdaptiveConformal``). Up to four forecasts of a series are waited for at a time.
        rate: how fast they learn.
        calibrated: whether bands start from the model's calibration.
        store: a database file that keeps the states of series which do not fit in memory; made if there is none.
        max_series: most series in memory; of more, with a ``store``, those unused for longest are written to it.

    Raises:
        CheckpointError: the model cannot be read, or the store belongs to another one.
        ConfigError: the model is not a streaming one, or an argument is out of its range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Checkpoint,
        *,
        adaptive: bool = True,
        rate: float = 0.02,
        calibrated: bool = True,
        store: str | os.PathLike[str] | None = None,
        max_series: int = 4096,
    ) -> None:
        checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
        if not isinstance(checkpoint.model, CausalModel):
            raise ConfigError("this model reads windows; train one to stream with `trellis train --mode streaming`")
        if not 0 < rate < 1:
            raise ConfigError(f"rate={rate} must lie between 0 and 1")
        if max_series < 1:
            raise ConfigError(f"max_series={max_series} must be at least 1")
        self.checkpoint = checkpoint
        self.fingerprint = fingerprint_of(checkpoint)
        self._model = checkpoint.model
        self._live = LiveStates(checkpoint, self._model, adaptive=adaptive, rate=rate, calibrated=calibrated)
        self._needs_time = bool(self._model.shape.covariates.cycles) or self._model.cycle is not None
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._units = {each.name: np.stack((each.loc, each.scale), axis=1) for each in checkpoint.data.series}
        self._store = None if store is None else Store(Path(store), fingerprint=self.fingerprint)
        self._max_series = max_series

    @property
    def prediction_length(self) -> int:
        """Steps of a forecast."""
        return self._model.shape.prediction_length

    @property
    def clock(self) -> Clock:
        """The model's calendar."""
        return self._live.clock

    @property
    def channels(self) -> tuple[str, ...]:
        """What every observation holds, in this order."""
        return self.checkpoint.data.channels

    @property
    def bytes_per_series(self) -> int:
        """What is remembered of a series, whatever its length."""
        return self._live.table.bytes_per_series

    @property
    def series(self) -> tuple[str, ...]:
        """Names of the series that are known, those in the store included."""
        stored = () if self._store is None else (each for each in self._store.names() if each not in self._slots)
        return (*self._slots, *stored)

    def update(
        self, values: Any, time: Stamp | Sequence[Stamp] | None = None, *, series: str | Sequence[str] | None = None
    ) -> int:
        """Takes in what was observed.

        Args:
            values: of one series a number, ``[channel]`` or ``[step, channel]`` (a series of one channel may leave the
                channel out: ``[step]``); of several ``[series]``, ``[series, channel]`` or ``[series, step, channel]``.
                NaN where missing.
            time: the stamp of the first (or only) step, one for all series or one each; the rest follow step by step.
                The next step unless given.
            series: the name of the series, or the names of several, each once. A new name starts a new series; the
                model's scaler is used for the names it was trained on.

        Returns:
            How many of the observations were refused because they are late.

        Raises:
            DataError: shapes do not fit, a value is infinite, or a time is none of the calendar's; or no time is given
                where the model reads the calendar. Nothing is taken in then.
        """
        names = [SINGLE if series is None else series] if series is None or isinstance(series, str) else list(series)
        if len(set(names)) < len(names):
            raise DataError("a series is named twice in one update; give each its steps in one piece")
        array = self._shaped(values, len(names), is_single=series is None or isinstance(series, str))
        stamps = self._stamps(time, len(names))
        blocks = [slice(at, at + _SERIES_PER_BLOCK) for at in range(0, len(names), _SERIES_PER_BLOCK)]
        for block in blocks:
            for name, stamp in zip(names[block], stamps[block], strict=True):
                self._ahead(self._find(name), stamp, 1)
        late = sum(self._update_block(names[block], array[block], stamps[block]) for block in blocks)
        self._make_room()
        return late

    def forecast(
        self, series: str | Sequence[str] | None = None, *, quantile_levels: Sequence[float] | None = None
    ) -> Forecast:
        """Forecasts the steps after the last observation, in the units of the data: ``[series, horizon, channel]``.

        NaN for a channel of which fewer than eight steps were ever observed within one context. The memory is left as
        it is; with ``adaptive`` the forecast is remembered until its values have come true.

        Args:
            series: one name or several; the unnamed series unless given.
            quantile_levels: any levels; the model's unless given.

        Raises:
            ConfigError: a level the model cannot give.
            DataError: a series is unknown.
        """
        names = [SINGLE if series is None else series] if series is None or isinstance(series, str) else list(series)
        pieces = [
            self._live.forecast(self._slots_of(names[at : at + _SERIES_PER_BLOCK]))
            for at in range(0, len(names), _SERIES_PER_BLOCK)
        ]
        self._make_room()
        forecast = pieces[0] if len(pieces) == 1 else Forecast.joined(pieces, dim=0)
        return forecast if quantile_levels is None else forecast.at_levels(quantile_levels)

    def drift(self, series: str | None = None) -> Drift:
        """How a series has lately behaved.

        Raises:
            DataError: the series is unknown.
        """
        slot = self._slots_of([SINGLE if series is None else series])[0]
        gates = self._live.table.arrays["drift"][slot]
        return Drift(gates[:, 0].copy(), gates[:, 1].copy(), self._live.table.arrays["error"][slot].copy())

    def counts(self, series: str | None = None) -> dict[str, int]:
        """Steps taken in (``steps``), filled in as missing (``gaps``) and refused as late (``late``)."""
        clock = self._live.table.arrays["clock"][self._slots_of([SINGLE if series is None else series])[0]]
        return {"steps": int(clock[COUNT]), "gaps": int(clock[GAPS]), "late": int(clock[LATE])}

    def last_time(self, series: str | None = None) -> np.datetime64 | None:
        """The stamp of the last step; None where no time was ever given."""
        time = self._live.table.arrays["clock"][self._slots_of([SINGLE if series is None else series])[0], TIME]
        return None if time == UNKNOWN else np.datetime64(int(time), "ns")

    def reset(self, series: str | Iterable[str] | None = None) -> None:
        """Forgets series as if they had never been seen, in the store too; all of them unless named."""
        names = list(self._slots) if series is None else [series] if isinstance(series, str) else list(series)
        for name in names:
            if name in self._slots:
                self._live.table.free(self._slots.pop(name))
        if self._store is not None:
            self._store.delete(None if series is None else names)
            self._store.commit()

    def evict(self, series: str | Iterable[str]) -> None:
        """Moves series from memory to the store, from which they come back when they are next named.

        Raises:
            ConfigError: there is no store; ``reset`` forgets a series.
        """
        if self._store is None:
            raise ConfigError("there is no store to evict to; give StreamingForecaster(store=...), or reset the series")
        names = [name for name in ([series] if isinstance(series, str) else series) if name in self._slots]
        self._store.put({name: self._live.table.pack(self._slots[name]) for name in names})
        self._store.commit()
        for name in names:
            self._live.table.free(self._slots.pop(name))

    def flush(self) -> None:
        """Writes the series in memory to the store, which then holds all of them as they are now, or as they were at
        the last flush if this one is interrupted.

        Raises:
            ConfigError: there is no store.
        """
        if self._store is None:
            raise ConfigError("there is no store to flush to; give StreamingForecaster(store=...)")
        self._store.put({name: self._live.table.pack(slot) for name, slot in self._slots.items()})
        self._store.commit()

    def snapshot(self, path: str | os.PathLike[str], *, extra: Mapping[str, str] | None = None) -> None:
        """Writes the state of the series in memory to one file; whole, or the old one stays.

        Args:
            path: of the file.
            extra: anything short to be kept with it; ``restore`` returns it.

        Raises:
            CheckpointError: it cannot be written.
        """
        arrays = self._live.table.export(list(self._slots.values()))
        write_state(Path(path), arrays, list(self._slots), fingerprint=self._key(), extra=extra or {})

    def restore(self, path: str | os.PathLike[str]) -> dict[str, str]:
        """Takes the state of all series in a snapshot, in the place of those in memory.

        Returns:
            What was given to ``snapshot`` as ``extra``.

        Raises:
            CheckpointError: it is missing, damaged, or of another model; nothing is changed then.
        """
        arrays, names, extra = read_state(Path(path), fingerprint=self._key())
        table = SeriesTable(self._live.engine, self._live.bands.bands)
        self._slots = OrderedDict(zip(names, table.load(arrays, len(names)), strict=True))
        self._live.table = table
        return extra

    def _key(self) -> str:
        """Of the model, and of whether bands are adapted, on which the state's arrays depend."""
        return f"{self.fingerprint}-{len(self._live.bands.bands)}"

    def _shaped(self, values: Any, count: int, *, is_single: bool) -> Values:
        """``[series, step, channel]``."""
        try:
            array = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError):
            raise DataError(f"values {values!r} are not all numbers; use NaN where one is missing") from None
        channels, shape = len(self.channels), array.shape
        if is_single:
            array = array.reshape(-1, 1) if channels == 1 and array.ndim < 2 else np.atleast_2d(array)
            array = array[None]
        elif array.ndim == 1 and channels == 1:
            array = array[:, None, None]
        elif array.ndim == 2:
            array = array[:, None]
        if array.ndim != 3 or array.shape[0] != count or array.shape[2] != channels or array.shape[1] == 0:
            raise DataError(
                f"values of shape {list(shape)} do not fit {count} series of {channels} channel(s) "
                f"({', '.join(self.channels[:6])})"
            )
        if np.isinf(array).any():
            raise DataError("a value is infinite; use NaN where one is missing")
        return array

    def _stamps(self, time: Stamp | Sequence[Stamp] | None, count: int) -> list[int | None]:
        if time is None:
            return [None] * count
        if isinstance(time, (list, tuple, np.ndarray)) and np.ndim(time) > 0:
            if len(time) != count:
                raise DataError(f"{len(time)} times do not fit {count} series; give one for all, or one each")
            return [self._live.clock.read(each) for each in time]
        return [self._live.clock.read(time)] * count  # type: ignore[arg-type]

    def _update_block(self, names: list[str], values: Values, stamps: list[int | None]) -> int:
        known = [self._find(name) for name in names]
        steps, late = [], []
        for slot, stamp in zip(known, stamps, strict=True):
            ahead, refused = self._ahead(slot, stamp, values.shape[1])
            steps.append(ahead)
            late.append(refused)
        slots = np.array([self._new(name) if slot is None else slot for name, slot in zip(names, known, strict=True)])
        clock, unit = self._live.table.arrays["clock"], self._live.table.arrays["unit"]
        for position, (slot, stamp) in enumerate(zip(slots, stamps, strict=True)):
            if clock[slot, COUNT] == 0 and stamp is not None:
                self._live.begin(int(slot), stamp)
            clock[slot, LATE] += late[position]
            if steps[position] > 1:
                self._live.skip(int(slot), steps[position] - 1)
        scaled = (values - unit[slots, None, :, 0]) / unit[slots, None, :, 1]
        if not any(late):
            self._live.push(slots, scaled)
            return 0
        for position in range(len(slots)):
            if late[position] < values.shape[1]:
                self._live.push(slots[position : position + 1], scaled[position : position + 1, late[position] :])
        return sum(late)

    def _ahead(self, slot: int | None, stamp: int | None, num_steps: int) -> tuple[int, int]:
        """How many steps after the last the first one to take in lies, and how many before it are late."""
        last = UNKNOWN if slot is None else int(self._live.table.arrays["clock"][slot, TIME])
        count = 0 if slot is None else int(self._live.table.arrays["clock"][slot, COUNT])
        if stamp is None:
            if self._needs_time and last == UNKNOWN:
                raise DataError("this model reads the calendar; give the time of a series' first observation")
            return 1, 0
        if last == UNKNOWN:
            if count:
                raise DataError("this series was begun without times; go on without, or reset it")
            return 1, 0
        ahead = self._live.clock.steps_between(last, stamp)
        return (ahead, 0) if ahead > 0 else (1, min(num_steps, 1 - ahead))

    def _find(self, name: str) -> int | None:
        """The slot of a series, fetched from the store if it is there; None if it is new."""
        if name in self._slots:
            self._slots.move_to_end(name)
            return self._slots[name]
        blob = None if self._store is None else self._store.get(name)
        if blob is None:
            return None
        self._slots[name] = self._live.table.unpack(blob)
        return self._slots[name]

    def _new(self, name: str) -> int:
        unknown = np.tile([0.0, 1.0, np.nan], (len(self.channels), 1))
        unit = self._units.get(name)
        if unit is None and name == SINGLE and len(self._units) == 1:  # a wide table's only series has no name to give
            unit = next(iter(self._units.values()))
        slot = self._live.table.new(unknown if unit is None else np.column_stack((unit, np.ones(len(unit)))))
        self._slots[name] = slot
        return slot

    def _slots_of(self, names: Sequence[str]) -> Slots:
        found = [(name, self._find(name)) for name in names]
        missing = [name for name, slot in found if slot is None]
        if missing:
            what = f"series '{missing[0]}'" if missing[0] else "the series"
            raise DataError(f"{what} has had no update yet; there is nothing to forecast from")
        return np.array([slot for _, slot in found], dtype=np.int64)

    def _make_room(self) -> None:
        """Moves the series unused for longest to the store, a few more than needed."""
        excess = len(self._slots) - self._max_series
        if self._store is not None and excess > 0:
            spare = min(self._max_series - 1, self._max_series // 8)
            self.evict([name for name, _ in zip(self._slots, range(excess + spare), strict=False)])


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """A digest of a model's weights and of all that its state depends on."""
    digest, data = hashlib.sha256(), checkpoint.data
    settings = {
        "model": asdict(checkpoint.experiment.model),
        "shape": asdict(checkpoint.model.shape),
        "levels": checkpoint.model.quantile_levels,
        "family": checkpoint.model.family,
        "data": [data.channels, data.freq, data.timezone],
    }
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
