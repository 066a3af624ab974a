"""Lengths chosen from the data where the configuration leaves them open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trellis_ts.config import CovariateShape, WindowShape
from trellis_ts.datasets import calendar
from trellis_ts.datasets.cycles import useful_cycles
from trellis_ts.datasets.long_horizon import find_benchmark
from trellis_ts.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trellis_ts.config import Cycle, WindowConfig
    from trellis_ts.datasets.covariates import CovariateScaler
    from trellis_ts.types import Panel, Role

# A context spans this many seasons of sub-daily data (a week of days) or of coarser data, up to the longest.
_SEASONS_SUB_DAILY, _SEASONS_COARSER = 7, 3
_SUB_DAILY_UNITS = ("h", "min", "s", "ms", "us", "ns")
_LONGEST_CHOSEN_CONTEXT = 1024
_CHOSEN_NUM_PATCHES = 16


def choose_prediction_length(panel: Panel, window: WindowConfig) -> int:
    """The configured horizon, else a customary one for the frequency, at most a sixth of the longest series."""
    if window.prediction_length is not None:
        return window.prediction_length
    longest = max(len(series) for series in panel.series)
    return max(1, min(calendar.default_prediction_length(panel.freq), longest // 6))


def choose_season_length(panel: Panel, window: WindowConfig, seasons: Mapping[int, float] | None = None) -> int:
    """The configured season, else the benchmark's, else the customary one for the frequency.

    Where the customary one is not among the seasons found in the data but another is, the strongest of those.
    """
    if window.season_length is not None:
        return window.season_length
    if panel.dataset is not None and (spec := find_benchmark(panel.dataset)) is not None:
        return spec.season_length
    customary = calendar.season_length(panel.freq)
    return customary if not seasons or customary in seasons else max(seasons, key=lambda length: seasons[length])


def choose_shape(
    panel: Panel, window: WindowConfig, *, train_rows: int, seasons: Mapping[int, float] | None = None
) -> WindowShape:
    """All lengths of a model for this panel, whose longest series has ``train_rows`` training rows.

    Args:
        panel: the series.
        window: what is named is kept.
        train_rows: rows of the longest series to train on.
        seasons: found in the data, with their strength (``trellis_ts.datasets.seasons``); None leaves the data unasked.

    Raises:
        ConfigError: a length that was asked for does not fit the training rows.
        DataError: the series are too short for a patch and a horizon.
    """
    prediction_length = choose_prediction_length(panel, window)
    season_length = choose_season_length(panel, window, seasons)
    room = train_rows - prediction_length
    if window.context_length is not None:
        context_length = window.context_length
        if context_length > room:
            raise ConfigError(
                f"context_length={context_length} and prediction_length={prediction_length} exceed the {train_rows} "
                f"rows of split 'train' of {panel.source}; shorten one of them"
            )
    else:
        is_sub_daily = panel.freq.lstrip("0123456789") in _SUB_DAILY_UNITS
        num_seasons = _SEASONS_SUB_DAILY if is_sub_daily else _SEASONS_COARSER
        wanted = max(num_seasons * season_length, 4 * prediction_length, *(2 * length for length in seasons or ()))
        wanted = min(wanted, _LONGEST_CHOSEN_CONTEXT)
        # Half of the rows stay free to be predicted, so that a short series still gives many windows.
        context_length = max(1, min(wanted, room // 2))
    patch_length = window.patch_length or max(1, round(context_length / _CHOSEN_NUM_PATCHES))
    if seasons and window.patch_length is None:
        patch_length = _nearest_divisor(season_length, patch_length)
    if room < patch_length:
        raise DataError(
            f"{panel.source}: too short to train on: {train_rows} training rows do not hold a patch of {patch_length} "
            f"and a horizon of {prediction_length}; lower --patch-length or --prediction-length, or bring more rows"
        )
    if window.context_length is None and window.patch_length is None and context_length > patch_length:
        context_length -= context_length % patch_length
    return WindowShape(
        context_length=max(context_length, patch_length) if window.context_length is None else context_length,
        prediction_length=prediction_length,
        patch_length=patch_length,
        patch_stride=window.patch_stride or patch_length,
        season_length=season_length,
        num_channels=panel.num_channels,
    )


def _nearest_divisor(season_length: int, patch_length: int) -> int:
    """The whole fraction of a season nearest to a patch length in ratio, so that seasons consist of whole patches."""
    divisors = [length for length in range(1, season_length + 1) if season_length % length == 0]
    return min(divisors, key=lambda length: max(length / patch_length, patch_length / length))


def choose_cycles(panel: Panel, setting: bool | None, rows: Sequence[tuple[int, int]]) -> tuple[Cycle, ...]:
    """The cycles of the calendar to read: those the training rows hold twice.

    Where the setting is None, a benchmark is left as its protocol has it.
    """
    if setting is False or (setting is None and panel.dataset is not None):
        return ()
    return useful_cycles(panel, rows)


def covariate_shape(scaler: CovariateScaler) -> CovariateShape:
    """What a model reads of the covariates of a scaler."""

    def numbers(role: Role) -> int:
        return sum(each.categories is None for each in scaler.of_role(role))

    def categories(role: Role) -> tuple[int, ...]:
        return tuple(len(each.categories) for each in scaler.of_role(role) if each.categories is not None)

    return CovariateShape(
        past_numbers=numbers("past"),
        past_categories=categories("past"),
        known_numbers=numbers("known"),
        known_categories=categories("known"),
        static_numbers=numbers("static"),
        static_categories=categories("static"),
        cycles=scaler.cycles,
    )


def explain_shape(shape: WindowShape, panel: Panel) -> str:
    """The chosen lengths in one line."""
    text = (
        f"reads {shape.context_length} steps of {panel.freq} as {shape.num_patches} patches of {shape.patch_length}, "
        f"predicts {shape.prediction_length}; season of {shape.season_length}"
    )
    if panel.columns.covariates:
        text += f"; covariates {', '.join(f'{each.name} ({each.role})' for each in panel.columns.covariates)}"
    if shape.covariates.cycles:
        text += f"; calendar of {', '.join(shape.covariates.cycles)}"
    return text


def explain_seasons(shape: WindowShape, panel: Panel, seasons: Mapping[int, float] | None) -> tuple[str, ...]:
    """What the data say about seasons, in one line."""
    if seasons is None:
        return ()
    if not seasons:
        return (f"no season stands out; {shape.season_length} steps of {panel.freq} is the customary one",)
    found = " and ".join(f"{length} steps (autocorrelation {value:.2f})" for length, value in seasons.items())
    return (f"found a season of {found}",)
