"""The nouns a datum passes through: Series and Panel, Covariate, Borders, Batch, Forecast.

Arrays here are numpy on the data side (``Series``) and torch on the model side (``Batch``, ``Forecast``). Frames stay
with the readers and the forecaster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

SplitName = Literal["train", "validation", "test"]
Role = Literal["past", "known", "static"]
"""When a covariate is known: up to the forecast's origin, up to its end, or always (one value per series)."""
Cycle = Literal["minute", "hour", "day", "week", "year"]


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
    say in plain words what the reader accepted and changed. ``dataset`` is the canonical name of a benchmark.
    """

    series: tuple[Series, ...]
    columns: Columns
    freq: str
    timezone: str | None = None
    notes: tuple[str, ...] = ()
    source: str = "<memory>"
    dataset: str | None = None

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

    def to(self, device: torch.device) -> Features:
        """The same features on another device."""
        return Features(*(each.to(device, non_blocking=True) for each in self))


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

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.context.to(device, non_blocking=True),
            self.observed.to(device, non_blocking=True),
            self.phase.to(device, non_blocking=True),
            self.series.to(device, non_blocking=True),
            None if self.future is None else self.future.to(device, non_blocking=True),
            None if self.future_observed is None else self.future_observed.to(device, non_blocking=True),
            *(None if each is None else each.to(device) for each in (self.past, self.known, self.static)),
        )


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted values: ``point`` is ``[batch, horizon, channel]``, ``quantiles`` has the levels on a last axis.

    ``quantiles`` is None for a model trained to give points only; else ``point`` is the median (the level nearest
    to 0.5).
    """

    point: Float[Tensor, "batch horizon channel"]
    quantiles: Float[Tensor, "batch horizon channel quantile"] | None = None
    quantile_levels: tuple[float, ...] = ()

    def quantile(self, level: float) -> Float[Tensor, "batch horizon channel"]:
        """One of the trained quantile levels.

        Raises:
            ValueError: the level was not trained.
        """
        if self.quantiles is None or level not in self.quantile_levels:
            raise ValueError(f"quantile {level} was not trained; there are {self.quantile_levels}")
        return self.quantiles[..., self.quantile_levels.index(level)]
