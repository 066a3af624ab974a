"""What is remembered of every series, as arrays whose first axis is the series."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trellis_ts.errors import CheckpointError
from trellis_ts.streaming.clock import UNKNOWN
from trellis_ts.streaming.engine import Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from trellis_ts.streaming.engine import Engine

COUNT, TIME, PHASE, LATE, GAPS = range(5)
"""Places in ``clock``: steps so far, stamp of the last, season position of the next, observations refused as late, and
steps filled in as missing."""
PENDING = 4
"""Forecasts of a series kept at a time until their values have come true."""
_ROW_FIELDS = ("window", "scale", "memory", "waiting", "drift")
_FIRST_CAPACITY = 8
_MOST_STEPS = 1 << 60
# In nanoseconds from 1970, 250 years: a step further is still a stamp.
_LAST_STAMP = 250 * 365 * 86_400 * 10**9


class Field(NamedTuple):
    """One array: what a single series has of it."""

    shape: tuple[int, ...]
    dtype: Any
    fill: float | int


def make_fields(engine: Engine, num_bands: int) -> dict[str, Field]:
    """All arrays of a series; ``num_bands`` is 0 where bands are not adapted."""
    channels, horizon = engine.shape.num_channels, engine.shape.prediction_length
    start = engine.start(1)
    fields = {
        name: Field((channels, *getattr(start, name).shape[1:]), getattr(start, name).dtype, 0) for name in _ROW_FIELDS
    }
    return fields | {
        # Values that came true are looked up here too, up to a patch after the last of a horizon.
        "window": Field((channels, engine.history), np.float64, np.nan),
        "unit": Field((channels, 3), np.float64, 0),
        "clock": Field((5,), np.int64, 0),
        "expected": Field((channels,), np.float64, np.nan),
        "error": Field((channels,), np.float64, np.nan),
        "alpha": Field((num_bands, horizon, channels), np.float64, 0),
        "edge_upper": Field((horizon, channels, 2 * num_bands), np.int8, 0),
        "edge_weight": Field((horizon, channels, 2 * num_bands), np.float32, 0),
        "pending": Field((PENDING if num_bands else 0, horizon, channels, len(engine.levels)), np.float32, np.nan),
        "pending_loc": Field((PENDING if num_bands else 0, channels), np.float64, 0),
        "pending_from": Field((PENDING if num_bands else 0,), np.int64, -1),
    }


class SeriesTable:
    """Slots for series, as many as are needed; a slot that is freed is used again.

    Args:
        engine: of the model.
        bands: coverages whose levels are adapted.
    """

    def __init__(self, engine: Engine, bands: Sequence[float]) -> None:
        self._engine = engine
        self.fields = make_fields(engine, len(bands))
        start = engine.start(engine.shape.num_channels)
        self._start = {name: np.full(each.shape, each.fill, each.dtype) for name, each in self.fields.items()}
        self._start |= {name: getattr(start, name) for name in _ROW_FIELDS if name != "window"}
        self._start["clock"][TIME] = UNKNOWN
        self._start["alpha"][:] = 1 - np.array(bands)[:, None, None] if len(bands) else 0
        self._free: list[int] = []
        self.arrays: dict[str, NDArray[Any]] = {}
        self._grow(_FIRST_CAPACITY)

    @property
    def bytes_per_series(self) -> int:
        """What one series takes."""
        return sum(each.nbytes for each in self._start.values())

    def new(self, unit: NDArray[np.float64]) -> int:
        """A slot for a series before its first step; ``unit`` is location and scale of each channel, and the unit
        of the calibration on that scale, NaN where the model knows none."""
        if not self._free:
            self._grow(2 * len(self.arrays["clock"]))
        slot = self._free.pop()
        for name, start in self._start.items():
            self.arrays[name][slot] = start
        self.arrays["unit"][slot] = unit
        return slot

    def free(self, slot: int) -> None:
        """Gives a slot back."""
        self._free.append(slot)

    def rows(self, slots: NDArray[np.int64]) -> Rows:
        """The network's rows of some series: views for one, copies for several."""
        parts = {}
        for name in _ROW_FIELDS:
            array = self.arrays[name]
            parts[name] = array[slots[0]] if len(slots) == 1 else array[slots].reshape(-1, *array.shape[2:])
        return Rows(**parts)

    def put_rows(self, slots: NDArray[np.int64], rows: Rows) -> None:
        """Writes changed copies back; views need no writing."""
        if len(slots) > 1:
            for name in _ROW_FIELDS[1:]:
                array = self.arrays[name]
                array[slots] = getattr(rows, name).reshape(len(slots), *array.shape[1:])

    def shift(self, slots: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Appends ``[series, step, channel]`` to the windows."""
        window, steps = self.arrays["window"], values.shape[1]
        if len(slots) == 1:
            own = window[slots[0]]
            own[:, :-steps] = own[:, steps:].copy()
            own[:, -steps:] = values[0].T
            return
        moved = window[slots]
        moved[:, :, :-steps] = moved[:, :, steps:].copy()
        moved[:, :, -steps:] = values.transpose(0, 2, 1)
        window[slots] = moved

    def pack(self, slot: int) -> bytes:
        """One series as bytes, with a checksum in front."""
        body = b"".join(array[slot].tobytes() for array in self.arrays.values())
        return zlib.crc32(body).to_bytes(4, "little") + body

    def unpack(self, blob: bytes) -> int:
        """A slot with what ``pack`` wrote.

        Raises:
            CheckpointError: the bytes are damaged.
        """
        body = memoryview(blob)[4:]
        if len(body) != self.bytes_per_series or zlib.crc32(body).to_bytes(4, "little") != blob[:4]:
            raise CheckpointError("the stored state of a series is damaged")
        at, arrays = 0, {}
        for name in self.arrays:
            start = self._start[name]
            arrays[name] = np.frombuffer(body[at : at + start.nbytes], start.dtype).reshape(1, *start.shape)
            at += start.nbytes
        return self.load(arrays, 1)[0]

    def export(self, slots: Sequence[int]) -> dict[str, NDArray[Any]]:
        """The arrays of some series, as copies."""
        index = np.array(slots, dtype=np.int64)
        return {name: array[index] for name, array in self.arrays.items()}

    def load(self, arrays: Mapping[str, NDArray[Any]], count: int) -> list[int]:
        """Slots with what ``export`` gave.

        Raises:
            CheckpointError: names, shapes or types are not those of this table, or numbers are none it writes.
        """
        expected = {name: ((count, *each.shape), np.dtype(each.dtype)) for name, each in self.fields.items()}
        if {name: (each.shape, each.dtype) for name, each in arrays.items()} != expected:
            raise CheckpointError("the arrays in it are not those of this model")
        if wrong := self._impossible(arrays):
            raise CheckpointError(f"the state is damaged: {wrong} holds what no state can")
        zero = np.zeros_like(self._start["unit"])
        slots = [self.new(zero) for _ in range(count)]
        for name, array in arrays.items():
            self.arrays[name][slots] = array
        return slots

    def _impossible(self, arrays: Mapping[str, NDArray[Any]]) -> str | None:
        """The name of an array with numbers that going on with would stumble over; None if there is none."""
        shape, clock, unit = self._engine.shape, arrays["clock"], arrays["unit"]
        time, begun = clock[:, TIME], arrays["pending_from"]
        waited = clock[:, COUNT, None] - begun
        is_possible = {
            "clock": (clock[:, [COUNT, PHASE, LATE, GAPS]] >= 0).all()
            and (clock[:, [COUNT, LATE, GAPS]] <= _MOST_STEPS).all()
            and (clock[:, PHASE] < shape.season_length).all()
            and ((time == UNKNOWN) | (np.abs(time) <= _LAST_STAMP)).all(),
            "unit": np.isfinite(unit[..., :2]).all() and (unit[..., 1] > 0).all(),
            "edge_upper": (
                (arrays["edge_upper"] >= 0) & (arrays["edge_upper"] < max(1, len(self._engine.levels)))
            ).all(),
            # A forecast is learnt from as soon as its horizon has gone by.
            "pending_from": ((begun == -1) | ((begun >= 0) & (waited >= 0) & (waited < shape.prediction_length))).all(),
        }
        return next((name for name, is_so in is_possible.items() if not is_so), None)

    def _grow(self, capacity: int) -> None:
        old = len(self.arrays["clock"]) if self.arrays else 0
        for name, each in self.fields.items():
            grown = np.empty((capacity, *each.shape), each.dtype)
            if old:
                grown[:old] = self.arrays[name]
            self.arrays[name] = grown
        self._free += range(capacity - 1, old - 1, -1)


def by_name(names: Iterable[str], table: Mapping[str, int]) -> NDArray[np.int64]:
    """The slots of some series."""
    return np.fromiter((table[name] for name in names), dtype=np.int64)
