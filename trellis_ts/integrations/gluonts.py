"""GluonTS: ``TrellisEstimator`` trains on a data set of GluonTS, ``TrellisPredictor`` gives its forecasts.

Fields of the entries become covariates: ``feat_dynamic_real`` and ``feat_dynamic_cat`` known over the horizon, those
that begin with ``past_`` up to the last row, ``feat_static_real`` and ``feat_static_cat`` one value per series. Fields
that every entry of the training data has are read, and are then needed to forecast.
"""

# No `from __future__ import annotations`: GluonTS reads the types of a constructor when the class is made.
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from gluonts.core.component import validated
from gluonts.model.estimator import Estimator
from gluonts.model.forecast import Forecast, QuantileForecast, SampleForecast
from gluonts.model.predictor import Predictor
from numpy.typing import NDArray

from trellis_ts.config import Preset
from trellis_ts.errors import CheckpointError, DataError
from trellis_ts.forecaster import Forecaster
from trellis_ts.integrations.indices import stamps_of
from trellis_ts.types import Borders, Columns, Covariate, Panel, Role, Series
from trellis_ts.types import Forecast as TrellisForecast

Entry = dict[str, Any]

_OPTIONS_FILE, _MODEL_FOLDER = "trellis.json", "trellis"
_SERIES_PER_BATCH = 256


@dataclass(frozen=True)
class _Field:
    """A field of GluonTS and what it is here."""

    name: str
    role: Role
    is_category: bool


_PREFIXES: dict[str, Role] = {"feat_dynamic": "known", "past_feat_dynamic": "past", "feat_static": "static"}
_FIELDS = tuple(
    _Field(f"{prefix}_{kind}", role, kind == "cat") for prefix, role in _PREFIXES.items() for kind in ("real", "cat")
)


