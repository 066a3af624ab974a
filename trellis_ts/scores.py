"""What a backtest finds: running sums while it runs, scores overall, per series and per step when it is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from trellis_ts import metrics
from trellis_ts.quantiles import central_bands
from trellis_ts.significance import DieboldMariano, PairedBootstrap, diebold_mariano, paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from trellis_ts.types import Forecast

MODEL = "model"
_LOSSES = (
    *("count", "squared", "absolute", "squared_original", "absolute_original", "size_original", "smape"),
    *("scaled", "scaled_squared", "scaled_count", "pinball", "pinball_original", "crps", "interval", "covered"),
)
# Losses that are compared origin by origin and series by series, with the name of their mean among the scores.
_COMPARED = {"absolute": "mae", "squared": "mse", "pinball": "quantile_loss"}


@dataclass(frozen=True)
class Scores:
    """Means over observed values of windows, channels and steps; NaN where there is none.

    On the standardised scale of the training rows (the habit of benchmarks) unless the name says otherwise;
    ``*_original`` in the units of the data. ``trellis_ts.metrics`` has the formulas. Quantile scores are None for
    forecasts without quantiles.
    """

    mse: float
    mae: float
    rmse_original: float
    mae_original: float
    smape: float
    """In the units of the data, between 0 and 2."""
    mase: float
    """Absolute errors by the seasonal naive error of each series' rows before its first scored origin; series and
    channels without such an error (constant ones) are left out."""
    rmsse: float
    """The same with squares, and the root of their mean."""
    quantile_loss: float | None = None
    """Doubled, and averaged over the levels."""
    weighted_quantile_loss: float | None = None
    """In the units of the data: summed, and divided by the sum of the absolute values."""
    crps: float | None = None
    """From the quantiles, each level weighted by the share of (0, 1) it stands for."""
    interval_score: float | None = None
    """Of the band between the outermost levels."""
    coverage: float | None = None
    """Of the same band."""


@dataclass(frozen=True)
class Calibration:
    """Shares of the truths: at or below each quantile, in each bin of the PIT histogram (``metrics``), in each band."""

    levels: tuple[float, ...]
    at_or_below: tuple[float, ...]
    pit: tuple[float, ...]
    pit_expected: tuple[float, ...]
    bands: tuple[float, ...]
    """Nominal coverages of the bands between two levels that lie symmetrically, rising."""
    coverage: tuple[float, ...]
    """Shares that lie in them, edges included."""


@dataclass(frozen=True)
class Comparison:
    """The model beside one baseline under one loss; what is negative favours the model.

    ``diebold_mariano`` is None with too few origins, ``bootstrap`` with too few series and channels: see
    ``trellis_ts.significance``.
    """

    baseline: str
    loss: str
    difference: float
    """Relative: ``model / baseline - 1``."""
    diebold_mariano: DieboldMariano | None
    bootstrap: PairedBootstrap | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a model and of baselines on the same windows.

    ``scores`` are overall, ``by_series`` per series and channel in the order of ``items``, ``by_step`` per step of the
    horizon; each by the forecaster's name, the model first as ``"model"``.
    """

    num_windows: int
    num_series: int
    num_values: int
    num_origins: int
    """Different stamps that windows start at."""
    prediction_length: int
    season_length: int
    step: int
    band: float | None
    """Nominal coverage of the band between the outermost quantile levels."""
    items: tuple[tuple[str, str], ...]
    """Name of the series and of the channel; a wide table's series has no name."""
    scores: dict[str, Scores]
    by_series: dict[str, tuple[Scores, ...]]
    by_step: dict[str, tuple[Scores, ...]]
    calibration: dict[str, Calibration]
    comparisons: tuple[Comparison, ...]
    fallbacks: dict[str, int]
    """Forecasts per baseline for which its fit failed; seasonal naive stands in for them."""

    @property
    def forecasters(self) -> tuple[str, ...]:
        """Names, the model's first."""
        return tuple(self.scores)

    @property
    def model(self) -> Scores:
        """The model's scores overall."""
        return self.scores[MODEL]

    @property
    def seasonal_naive(self) -> Scores:
        """Those of seasonal naive.

        Raises:
            KeyError: it was not among the baselines.
        """
        return self.scores["seasonal_naive"]

    def frame(self) -> pd.DataFrame:
        """All scores as a tidy frame: forecaster, scope, series, channel, step, metric, value.

        ``scope`` is ``overall``, ``series`` or ``step``; what does not apply is missing. Steps count from 1.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for name in self.forecasters:
            cells: list[tuple[tuple[Any, ...], Scores]] = [(("overall", None, None, None), self.scores[name])]
            cells += [
                (("series", *item, None), each) for item, each in zip(self.items, self.by_series[name], strict=True)
            ]
            cells += [(("step", None, None, step), each) for step, each in enumerate(self.by_step[name], start=1)]
            for place, scores in cells:
                rows += [(name, *place, metric, value) for metric, value in asdict(scores).items() if value is not None]
        frame = pd.DataFrame(rows, columns=["forecaster", "scope", "series", "channel", "step", "metric", "value"])
        return frame.astype({"step": "Int64", "value": "float64"})

    def data(self) -> dict[str, Any]:
        """Everything as plain dictionaries, lists and numbers; the overall scores under each forecaster's name."""
        head = {
            name: getattr(self, name)
            for name in (
                *("num_windows", "num_series", "num_values", "num_origins", "prediction_length", "season_length"),
                *("step", "band"),
            )
        }
        return {
            **head,
            **{name: asdict(scores) for name, scores in self.scores.items()},
            "by_series": [
                {"series": series, "channel": channel, **{n: asdict(self.by_series[n][index]) for n in self.scores}}
                for index, (series, channel) in enumerate(self.items)
            ],
            "by_step": [
                {"step": step + 1, **{name: asdict(self.by_step[name][step]) for name in self.scores}}
                for step in range(self.prediction_length)
            ],
            "calibration": {name: asdict(each) for name, each in self.calibration.items()},
            "comparisons": [asdict(each) for each in self.comparisons],
            "fallbacks": dict(self.fallbacks),
        }


