"""The nouns a datum passes through: Series and Panel, Covariate, Borders, Batch, Forecast.

Arrays here are numpy on the data side (``Series``) and torch on the model side (``Batch``, ``Forecast``). Frames stay
with the readers and the forecaster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch

from trellis_ts.errors import ConfigError
from trellis_ts.quantiles import QuantileCurve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.distributions import PredictiveDistribution

SplitName = Literal["train", "validation", "test"]
Role = Literal["past", "known", "static"]
"""When a covariate is known: up to the forecast's origin, up to its end, or always (one value per series)."""


@dataclass(frozen=True)
class Covariate:
    """A column that helps to forecast the others.

    ``categories`` are the values of a column that is no number, None for numbers; the data hold their positions.
    ``loc`` and ``scale`` are the statistics of a column of numbers over all training rows, 0 and 1 as read.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    role: Role
    categories: tuple[str, ...] | None = None
    loc: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Series:
    """One series: ``time`` holds ``[T]`` stamps, ``values`` ``[T, C]`` numbers with NaN where nothing was measured.

    Stamps are ``datetime64[ns]``: instants in UTC where the panel has a time zone, wall-clock time where it has none.
    Covariates are numbers, or positions in ``Covariate.categories``, with NaN where missing; None where there are none.
    """

    name: str
    time: NDArray[np.datetime64]
    values: NDArray[np.float64]
    past: NDArray[np.float64] | None = None
    """``[T, P]``, known up to the last row."""
    known: NDArray[np.float64] | None = None
    """``[T + F, K]``, known for ``F`` steps more than the values."""
    static: NDArray[np.float64] | None = None
    """``[S]``, one value for the whole series."""
    key: tuple[str, ...] = ()
    """What the columns that name the series hold, where there are several; ``name`` is made of them."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Columns:
    """The names a table's columns have in the user's own file; ``id`` is None for a wide table.

    Where several columns name the series together, ``keys`` are their names and ``id`` is those joined by commas.
    """

    time: str
    id: str | None
    channels: tuple[str, ...]
    keys: tuple[str, ...] = ()
    covariates: tuple[Covariate, ...] = ()
    """In the order of the columns in ``Series.past``, ``known`` and ``static``."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One or many series that share channels and a calendar, as read from one table.

    ``freq`` is a pandas offset alias; ``timezone`` an IANA name or fixed offset, None for wall-clock time. ``notes``
    say in plain words what the reader accepted and changed. ``dataset`` is the canonical name of a benchmark, and
    ``day_first`` the order of dates like 02/03/2024 in the table, None where it had none.
    """

    series: tuple[Series, ...]
    columns: Columns
    freq: str
    timezone: str | None = None
    notes: tuple[str, ...] = ()
    source: str = "<memory>"
    dataset: str | None = None
    day_first: bool | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        return self.columns.channels

    @property
    def num_channels(self) -> int:
        return len(self.columns.channels)

    def covariates(self, role: Role) -> tuple[Covariate, ...]:
        """The covariates of one role, in the order of the series' columns."""
        return tuple(each for each in self.columns.covariates if each.role == role)

    @property
    def is_wide(self) -> bool:
        """Whether the table had one column per channel and no column naming the series."""
        return self.columns.id is None


@dataclass(frozen=True)
class Borders:
    """Half-open ``[start, stop)`` rows of one series' splits.

    What is predicted lies inside its split; a context may reach back across a border.
    """

    train: tuple[int, int]
    validation: tuple[int, int]
    test: tuple[int, int]

    def of(self, split: SplitName) -> tuple[int, int]:
        """The rows of one split."""
        rows: tuple[int, int] = getattr(self, split)
        return rows


class Features(NamedTuple):
    """Covariates as the model reads them, over the steps of a window or (``static``) without the axis of steps."""

    values: Float[Tensor, "batch *step number"]
    """Numbers on the scale of the training rows; 0 where missing."""
    observed: Bool[Tensor, "batch *step number"]
    """True where there was a number."""
    codes: Int[Tensor, "batch *step category"]
    """Categories counted from 1 in the model's record; 0 for one it does not hold, and where missing."""


