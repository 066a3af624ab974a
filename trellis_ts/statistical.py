"""Classical models of statsforecast as baselines: fitted anew to the rows before every origin.

statsforecast comes with ``pip install trellis-ts[baselines]`` and is imported when such a baseline is asked for.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

STATISTICAL_BASELINES = ("auto_ets", "auto_theta", "auto_arima", "mstl")
# Fewer rows than this are no series to fit a model to.
_FEWEST_ROWS = 4


class StatisticalModel(Protocol):
    """What is used of a statsforecast model."""

    def forecast(self, y: NDArray[np.float64], h: int, *, level: list[float] | None = None) -> dict[str, object]: ...


def load_model(name: str, season_length: int) -> StatisticalModel:
    """A statsforecast model by the name of its baseline.

    Raises:
        ConfigError: statsforecast is not installed.
    """
    try:
        from statsforecast import models
    except ImportError as error:
        raise ConfigError(
            f"the baseline {name} needs statsforecast, which is not installed ({error}); "
            "pip install 'trellis-ts[baselines]', or choose from naive, seasonal_naive, drift"
        ) from None
    if name == "mstl":
        return cast("StatisticalModel", models.MSTL(season_length=[season_length]))
    classes = {"auto_ets": models.AutoETS, "auto_theta": models.AutoTheta, "auto_arima": models.AutoARIMA}
    return cast("StatisticalModel", classes[name](season_length=season_length))


def statistical_forecast(
    model: StatisticalModel,
    history: NDArray[np.float64],
    prediction_length: int,
    quantile_levels: Sequence[float] = (),
) -> NDArray[np.float64] | None:
    """Fits one series and forecasts it, in the units of its values.

    Rows before the first number are dropped and gaps of the history filled along a line (these models know no gaps);
    what is to be forecast is never touched.

    Args:
        model: from ``load_model``.
        history: ``[time]``, rows before the origin, NaN where missing.
        prediction_length: steps to forecast.
        quantile_levels: levels to give besides the point.

    Returns:
        ``[horizon, 1 + quantile]``, the point first; None where the history is too short or the model failed on it.
    """
    known = np.flatnonzero(~np.isnan(history))
    if len(known) < _FEWEST_ROWS:
        return None
    rows = np.arange(known[0], len(history))
    values = np.interp(rows, known, history[known])
    central = sorted({_central(level) for level in quantile_levels if level != 0.5})
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # on convergence and short seasons; a failure is counted by the caller
            found = model.forecast(y=values, h=prediction_length, level=list(central) or None)
    except Exception:  # whatever a fit on an odd series ends in; the caller says how often
        return None
    columns = [_column(found, "mean")]
    for level in quantile_levels:
        side = "lo" if level < 0.5 else "hi"
        columns.append(columns[0] if level == 0.5 else _column(found, f"{side}-{_central(level)}"))
    result = np.stack(columns, axis=1)
    return result if np.isfinite(result).all() else None


def _central(level: float) -> float:
    """The central interval, in per cent, one end of which is this quantile; a whole number where it is one."""
    percent = round(100 * abs(1 - 2 * level), 6)
    return int(percent) if percent == int(percent) else percent


def _column(found: dict[str, object], name: str) -> NDArray[np.float64]:
    return np.asarray(found[name], dtype=np.float64)