class TrellisEstimator(Estimator):
    """Trains a Trellis forecaster on a GluonTS data set.

    Args:
        prediction_length: steps to forecast.
        freq: frequency of the data; that of the entries' ``start`` unless given.
        lead_time: steps between the last observed row and the first that is forecast.
        forecast_type: ``quantile`` gives ``QuantileForecast``, whose ``mean`` is the point forecast (the median, of a
            model of quantiles); ``sample`` gives ``SampleForecast``: paths whose steps hang together.
        preset: how much effort: ``fast`` takes well under a minute on two CPU cores, ``balanced`` minutes, ``accurate``
            up to an hour. It chooses what ``settings`` leave open.
        settings: any other setting of ``trellis train`` by its name, such as ``{"max_time": "5m", "width": 32}``.
    """

    @validated()  # type: ignore[no-untyped-call]
    def __init__(
        self,
        prediction_length: int,
        freq: str | None = None,
        lead_time: int = 0,
        forecast_type: Literal["quantile", "sample"] = "quantile",
        preset: Preset = "balanced",
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(lead_time=lead_time)
        self.prediction_length = prediction_length
        self.freq = freq
        self.forecast_type = forecast_type
        self.preset = preset
        self.settings = dict(settings or {})

    def train(
        self,
        training_data: Iterable[Entry],
        validation_data: Iterable[Entry] | None = None,
    ) -> "TrellisPredictor":
        """Trains on all rows of the training data, but for those held out to choose the epoch.

        Without validation data those are the last tenth of every series (``validation_size``), at least one horizon.
        With it they are the last horizon of every series there.

        Raises:
            ConfigError: a setting does not exist or is out of its range.
            DataError: there are no series, too short ones, or their frequencies differ.
        """
        panel = _panel(list(training_data), self.freq, "<training data>")
        horizon = self.prediction_length + self.lead_time
        borders = None
        if validation_data is not None:
            validation = _panel(list(validation_data), self.freq, "<validation data>", _features(panel))
            panel, borders = _with_validation(panel, validation, horizon)
        settings = {"test_size": 0, **self.settings, "prediction_length": horizon}
        forecaster = Forecaster.fit_panel(panel, preset=self.preset, borders=borders, **settings)
        return TrellisPredictor(forecaster, lead_time=self.lead_time, forecast_type=self.forecast_type)


class TrellisPredictor(Predictor):
    """A trained forecaster with the interface of GluonTS.

    Args:
        forecaster: of any training, also from the command line.
        lead_time: steps of its horizon that are skipped.
        forecast_type: as for ``TrellisEstimator``.
    """

    def __init__(
        self, forecaster: Forecaster, lead_time: int = 0, forecast_type: Literal["quantile", "sample"] = "quantile"
    ) -> None:
        super().__init__(forecaster.prediction_length - lead_time, lead_time=lead_time)
        self.forecaster = forecaster
        self.forecast_type = forecast_type

    def predict(self, dataset: Iterable[Entry], num_samples: int | None = None) -> Iterator[Forecast]:
        """One forecast per entry, in their order.

        Args:
            dataset: entries with the fields the model was trained on; ``feat_dynamic_*`` over the horizon as well.
            num_samples: paths of a ``SampleForecast``, 100 unless given; of no effect on a ``QuantileForecast``.

        Raises:
            DataError: an entry lacks a field or has another frequency.
        """
        entries = iter(dataset)
        data = self.forecaster.checkpoint.data
        read = {_field_of(each.name) for each in data.covariates}
        # A series without a name is the one the model was trained on, or, where there were several, none of them.
        unnamed = data.series[0].name if len(data.series) == 1 else "<unnamed>"
        while batch := list(itertools.islice(entries, _SERIES_PER_BATCH)):
            panel = _panel(batch, None, "<dataset>", read, unnamed=unnamed)
            panel = replace(panel, columns=replace(panel.columns, channels=data.channels))
            yield from self._forecasts(batch, panel, num_samples or 100)

    def _forecasts(self, entries: Sequence[Entry], panel: Panel, num_samples: int) -> Iterator[Forecast]:
        arrays: NDArray[np.float64]
        if self.forecast_type == "sample":
            keys: list[str] = []
            arrays = self.forecaster.sample_paths(panel, num_samples=num_samples).double().numpy()
        else:
            keys, arrays = _with_keys(self.forecaster.forecast(panel))
        arrays = arrays[:, :, self.lead_time :]  # [key or sample, series, horizon, channel]
        for index, entry in enumerate(entries):
            one = arrays[:, index]
            values = one[..., 0] if np.ndim(entry["target"]) == 1 else one
            about = {
                "start_date": entry["start"] + np.shape(entry["target"])[-1] + self.lead_time,
                "item_id": entry.get("item_id"),
                "info": entry.get("info"),
            }
            if self.forecast_type == "sample":
                yield SampleForecast(samples=values, **about)
            else:
                yield QuantileForecast(forecast_arrays=values, forecast_keys=keys, **about)

    def serialize(self, path: Path) -> None:
        """Writes the model directory (safetensors and JSON) and what GluonTS needs to find this class again."""
        super().serialize(path)
        self.forecaster.save(path / _MODEL_FOLDER)
        options = {"lead_time": self.lead_time, "forecast_type": self.forecast_type}
        (path / _OPTIONS_FILE).write_text(json.dumps(options) + "\n", encoding="utf-8")

    @classmethod
    def deserialize(cls, path: Path, device: str = "cpu", **_: Any) -> "TrellisPredictor":
        """Reads what ``serialize`` wrote; nothing in it is executed, and nothing goes through GluonTS' decoder.

        Raises:
            CheckpointError: the model or its options are missing or damaged.
        """
        try:
            options = json.loads((path / _OPTIONS_FILE).read_bytes())
            lead_time, forecast_type = options["lead_time"], options["forecast_type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path / _OPTIONS_FILE}: {error}; copy the whole directory") from error
        forecaster = Forecaster.load(path / _MODEL_FOLDER, device=device)
        is_known = isinstance(lead_time, int) and 0 <= lead_time < forecaster.prediction_length
        if not is_known or forecast_type not in ("quantile", "sample"):
            raise CheckpointError(f"{path / _OPTIONS_FILE} is damaged: {options}; copy the whole directory")
        return cls(forecaster, lead_time=lead_time, forecast_type=forecast_type)


def _with_keys(forecast: TrellisForecast) -> tuple[list[str], NDArray[np.float64]]:
    """The quantiles by their keys, and the point forecast as ``mean``: ``[key, series, horizon, channel]``."""
    arrays = [forecast.point]
    if forecast.quantiles is None:
        return ["0.5", "mean"], np.stack([forecast.point.double().numpy()] * 2)
    arrays = [*forecast.quantiles.unbind(-1), forecast.point]
    keys = [f"{level:g}" for level in forecast.quantile_levels]
    return [*keys, "mean"], np.stack([each.double().numpy() for each in arrays])


def _panel(
    entries: Sequence[Entry],
    freq: str | None,
    source: str,
    read: set[str] | None = None,
    *,
    unnamed: str | None = None,
) -> Panel:
    """The entries as series.

    Args:
        entries: of a data set of GluonTS.
        freq: of the data; that of the first entry unless given.
        source: what messages call them.
        read: fields to read as covariates; those that all entries have unless given.
        unnamed: what a series without an ``item_id`` is called; by its place unless given.
    """
    if not entries:
        raise DataError(f"{source} holds no series")
    if read is None:
        read = {each.name for each in _FIELDS if all(each.name in entry for entry in entries)}
    for entry in entries:
        if missing := [name for name in sorted(read) if name not in entry]:
            raise DataError(f"{source}: series {entry.get('item_id')!r} lacks the field(s) {', '.join(missing)}")
    fields = [each for each in _FIELDS if each.name in read]
    categories = {each.name: _categories(entries, each.name) for each in fields if each.is_category}
    series, alias = [], ""
    for index, entry in enumerate(entries):
        values = np.atleast_2d(np.asarray(entry["target"], dtype=np.float64)).T  # [T, C]
        start = _period(entry["start"], freq)
        stamps = stamps_of(pd.period_range(start, periods=max(1, len(values)), freq=start.freq))
        if alias not in ("", stamps.freq):
            raise DataError(f"{source}: steps of {alias} and of {stamps.freq}; a model reads one frequency")
        alias = stamps.freq
        name = entry.get("item_id")
        series.append(
            Series(
                name=str(name) if name is not None else unnamed or str(index),
                time=stamps.time[: len(values)],
                values=values,
                past=_columns(entry, fields, "past", categories),
                known=_columns(entry, fields, "known", categories),
                static=_columns(entry, fields, "static", categories),
            )
        )
    widths = {each.values.shape[1] for each in series}
    if len(widths) > 1:
        raise DataError(f"{source}: targets of {' and '.join(map(str, sorted(widths)))} dimensions; they must agree")
    names = ("target",) if widths == {1} else tuple(f"target_{index}" for index in range(widths.pop()))
    covariates = tuple(
        Covariate(f"{each.name}_{column}", each.role, categories=categories[each.name] if each.is_category else None)
        for role in ("past", "known", "static")
        for each in fields
        if each.role == role
        for column in range(len(np.asarray(entries[0][each.name])))
    )
    return Panel(tuple(series), Columns("timestamp", "item_id", names, covariates=covariates), alias, source=source)


def _period(start: pd.Period | str | pd.Timestamp, freq: str | None) -> pd.Period:
    return start if isinstance(start, pd.Period) else pd.Period(start, freq=freq)


def _categories(entries: Sequence[Entry], name: str) -> tuple[str, ...]:
    """All codes of a field, of whichever of its columns."""
    codes = np.unique(np.concatenate([np.asarray(entry[name]).ravel() for entry in entries]))
    return tuple(f"{int(code)}" for code in codes)


def _columns(
    entry: Entry, fields: Sequence[_Field], role: str, categories: dict[str, tuple[str, ...]]
) -> NDArray[np.float64] | None:
    """The covariates of one role: ``[T, column]``, of static ones ``[column]``; categories by their positions."""
    parts = []
    for field in fields:
        if field.role == role:
            values = np.asarray(entry[field.name], dtype=np.float64).T
            if field.is_category:
                codes = np.array(categories[field.name], dtype=np.int64)
                values = np.searchsorted(codes, values.astype(np.int64)).astype(np.float64)
            parts.append(values)
    return np.concatenate(parts, axis=-1) if parts else None


def _field_of(covariate: str) -> str:
    return covariate.rpartition("_")[0]


def _features(panel: Panel) -> set[str]:
    return {_field_of(each.name) for each in panel.columns.covariates}


def _with_validation(panel: Panel, validation: Panel, horizon: int) -> tuple[Panel, tuple[Borders, ...]]:
    """Both sets of series in one panel, to train on all rows of the first and validate on the last of the second.

    A series of the second that starts as one of the first by the same name is that one, read further.
    """
    if validation.freq != panel.freq:
        raise DataError(f"training data has steps of {panel.freq}, validation data of {validation.freq}")
    panel, validation = _same_categories(panel, validation)
    later = {each.name: each for each in validation.series}
    series, borders = [], []
    for each in panel.series:
        longer = later.get(each.name)
        if longer is None or len(longer) < len(each) or longer.time[0] != each.time[0]:
            series.append(each)
            borders.append(Borders((0, len(each)), (len(each), len(each)), (len(each), len(each))))
            continue
        del later[each.name]
        stop = len(longer)
        series.append(longer)
        borders.append(Borders((0, len(each)), (max(0, stop - horizon), stop), (stop, stop)))
    taken = {each.name for each in series}
    for each in later.values():
        stop = len(each)
        series.append(replace(each, name=f"{each.name} (validation)" if each.name in taken else each.name))
        borders.append(Borders((0, 0), (max(0, stop - horizon), stop), (stop, stop)))
    return replace(panel, series=tuple(series)), tuple(borders)


def _same_categories(panel: Panel, other: Panel) -> tuple[Panel, Panel]:
    """Both panels with categories counted alike."""
    pairs = list(zip(panel.columns.covariates, other.columns.covariates, strict=True))
    merged = tuple(
        one
        if one.categories is None
        else replace(one, categories=tuple(sorted({*one.categories, *(two.categories or ())}, key=int)))
        for one, two in pairs
    )

    def recoded(panel: Panel) -> Panel:
        series = panel.series
        for role in ("past", "known", "static"):
            before = panel.covariates(role)
            after = [each for each in merged if each.role == role]
            for column, (old, new) in enumerate(zip(before, after, strict=True)):
                if old.categories is not None and new.categories is not None:
                    places = np.array([new.categories.index(each) for each in old.categories], dtype=np.float64)
                    series = tuple(_replaced(each, role, column, places) for each in series)
        return replace(panel, series=series, columns=replace(panel.columns, covariates=merged))

    return recoded(panel), recoded(other)


def _replaced(series: Series, role: Role, column: int, places: NDArray[np.float64]) -> Series:
    values = np.array(getattr(series, role))
    values[..., column] = places[values[..., column].astype(np.int64)]
    changed: dict[str, Any] = {role: values}
    return replace(series, **changed)