class Batch(NamedTuple):
    """What the model reads, on the scale of the training rows (mean 0, standard deviation 1 per series and channel).

    Contexts shorter than the model's are padded on the left as unobserved.
    """

    context: Float[Tensor, "batch context channel"]
    """NaN-free: unobserved positions hold 0."""
    observed: Bool[Tensor, "batch context channel"]
    """True where the context was measured."""
    phase: Int[Tensor, " batch"]
    """Position in the season of the first context step."""
    series: Int[Tensor, " batch"]
    """Which series of the panel."""
    future: Float[Tensor, "batch horizon channel"] | None = None
    """What is to be predicted, 0 where missing; None when forecasting."""
    future_observed: Bool[Tensor, "batch horizon channel"] | None = None
    """True where the future was measured."""
    past: Features | None = None
    """Over the context; None without past covariates."""
    known: Features | None = None
    """Over context and horizon, or further where forecasts are fed back; None without known covariates."""
    static: Features | None = None
    """Without steps; None without static attributes."""
    loc: Float[Tensor, "batch 1 channel"] | None = None
    """With ``scale`` what takes this scale to data units, ``value * scale + loc``; only counts ask for it."""
    scale: Float[Tensor, "batch 1 channel"] | None = None
    origin: Int[Tensor, " batch"] | None = None
    """First row after the context, counted from the series' own start."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; without double precision where the device has none."""
        return Batch(*(None if part is None else _moved(part, device) for part in self))  # type: ignore[arg-type]


class Segment(NamedTuple):
    """A stretch of several series that the streaming model reads in one go, on the scale of the training rows.

    With ``L`` the model's history length, ``P`` its patch length and ``N`` tokens, the steps are the ``L`` before the
    segment, its ``N * P``, and ``P - 1`` after it, up to the last of which a query may stand.
    """

    values: Float[Tensor, "batch step channel"]
    """NaN-free: unobserved positions hold 0."""
    observed: Bool[Tensor, "batch step channel"]
    """True where a value was measured."""
    offsets: Int[Tensor, "batch token"]
    """How many steps after each token's end its query stands, below ``P``."""
    phase: Int[Tensor, " batch"]
    """Position in the season of the first step of ``values``."""
    calendar: Float[Tensor, "batch inner feature"] | None = None
    """Of the ``N * P + P - 1`` steps from the segment's first on; None for a model without a calendar."""
    loc: Float[Tensor, "batch 1 channel"] | None = None
    """With ``scale`` what takes this scale to data units; only counts ask for it."""
    scale: Float[Tensor, "batch 1 channel"] | None = None
    future: Float[Tensor, "place horizon channel"] | None = None
    """What follows each query, 0 where missing; None when forecasting."""
    future_observed: Bool[Tensor, "place horizon channel"] | None = None
    """True where the future was measured and is to be scored."""
    is_first: bool = True
    """Whether the state starts anew with this segment."""
    series: Int[Tensor, " batch"] | None = None
    """Which series of the panel."""
    origin: Int[Tensor, " batch"] | None = None
    """Row of the segment's first step, counted from the series' own start."""

    def to(self, device: torch.device) -> Segment:
        """The same segment on another device."""
        parts = (part if part is None or isinstance(part, bool) else _to(part, device) for part in self)
        return Segment(*parts)  # type: ignore[arg-type]


def _moved(part: Tensor | Features, device: torch.device) -> Tensor | Features:
    if isinstance(part, Features):
        return Features(*(_to(each, device) for each in part))
    return _to(part, device)


