"""Compiled loops that copy a window out of the series as they lie in the panel, scaling on the way.

Nothing but the window is written, so the panel is held once, in double precision, and a window costs little more than
the copying of its bytes. A row outside the series comes out as missing. Numba's cache keeps what was compiled.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
from numba import boolean, float32, float64, int16, int64, njit, types

_LOGGER = logging.getLogger(__name__)


def _read_only(scalar, ndim):
    return types.Array(scalar, ndim, "C", readonly=True)


_TABLE, _VECTOR, _INDEX = _read_only(float64, 2), _read_only(float64, 1), _read_only(int64, 1)
_WINDOWS, _MASKS = float32[:, :, ::1], boolean[:, :, ::1]


@cache
def scaled_windows():
    """Compile ``_scaled_windows`` or find it in the cache."""
    return _compiled(types.void(_TABLE, _VECTOR, _VECTOR, _INDEX, _INDEX, _WINDOWS, _MASKS), _scaled_windows)


@cache
def features_windows():
    """Compile ``_features_windows`` or find it in the cache."""
    coding = (_INDEX, _VECTOR, _VECTOR, _INDEX, _read_only(int64, 2))
    calendar = (_read_only(int16, 2), _read_only(float32, 2), _INDEX)
    return _compiled(
        types.void(_TABLE, *coding, *calendar, int64, _INDEX, _INDEX, _WINDOWS, _MASKS, int64[:, :, ::1]),
        _features_windows,
    )


def _compiled(signature, function):
    try:
        return njit(signature, cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        _LOGGER.info("Numba finds no folder for its cache, so every process compiles anew; set NUMBA_CACHE_DIR")
        return njit(signature, nogil=True, error_model="numpy")(function)


def _scaled_windows(values, loc, scale, starts, places, window, observed):
    """Write ``(values - loc) / scale`` of the rows from each of ``starts`` on into ``window[place]``, 0 where missing.

    ``values`` is ``[row, channel]`` of one series, ``window`` and ``observed`` ``[batch, step, channel]``.
    """
    num_rows, num_channels = values.shape
    num_steps = window.shape[1]
    # Several rows at once, however few channels there are, fill the vectors of the processor.
    rows_at_once = 1 + 64 // num_channels
    locs, scales = _repeated(loc, rows_at_once), _repeated(scale, rows_at_once)
    flat = values.reshape(num_rows * num_channels)
    for number_of_window in range(len(starts)):
        start, place = starts[number_of_window], places[number_of_window]
        first = min(max(-start, 0), num_steps)  # steps inside the series
        last = max(min(num_rows - start, num_steps), first)
        numbers = window[place].reshape(num_steps * num_channels)
        mask = observed[place].reshape(num_steps * num_channels)
        numbers[: first * num_channels] = 0
        mask[: first * num_channels] = False
        for step in range(first, last, rows_at_once):
            target, source = step * num_channels, (start + step) * num_channels
            length = min(rows_at_once, last - step) * num_channels
            _scale(flat[source : source + length], locs, scales, numbers[target:], mask[target:])
        numbers[last * num_channels :] = 0
        mask[last * num_channels :] = False


@njit(error_model="numpy")
def _scale(values, loc, scale, numbers, mask):
    for at in range(len(values)):
        number = np.float32((values[at] - loc[at]) / scale[at])
        is_there = number == number
        mask[at] = is_there
        numbers[at] = number if is_there else np.float32(0)


@njit(error_model="numpy")
def _repeated(row, times):
    repeated = np.empty(times * len(row))
    for time in range(times):
        repeated[time * len(row) : (time + 1) * len(row)] = row
    return repeated


def _features_windows(
    values,
    number_columns,
    loc,
    scale,
    category_columns,
    recoded,
    positions,
    waves,
    widths,
    stop,
    starts,
    places,
    window,
    observed,
    codes,
):
    """Write the covariates of the rows from each of ``starts`` to ``stop`` into ``window[place]`` and ``codes``.

    First the numbers, standardised and 0 where missing; then for each cycle the row of ``waves`` at its position, as
    wide as ``widths`` says. ``codes`` are categories by the table ``recoded``, ``[category column, category]``.
    """
    num_numbers, num_steps = len(number_columns), window.shape[1]
    for number_of_window in range(len(starts)):
        start, place = starts[number_of_window], places[number_of_window]
        first = min(max(-start, 0), num_steps)  # steps inside the series
        last = max(min(stop - start, num_steps), first)
        for outside in (slice(0, first), slice(last, num_steps)):
            window[place, outside] = 0
            observed[place, outside] = False
            codes[place, outside] = 0
        observed[place, first:last] = True
        for step in range(first, last):
            row = start + step
            has_values = row < len(values)
            for column in range(num_numbers):
                number = np.float32(np.nan)
                if has_values:
                    number = np.float32((values[row, number_columns[column]] - loc[column]) / scale[column])
                is_there = number == number
                observed[place, step, column] = is_there
                window[place, step, column] = number if is_there else np.float32(0)
            _copy_waves(window, place, step, num_numbers, positions, row, waves, widths)
            for column in range(len(category_columns)):
                code = np.float64(np.nan)
                if has_values:
                    code = values[row, category_columns[column]]
                codes[place, step, column] = recoded[column, int64(code)] if code == code else 0


@njit(error_model="numpy", inline="always")
def _copy_waves(window, place, step, column, positions, row, waves, widths):
    for cycle in range(len(widths)):
        position = positions[row, cycle]
        # Constant lengths, which are those there are, become straight code: three times as fast.
        if widths[cycle] == 6:
            for wave in range(6):
                window[place, step, column + wave] = waves[position, wave]
        elif widths[cycle] == 4:
            for wave in range(4):
                window[place, step, column + wave] = waves[position, wave]
        else:
            for wave in range(widths[cycle]):
                window[place, step, column + wave] = waves[position, wave]
        column += widths[cycle]
