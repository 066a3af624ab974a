"""Covariates: columns read as numbers or categories, their future rows, and their statistics over training rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from trellis_ts.datasets import calendar
from trellis_ts.datasets.columns import as_texts, cell_texts, read_numbers, shorten
from trellis_ts.datasets.dates import looks_like_dates
from trellis_ts.datasets.roles import split_names
from trellis_ts.errors import DataError
from trellis_ts.types import Covariate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trellis_ts.config import Cycle
    from trellis_ts.datasets.columns import Table
    from trellis_ts.datasets.roles import Roles
    from trellis_ts.types import Panel, Role, Series

    Values = NDArray[np.float64]

# More distinct values than this are names or measurements, not categories.
_MOST_CATEGORIES = 10_000


@dataclass(frozen=True)
class CovariateNames:
    """Which columns are covariates, by role; those of ``categorical`` are read as categories though they be numbers.

    A text may hold several names separated by commas.
    """

    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()

    def resolve(self, table: Table) -> CovariateNames:
        """The names as they are in a table.

        Raises:
            DataError: one is absent, or ``categorical`` names a column that is no covariate.
        """
        past = split_names(table, "--past-covariates", self.past)
        known = split_names(table, "--known-covariates", self.known)
        static = split_names(table, "--static", self.static)
        categorical = split_names(table, "--categorical", self.categorical)
        for name in categorical:
            if name not in (*past, *known, *static):
                hint = "name it with --past-covariates, --known-covariates or --static as well"
                raise DataError(f"{table.source}: --categorical column {name!r} is no covariate; {hint}")
        return CovariateNames(past, known, static, categorical)

    @property
    def all(self) -> tuple[str, ...]:
        """The covariates of every role."""
        return (*self.past, *self.known, *self.static)


def add_covariates(table: Table, roles: Roles, names: CovariateNames) -> Roles:
    """The roles with the covariates' cells converted; ``names`` has to be resolved.

    Raises:
        DataError: a cell cannot be converted, or static attributes are named where there is one series without a name.
    """
    if not names.all:
        return roles
    if names.static and roles.id is None:
        hint = "name the column of series with --id, or leave --static out"
        raise DataError(f"{table.source}: static attributes tell series apart, and there is only one; {hint}")
    found, columns = [], []
    by_role: tuple[tuple[Role, tuple[str, ...]], ...] = (
        ("past", names.past),
        ("known", names.known),
        ("static", names.static),
    )
    for role, members in by_role:
        for name in members:
            covariate, values = _read(table, name, role, as_category=name in names.categorical)
            found.append(covariate)
            columns.append(values)
    return roles._replace(covariates=tuple(found), extras=np.column_stack(columns))


def _read(table: Table, name: str, role: Role, *, as_category: bool) -> tuple[Covariate, Values]:
    """A column as numbers, or as positions among the categories it holds."""
    values = None if as_category else read_numbers(table, name, hint="read the column as categories with --categorical")
    if values is not None:
        return Covariate(name, role), values
    texts = _category_texts(table, name)
    if not as_category and looks_like_dates(texts.drop_null().slice(0, 200), numbers_too=False):
        raise DataError(
            f"{table.source}: covariate {name!r} holds dates, which are neither numbers nor categories; make "
            "numbers of them, or insist with --categorical"
        )
    encoded = texts.dictionary_encode()
    categories = tuple(encoded.dictionary.to_pylist())
    if len(categories) > _MOST_CATEGORIES:
        raise DataError(
            f"{table.source}: covariate {name!r} holds {len(categories)} different texts, too many to be categories "
            f"(at most {_MOST_CATEGORIES}); leave it out or make them fewer"
        )
    codes = pc.cast(encoded.indices, pa.float64()).to_numpy(zero_copy_only=False)
    return Covariate(name, role, categories), codes


def _category_texts(table: Table, name: str) -> pa.Array:
    """Cells as the names of categories: 1 and 1.0 are one, as are TRUE and true; null where missing."""
    texts, missing = cell_texts(as_texts(table.column(name), table.source, name))
    texts = pc.replace_substring_regex(texts, r"^([+-]?\d+)\.0+$", r"\1")
    lower = pc.utf8_lower(texts)
    texts = pc.if_else(pc.is_in(lower, value_set=pa.array(["true", "false"], pa.string())), lower, texts)
    return pc.if_else(pa.array(missing), pa.scalar(None, pa.string()), texts)


def recode(values: Values, categories: Sequence[str], into: Sequence[str]) -> Values:
    """Positions in one list of categories as positions in another, NaN for those it does not hold."""
    position = {name: float(index) for index, name in enumerate(into)}
    table = np.array([*(position.get(name, np.nan) for name in categories), np.nan])
    return table[np.where(np.isnan(values), len(categories), values).astype(np.int64)]


def with_future(panel: Panel, table: Table, roles: Roles, steps: int) -> Panel:
    """The panel with the known covariates of a second table after each series' last row.

    Args:
        panel: the history.
        table: a table with the same columns of times and ids, and the known covariates.
        roles: its times, series and covariates.
        steps: how many steps are needed.

    Raises:
        DataError: a series or a stamp is missing there, or a stamp occurs twice with different values.
    """
    if (panel.timezone is None) != (roles.dates.timezone is None):
        have, lack = (
            ("the history has", "they have") if panel.timezone is not None else ("they have", "the history has")
        )
        raise DataError(f"{table.source}: {have} a time zone and {lack} none; write the times as in the history")
    assert roles.extras is not None
    there = {each.name: (each, roles.extras[:, column]) for column, each in enumerate(roles.covariates)}
    merged = [_merge(each, *there[each.name], table.source) for each in panel.covariates("known")]
    extras = np.column_stack([values for _, values in merged])
    by_series = np.argsort(roles.codes, kind="stable")
    edges = np.searchsorted(roles.codes[by_series], np.arange(1, len(roles.ids)))
    rows_of = dict(zip(roles.ids, np.split(by_series, edges), strict=True))
    series = []
    for each in panel.series:
        rows = rows_of.get(each.name)
        if rows is None:
            after = _spell(panel, each.time[-1])
            raise DataError(f"{table.source}: no row{_of(each)}; add the {steps} steps after {after}")
        future = calendar.future_times(each.time[-1], panel.freq, steps, panel.timezone)
        values = _rows_at(panel, each, table, roles.dates.stamps[rows], extras[rows], future)
        assert each.known is not None
        series.append(replace(each, known=np.concatenate((each.known[: len(each)], values))))
    known = iter(covariate for covariate, _ in merged)
    covariates = tuple(next(known) if each.role == "known" else each for each in panel.columns.covariates)
    return replace(panel, series=tuple(series), columns=replace(panel.columns, covariates=covariates))


def _merge(covariate: Covariate, other: Covariate, values: Values, source: str) -> tuple[Covariate, Values]:
    """The covariate with the categories of both tables, and the second table's values among them."""
    if (covariate.categories is None) != (other.categories is None):
        kinds = ("categories", "numbers")
        now, before = kinds if other.categories is not None else kinds[::-1]
        raise DataError(f"{source}: column {covariate.name!r} holds {now}, in the history {before}; mend the column")
    if covariate.categories is None or other.categories is None:
        return covariate, values
    new = tuple(name for name in other.categories if name not in set(covariate.categories))
    categories = (*covariate.categories, *new)
    return replace(covariate, categories=categories), recode(values, other.categories, categories)