class ScoredWindows(NamedTuple):
    """The truth of a batch of windows, with what its errors are scaled by."""

    series: NDArray[np.int64]
    """``[batch]``, which series."""
    origin: NDArray[np.int64]
    """``[batch]``, which of the different origin stamps."""
    truth: NDArray[np.float64]
    """``[batch, horizon, channel]``, standardised; NaN where there is none to be scored."""
    loc: NDArray[np.float64]
    """``[batch, 1, channel]``: ``truth * scale + loc`` is in the units of the data."""
    scale: NDArray[np.float64]
    seasonal: NDArray[np.float64]
    """``[batch, 1, channel]``: mean absolute seasonal naive error on the standardised scale, NaN for none."""
    seasonal_squared: NDArray[np.float64]


class ScoreSums:
    """Running sums of one forecaster's losses: per series and channel, per step and per origin, never per window."""

    def __init__(self, shape: tuple[int, int, int], num_origins: int, levels: Sequence[float]) -> None:
        num_series, num_channels, horizon = shape
        self.levels = tuple(levels)
        self.by_item = {name: np.zeros((num_series, num_channels)) for name in _LOSSES}
        self.by_step = {name: np.zeros(horizon) for name in _LOSSES}
        self.by_origin = {name: np.zeros(num_origins) for name in ("count", *_COMPARED)}
        self.below = np.zeros(len(self.levels))
        self.pit = np.zeros(len(self.levels) + 1)
        self.bands = central_bands(self.levels)
        self.inside = np.zeros(len(self.bands))

    def add(self, windows: ScoredWindows, forecast: Forecast) -> None:
        """Adds a batch; ``forecast`` is on the standardised scale and has the levels of the sums, or none at all."""
        missing = np.isnan(windows.truth)
        for name, values in _losses(windows, forecast):
            # A forecast that is no number makes its scores NaN; left out, it would pass for a perfect one.
            unscaled = np.isnan(windows.seasonal) if name in ("scaled", "scaled_squared") else False
            known = np.where(missing | unscaled, 0.0, values)
            np.add.at(self.by_item[name], windows.series, known.sum(axis=1))
            self.by_step[name] += known.sum(axis=(0, 2))
            if name in self.by_origin:
                np.add.at(self.by_origin[name], windows.origin, known.sum(axis=(1, 2)))
        if forecast.quantiles is not None:
            quantiles = forecast.quantiles.double().numpy()
            at_or_below = np.where(np.isnan(quantiles), np.nan, windows.truth[..., None] <= quantiles)
            self.below += np.where(missing[..., None], 0.0, at_or_below).sum(axis=(0, 1, 2))
            self.pit += metrics.pit_histogram(windows.truth, quantiles, self.levels)
            for place, (lower, upper) in enumerate(self.bands.values()):
                covered = metrics.is_covered(windows.truth, quantiles[..., lower], quantiles[..., upper])
                self.inside[place] += np.where(missing, 0.0, covered).sum()

    @staticmethod
    def joined(parts: Sequence[ScoreSums], places: Sequence[NDArray[np.int64]], num_origins: int) -> ScoreSums:
        """The sums over the series of all parts; ``places`` say which of all origins those of each part are."""
        levels, (_, channels) = parts[0].levels, parts[0].by_item["count"].shape
        joined = ScoreSums((0, channels, len(parts[0].by_step["count"])), num_origins, levels)
        for name in _LOSSES:
            joined.by_item[name] = np.concatenate([each.by_item[name] for each in parts])
        for part, place in zip(parts, places, strict=True):
            for name in _LOSSES:
                joined.by_step[name] += part.by_step[name]
            for name, values in part.by_origin.items():
                joined.by_origin[name][place] += values
            for ours, theirs in ((joined.below, part.below), (joined.pit, part.pit), (joined.inside, part.inside)):
                ours += theirs
        return joined

    @property
    def count(self) -> int:
        """Values scored."""
        return int(self.by_item["count"].sum())

    def overall(self) -> Scores:
        return _scores({name: float(sums.sum()) for name, sums in self.by_item.items()}, bool(self.levels))

    def per_item(self) -> tuple[Scores, ...]:
        return _split({name: sums.reshape(-1) for name, sums in self.by_item.items()}, bool(self.levels))

    def per_step(self) -> tuple[Scores, ...]:
        return _split(self.by_step, bool(self.levels))

    def calibration(self) -> Calibration:
        widths = metrics.pit_widths(self.levels)
        return Calibration(
            levels=self.levels,
            at_or_below=tuple((self.below / self.count).tolist()),
            pit=tuple((self.pit / self.count).tolist()),
            pit_expected=tuple(widths.tolist()),
            bands=tuple(self.bands),
            coverage=tuple((self.inside / self.count).tolist()),
        )