def _to(part: Tensor, device: torch.device) -> Tensor:
    if device.type == "mps" and part.dtype == torch.float64:
        part = part.float()
    return part.to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted values: ``point`` is ``[batch, horizon, channel]``, ``quantiles`` has the levels on a last axis.

    ``quantiles`` is None for a model that gives points only; else ``point`` is the median (the trained level nearest to
    0.5), or the mean of a forecast distribution. ``distribution`` is what lies behind the quantiles where more is known
    than those: a distribution's parameters, or a curve of more levels.
    """

    point: Float[Tensor, "batch horizon channel"]
    quantiles: Float[Tensor, "batch horizon channel quantile"] | None = None
    quantile_levels: tuple[float, ...] = ()
    distribution: PredictiveDistribution | QuantileCurve | None = None

    def quantile(self, level: float) -> Float[Tensor, "batch horizon channel"]:
        """The quantile at any level between 0 and 1.

        A level that is not in ``quantile_levels`` comes from the distribution, or is interpolated between those levels
        and lies on a normal tail beyond them (``trellis_ts.quantiles``).

        Raises:
            ConfigError: the level is not between 0 and 1, or the forecast does not tell.
        """
        if not 0 < level < 1:
            raise ConfigError(f"quantile level {level} must lie between 0 and 1")
        if self.quantiles is not None and level in self.quantile_levels:
            return self.quantiles[..., self.quantile_levels.index(level)]
        return self.marginal().quantile(torch.tensor(level, dtype=torch.float64))

    def at_levels(self, levels: Sequence[float]) -> Forecast:
        """The same forecast with the quantiles of other levels, in rising order.

        Raises:
            ConfigError: as for ``quantile``.
        """
        chosen = tuple(sorted(set(levels)))
        quantiles = torch.stack([self.quantile(level) for level in chosen], dim=-1)
        return replace(self, quantiles=quantiles, quantile_levels=chosen)

    def marginal(self) -> PredictiveDistribution | QuantileCurve:
        """What is known of each element's distribution.

        Raises:
            ConfigError: a forecast of points, or of a single quantile, which tells nothing of other levels.
        """
        if self.distribution is not None:
            return self.distribution
        if self.quantiles is None or len(self.quantile_levels) < 2:
            known = "points only" if self.quantiles is None else f"the level {self.quantile_levels[0]:g} only"
            raise ConfigError(
                f"this forecast gives {known}, which tells nothing of other quantiles; train with --loss quantile and "
                "two or more levels, or with a distribution such as --loss student_t"
            )
        return QuantileCurve(self.quantile_levels, self.quantiles)

    def map(self, function: Callable[[Tensor], Tensor]) -> Forecast:
        """A function applied to all tensors; it must act on the first three axes only."""
        return Forecast(
            point=function(self.point),
            quantiles=None if self.quantiles is None else function(self.quantiles),
            quantile_levels=self.quantile_levels,
            distribution=None if self.distribution is None else self.distribution.map(function),
        )

    def affine(self, loc: Float[Tensor, "batch 1 channel"], scale: Float[Tensor, "batch 1 channel"]) -> Forecast:
        """The forecast of ``loc + scale`` times what this one forecasts."""
        quantiles = self.quantiles
        return Forecast(
            point=self.point * scale + loc,
            quantiles=None if quantiles is None else quantiles * scale[..., None] + loc[..., None],
            quantile_levels=self.quantile_levels,
            distribution=None if self.distribution is None else self.distribution.affine(loc, scale),
        )

    def as_counts(self) -> Forecast:
        """In whole numbers, of a forecast of counts in the units of the data."""
        forecast = self
        if isinstance(self.distribution, QuantileCurve):
            forecast = replace(self, distribution=replace(self.distribution, is_count=True))
        return replace(forecast, quantiles=None).at_levels(self.quantile_levels)

    @staticmethod
    def joined(forecasts: Sequence[Forecast], dim: int) -> Forecast:
        """Forecasts of one kind, one after the other along an axis."""
        first = forecasts[0]
        quantiles = [each.quantiles for each in forecasts if each.quantiles is not None]
        others: list[Any] = [each.distribution for each in forecasts[1:]]
        return Forecast(
            point=torch.cat([each.point for each in forecasts], dim=dim),
            quantiles=torch.cat(quantiles, dim=dim) if quantiles else None,
            quantile_levels=first.quantile_levels,
            distribution=None if first.distribution is None else first.distribution.joined(others, dim),
        )