def _rows_at(
    panel: Panel,
    series: Series,
    table: Table,
    stamps: NDArray[np.datetime64],
    rows: Values,
    future: NDArray[np.datetime64],
) -> Values:
    """The rows of one series at the given stamps, which all have to be there."""
    order = np.argsort(stamps, kind="stable")
    stamps, rows = stamps[order], rows[order]
    same = stamps[1:] == stamps[:-1]
    differ = same & ~((rows[1:] == rows[:-1]) | (np.isnan(rows[1:]) & np.isnan(rows[:-1]))).all(axis=1)
    if differ.any():
        stamp = _spell(panel, stamps[int(np.argmax(differ))])
        raise DataError(
            f"{table.source}: {stamp} occurs twice{_of(series)} with different values; keep one of the rows"
        )
    at = np.searchsorted(stamps, future)
    found = (at < len(stamps)) & (stamps[np.minimum(at, len(stamps) - 1)] == future)
    if not found.all():
        raise DataError(
            f"{table.source}: no row for {_spell(panel, future[int(np.argmin(found))])}{_of(series)}; the "
            f"{len(future)} steps after {_spell(panel, series.time[-1])} are needed"
        )
    return rows[at]


def _spell(panel: Panel, stamp: np.datetime64) -> str:
    return calendar.format_times(np.array([stamp]), panel.freq, panel.timezone)[0]


def _of(series: Series) -> str:
    return f" of series {shorten(series.name)}" if series.name else ""


def check_future(panel: Panel, steps: int) -> None:
    """Refuses a panel whose known covariates do not reach as far as is to be forecast.

    Raises:
        DataError: a series has fewer rows of known covariates after its last value than ``steps``.
    """
    known = panel.covariates("known")
    if not known:
        return
    for each in panel.series:
        assert each.known is not None
        reach = len(each.known) - len(each)
        if reach >= steps:
            continue
        stamp = _spell(panel, calendar.future_times(each.time[-1], panel.freq, reach + 1, panel.timezone)[-1])
        shorter = f"; or forecast less with --prediction-length {reach}" if reach else ""
        raise DataError(
            f"{panel.source}: known covariates ({', '.join(covariate.name for covariate in known)}) are missing "
            f"from {stamp} on{_of(each)}; give {steps} steps of them with --future FILE, or as rows of DATA with an "
            f"empty target{shorter}"
        )