class Summaries(TypedDict):
    """The fields of an ``Evaluation`` that come from sums."""

    scores: dict[str, Scores]
    by_series: dict[str, tuple[Scores, ...]]
    by_step: dict[str, tuple[Scores, ...]]
    calibration: dict[str, Calibration]
    comparisons: tuple[Comparison, ...]


def summaries(sums: dict[str, ScoreSums], *, overlap: int, seed: int) -> Summaries:
    """Means from sums, and the model (the first) beside each of the others."""
    model, *baselines = sums
    return Summaries(
        scores={name: each.overall() for name, each in sums.items()},
        by_series={name: each.per_item() for name, each in sums.items()},
        by_step={name: each.per_step() for name, each in sums.items()},
        calibration={name: each.calibration() for name, each in sums.items() if each.levels},
        comparisons=tuple(
            found for name in baselines for found in _compare(sums[model], sums[name], name, overlap=overlap, seed=seed)
        ),
    )


def _compare(model: ScoreSums, baseline: ScoreSums, name: str, *, overlap: int, seed: int) -> list[Comparison]:
    """The model beside a baseline under each loss both have."""
    found = []
    for loss, label in _COMPARED.items():
        if loss == "pinball" and not (model.levels and baseline.levels):
            continue
        ours, theirs = model.by_item[loss].reshape(-1), baseline.by_item[loss].reshape(-1)
        scored = model.by_item["count"].reshape(-1) > 0
        count = model.by_origin["count"]
        is_origin = count > 0
        difference = (model.by_origin[loss] - baseline.by_origin[loss])[is_origin] / count[is_origin]
        found.append(
            Comparison(
                baseline=name,
                loss=label,
                difference=float(ours.sum() / theirs.sum() - 1) if theirs.sum() > 0 else float("nan"),
                diebold_mariano=diebold_mariano(difference, overlap),
                bootstrap=paired_bootstrap(ours[scored], theirs[scored], seed=seed),
            )
        )
    return found