@dataclass(frozen=True)
class CovariateScaler:
    """The covariates a model knows, with their categories and statistics, and the cycles of the calendar it reads."""

    covariates: tuple[Covariate, ...] = ()
    cycles: tuple[Cycle, ...] = ()

    @classmethod
    def fit(cls, panel: Panel, rows: Sequence[tuple[int, int]]) -> CovariateScaler:
        """Statistics over the given half-open rows of all series together, NaN left out.

        A category that does not occur in them is unknown to the model. Static attributes count once per series with
        such rows.
        """
        fitted = []
        for role in ("past", "known", "static"):
            for column, covariate in enumerate(panel.covariates(role)):
                seen = [
                    _of_role(each, role, start, stop)[..., column]
                    for each, (start, stop) in zip(panel.series, rows, strict=True)
                ]
                fitted.append(_fit(covariate, np.concatenate([np.atleast_1d(each) for each in seen])))
        return cls(tuple(fitted))

    def of_role(self, role: Role) -> tuple[Covariate, ...]:
        """The covariates of one role, in the order the model reads them."""
        return tuple(each for each in self.covariates if each.role == role)


def _of_role(series: Series, role: Role, start: int, stop: int) -> Values:
    if role == "static":
        assert series.static is not None
        return series.static if stop > start else np.full_like(series.static, np.nan)
    values = series.past if role == "past" else series.known
    assert values is not None
    return values[start:stop]


def _fit(covariate: Covariate, values: Values) -> Covariate:
    present = values[~np.isnan(values)]
    if covariate.categories is not None:
        used = np.unique(present).astype(np.int64)
        return replace(covariate, categories=tuple(covariate.categories[index] for index in used))
    if not len(present):
        return covariate
    loc, scale = float(present.mean()), float(present.std())
    is_constant = not scale > 1e-12 * max(1e-300, abs(loc))
    return replace(covariate, loc=loc, scale=1.0 if is_constant else scale)


def covariate_options(covariates: Sequence[Covariate]) -> dict[str, Any]:
    """The reader's options for the covariates of a model, read as it knows them."""

    def names(role: Role) -> tuple[str, ...]:
        return tuple(each.name for each in covariates if each.role == role)

    return {
        "past_covariates": names("past"),
        "known_covariates": names("known"),
        "static": names("static"),
        "categorical": tuple(each.name for each in covariates if each.categories is not None),
    }


def unseen_categories(panel: Panel, known: Sequence[Covariate]) -> list[str]:
    """One line for each covariate of the panel with categories that a model does not know."""
    lines = []
    for covariate in known:
        columns = [each.name for each in panel.covariates(covariate.role)]
        if covariate.categories is None or covariate.name not in columns:
            continue
        column = columns.index(covariate.name)
        names = panel.covariates(covariate.role)[column].categories or ()
        parts = [getattr(each, covariate.role)[..., column].ravel() for each in panel.series]
        present = np.unique(np.concatenate(parts))
        used = [names[int(index)] for index in present[~np.isnan(present)]]
        if new := [name for name in used if name not in set(covariate.categories)]:
            listed = ", ".join(shorten(name) for name in new[:5]) + (
                f" and {len(new) - 5} more" if len(new) > 5 else ""
            )
            lines.append(f"covariate {covariate.name!r}: {listed} not seen in training, read as unknown")
    return lines


def check_covariates(panel: Panel, known: Sequence[Covariate]) -> None:
    """Refuses a panel without the covariates of a model, or with others of another kind.

    Raises:
        DataError: one is missing, or holds text for numbers or numbers for text.
    """
    for covariate in known:
        found = next((each for each in panel.covariates(covariate.role) if each.name == covariate.name), None)
        if found is None:
            raise DataError(
                f"{panel.source}: the model reads covariate {covariate.name!r} ({covariate.role}), which the data "
                "lack; add the column"
            )
        if covariate.categories is not None and found.categories is None:
            raise DataError(
                f"{panel.source}: covariate {covariate.name!r} held categories when the model was trained, and was "
                "read as numbers now; name it as categorical"
            )
        if covariate.categories is None and found.categories is not None:
            raise DataError(
                f"{panel.source}: covariate {covariate.name!r} held numbers when the model was trained, and holds "
                f"{shorten(found.categories[0])} now; mend the column"
            )