def _losses(windows: ScoredWindows, forecast: Forecast) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Each loss ``[batch, horizon, channel]``; what it is where the truth is missing does not matter."""
    truth, loc, scale = windows.truth, windows.loc, windows.scale
    point = forecast.point.double().numpy()
    error = np.abs(point - truth)
    yield "count", (~np.isnan(truth)).astype(np.float64)
    yield "absolute", error
    yield "squared", error**2
    yield "absolute_original", error * scale
    yield "squared_original", (error * scale) ** 2
    yield "size_original", np.abs(truth * scale + loc)
    yield "smape", metrics.smape_error(truth * scale + loc, point * scale + loc)
    yield "scaled", error / windows.seasonal
    yield "scaled_squared", error**2 / windows.seasonal_squared
    yield "scaled_count", (~np.isnan(truth) & ~np.isnan(windows.seasonal)).astype(np.float64)
    if forecast.quantiles is None:
        return
    quantiles, levels = forecast.quantiles.double().numpy(), forecast.quantile_levels
    pinball = metrics.pinball_loss(truth, quantiles, levels)
    yield "pinball", pinball.mean(axis=-1)
    yield "pinball_original", pinball.mean(axis=-1) * scale
    yield "crps", pinball @ metrics.level_weights(levels)
    lower, upper = quantiles[..., 0], quantiles[..., -1]
    yield "interval", metrics.interval_score(truth, lower, upper, (levels[0], levels[-1]))
    yield "covered", metrics.is_covered(truth, lower, upper)


def _split(sums: dict[str, NDArray[np.float64]], has_quantiles: bool) -> tuple[Scores, ...]:
    columns = {name: values.tolist() for name, values in sums.items()}
    return tuple(
        _scores({name: values[index] for name, values in columns.items()}, has_quantiles)
        for index in range(len(columns["count"]))
    )


def _scores(sums: dict[str, float], has_quantiles: bool) -> Scores:
    def mean(name: str, by: str = "count") -> float:
        return sums[name] / sums[by] if sums[by] > 0 else float("nan")

    return Scores(
        mse=mean("squared"),
        mae=mean("absolute"),
        rmse_original=mean("squared_original") ** 0.5,
        mae_original=mean("absolute_original"),
        smape=mean("smape"),
        mase=mean("scaled", "scaled_count"),
        rmsse=mean("scaled_squared", "scaled_count") ** 0.5,
        quantile_loss=mean("pinball") if has_quantiles else None,
        weighted_quantile_loss=mean("pinball_original", "size_original") if has_quantiles else None,
        crps=mean("crps") if has_quantiles else None,
        interval_score=mean("interval") if has_quantiles else None,
        coverage=mean("covered") if has_quantiles else None,
    )


METRICS = tuple(each.name for each in fields(Scores))
"""Names of the scores."""
