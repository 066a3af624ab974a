"""Text to stamps: the layouts of dates that tables have, and the order of day and month.

Patterns rather than a date parser, because a parser guesses per value: it would read 03/04 and 13/04 of one column in
two orders, and could not name the row that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from trellis_ts.datasets.calendar import spell_offset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Stamps = NDArray[np.datetime64]
    Whole = NDArray[np.int64]
    Mask = NDArray[np.bool_]

_CLOCK = (
    r"(?:(?:[Tt]|, ?| +)(?P<h>\d{1,2})(?::?(?P<mi>\d{2})(?::?(?P<s>\d{2})(?:[.,](?P<f>\d{1,9})\d*)?)?)?"
    r" ?(?P<ap>[AaPp]\.?[Mm]\.?)? ?(?P<z>[Zz]|UTC|GMT|[+-]\d{1,2}(?::?\d{2})?)?)?$"
)
_LAYOUTS = (
    r"^(?P<y>\d{4})[-/.](?P<m>\d{1,2})[-/.](?P<d>\d{1,2})" + _CLOCK,
    r"^(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})[-/.](?P<y>\d{4}|\d{2})" + _CLOCK,
    r"^(?P<y>\d{4}) ?[-/Mm] ?(?P<m>\d{1,2})$",
    r"^(?P<m>\d{1,2})[-/](?P<y>\d{4})$",
    r"^(?P<y>\d{4})[- ]?[Qq](?P<q>\d)$",
    r"^[Qq](?P<q>\d)[-/ ]?(?P<y>\d{4})$",
    r"^(?:[A-Za-z]{3,9},? +)?(?P<d>\d{1,2})(?:st|nd|rd|th)?[-/. ]+(?P<mon>[A-Za-z]{3,9})\.?[-/, ]+(?P<y>\d{4}|\d{2})"
    + _CLOCK,
    r"^(?P<mon>[A-Za-z]{3,9})\.?[- ]+(?P<d>\d{1,2}), *(?P<y>\d{4})" + _CLOCK,
    r"^(?P<mon>[A-Za-z]{3,9})\.?[-/, ]*(?P<y>\d{4})$",
    r"^(?P<y>\d{4})[-/ ](?P<mon>[A-Za-z]{3,9})(?:[-/ ](?P<d>\d{1,2}))?$",
    r"^(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})[Tt ](?P<h>\d{2}):?(?P<mi>\d{2})(?::?(?P<s>\d{2}))?(?P<z>Z)?$",
)
# These are plain numbers too, and are dates only in a column that says so.
_NUMBER_LAYOUTS = (
    r"^(?P<y>\d{4})$",
    r"^(?P<y>\d{4})(?P<m>\d{2})$",
    r"^(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})(?:(?P<h>\d{2})(?P<mi>\d{2}))?(?P<s>\d{2})?$",
    r"^(?P<e>\d{10}|\d{13})$",
)
_MONTH_NAMES: tuple[str, ...] = (
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
)
_MONTH_NAMES += ("november", "december")
# datetime64[ns] reaches into 1677 and 2262, but not through them.
_FIRST_YEAR, _LAST_YEAR = 1678, 2261
_SECOND = 10**9


class UnreadableDateError(ValueError):
    """A text that is no date; ``index`` says which, the message why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True, eq=False)
class Dates:
    """Stamps of a column: instants in UTC where ``timezone`` is set.

    ``swapped`` holds the stamps with the month before the day where the values allow both orders.
    """

    stamps: Stamps
    timezone: str | None = None
    swapped: Stamps | None = None
    notes: tuple[str, ...] = ()
    day_first: bool | None = None
    """Whether the day came before the month; None where the layout, or the values, leave no such question or answer."""


def looks_like_dates(texts: Any, numbers_too: bool) -> bool:
    """Whether at least half of some texts are dates; plain numbers count where ``numbers_too``."""
    found = _choose_layout(texts, numbers_too)
    return found is not None and found[1] >= 0.5


def parse_dates(texts: Any, day_first: bool | None) -> Dates:
    """Stamps of a string array without missing values, all in the layout that most of them have.

    Raises:
        UnreadableDateError: a text is no date, or does not fit the layout or the order of the others.
    """
    found = _choose_layout(texts.slice(0, 1000), numbers_too=True)
    if found is None:
        raise UnreadableDateError(0, "is not a date; write dates like 2024-03-31 or 2024-03-31 18:00")
    notes: tuple[str, ...] = ()
    fields, readable = _fields(texts, found[0])
    short_years = pc.extract_regex(texts.slice(0, 1), pattern=found[0])[0].as_py() or {}
    if len(short_years.get("y", "")) == 2:
        notes = ("years of two digits were read as 1969 to 2068",)
    _refuse(~readable, "is not a date like the others in its column; mend it or remove the row")
    swapped = None
    if "e" in fields:
        return Dates(_epoch(fields["e"]), "UTC", None, ("times were read as seconds or milliseconds since 1970, UTC",))
    if "a" in fields:
        fields, other, day_first = _order(fields, day_first)
        swapped = None if other is None else _nanoseconds(other)[0]
    else:
        day_first = None
    stamps, valid = _nanoseconds(fields)
    outside = (fields["y"] < _FIRST_YEAR) | (fields["y"] > _LAST_YEAR)
    _refuse(outside, f"is outside the years {_FIRST_YEAR} to {_LAST_YEAR}; remove the row")
    _refuse(~valid, "is not a date: no such day or time; mend it or remove the row")
    offsets, aware = _offsets(texts, fields)
    _refuse(aware != aware[0], "has a UTC offset and others have none, or the reverse; give all of them one")
    timezone = None
    if aware[0]:
        distinct = np.unique(offsets)
        timezone = "UTC" if len(distinct) > 1 or distinct[0] == 0 else spell_offset(int(distinct[0]))
        if len(distinct) > 1:
            notes += ("stamps with different UTC offsets were converted to UTC",)
    shift = (offsets * _SECOND).astype("timedelta64[ns]")
    return Dates(stamps - shift, timezone, None if swapped is None else swapped - shift, notes, day_first)


def _choose_layout(texts: Any, numbers_too: bool) -> tuple[str, float] | None:
    """The layout most of the texts have, and their share."""
    best: tuple[str, float] | None = None
    if not numbers_too and pc.all(pc.match_substring_regex(texts, r"^-?\d+(?:\.\d+)?$")).as_py():
        return None  # most columns of most tables: not worth a dozen patterns each
    for pattern in _LAYOUTS + (_NUMBER_LAYOUTS if numbers_too else ()):
        if not pc.any(pc.match_substring_regex(texts, pattern)).as_py():
            continue
        fields, readable = _fields(texts, pattern)
        if "a" in fields:
            readable &= _valid_day(fields, "a", "b") | _valid_day(fields, "b", "a")
        elif "y" in fields:
            readable &= _nanoseconds(fields)[1] & (fields["y"] >= 1000) & (fields["y"] < 2500)
        share = float(readable.mean()) if len(texts) else 0.0
        if share > (best[1] if best else 0.0):
            best = (pattern, share)
        if share == 1.0:
            break  # no other layout can fit better
    return best


def _fields(texts: Any, pattern: str) -> tuple[dict[str, Any], Mask]:
    """The numbers in each text by name, and whether the text has the layout at all."""
    parts = pc.extract_regex(texts, pattern=pattern)
    readable = pc.is_valid(parts).to_numpy(zero_copy_only=False)
    fields: dict[str, Any] = {}
    for name in (field.name for field in parts.type):
        part = pc.struct_field(parts, name)
        if name in ("ap", "z"):
            fields[name] = part.fill_null("")
        elif name == "mon":
            fields["m"], known = _months(part.fill_null(""))
            readable &= known
        else:
            if name == "y":
                part = _four_digits(part)
            if name == "f":
                part = pc.utf8_rpad(part, 9, "0")
            present = pc.if_else(pc.equal(part, ""), None, part)
            default = 1 if name in ("m", "d") else 0
            fields[name] = pc.fill_null(pc.cast(present, pa.int64()), default).to_numpy(zero_copy_only=False)
    if "q" in fields:
        quarter = fields.pop("q")
        readable &= (quarter >= 1) & (quarter <= 4)
        fields["m"] = np.clip(quarter, 1, 4) * 3 - 2
    return fields, readable


def _four_digits(years: Any) -> Any:
    """Years of two digits as 1969 to 2068."""
    short = pc.equal(pc.utf8_length(years), 2)
    if not pc.any(short).as_py():
        return years
    century = pc.if_else(pc.less(years, "69"), "20", "19")
    return pc.if_else(short, pc.binary_join_element_wise(century, years, ""), years)


def _months(names: Any) -> tuple[Whole, Mask]:
    encoded = names.dictionary_encode()
    numbers = []
    for text in encoded.dictionary.to_pylist():
        # "Sept" is the one usual short form that is longer than three letters.
        number = next((i for i, name in enumerate(_MONTH_NAMES, 1) if text and name.startswith(text.lower())), 0)
        numbers.append(number)
    months = np.array(numbers, dtype=np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]
    return np.maximum(months, 1), months > 0


def _order(fields: dict[str, Any], day_first: bool | None) -> tuple[dict[str, Any], dict[str, Any] | None, bool | None]:
    """The fields with day and month named, in the other order too where every value allows it, and which one it is."""
    orders = {
        True: {**fields, "d": fields["a"], "m": fields["b"]},
        False: {**fields, "d": fields["b"], "m": fields["a"]},
    }
    if day_first is not None:
        day, order = ("a", "b") if day_first else ("b", "a"), "day/month" if day_first else "month/day"
        reason = (
            f"is not a date in the order {order}; leave the order open or give --day-first {str(not day_first).lower()}"
        )
        _refuse(~_valid_day(fields, *day), reason)
        return orders[day_first], None, day_first
    fits = {True: _valid_day(fields, "a", "b"), False: _valid_day(fields, "b", "a")}
    if fits[True].all() and fits[False].all():
        same = bool((fields["a"] == fields["b"]).all())
        return orders[True], None if same else orders[False], None
    likely = bool(fits[True].sum() >= fits[False].sum())
    order = "day/month" if likely else "month/day"
    _refuse(~fits[likely], f"is not a date in the order {order} of the others; mend it or remove the row")
    return orders[likely], None, likely


def _valid_day(fields: dict[str, Any], day: str, month: str) -> Mask:
    valid: Mask = (fields[month] >= 1) & (fields[month] <= 12) & (fields[day] >= 1) & (fields[day] <= 31)
    return valid


def _nanoseconds(fields: dict[str, Any]) -> tuple[Stamps, Mask]:
    """Wall-clock stamps of the fields, and whether each is a day and a time there is."""
    zero = np.zeros_like(fields["y"])
    month, day = fields.get("m", zero + 1), fields.get("d", zero + 1)
    hour, minute, second = (fields.get(name, zero) for name in ("h", "mi", "s"))
    valid = (month >= 1) & (month <= 12) & (day >= 1) & (minute < 60) & (second < 60)
    if "ap" in fields:
        half = pc.utf8_lower(pc.utf8_slice_codeunits(fields["ap"], 0, 1)).to_numpy(zero_copy_only=False)
        twelve = half != ""
        valid &= ~twelve | ((hour >= 1) & (hour <= 12))
        hour = np.where(twelve, hour % 12 + 12 * (half == "p"), hour)
    # 24:00 is midnight at the end of the day.
    valid &= (hour < 24) | ((hour == 24) & (minute == 0) & (second == 0))
    year = np.clip(fields["y"], _FIRST_YEAR, _LAST_YEAR)
    months = (year - 1970) * 12 + np.clip(month, 1, 12) - 1
    first = months.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    valid &= first + day <= (months + 1).astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
    seconds = ((first + np.clip(day, 1, 31) - 1) * 24 + hour) * 3600 + minute * 60 + second
    return (seconds * _SECOND + fields.get("f", zero)).astype("datetime64[ns]"), valid


def _epoch(numbers: Whole) -> Stamps:
    return np.where(numbers >= 10**12, numbers * 10**6, numbers * _SECOND).astype("datetime64[ns]")


def _offsets(texts: Any, fields: dict[str, Any]) -> tuple[Whole, Mask]:
    """UTC offset of each stamp in seconds, and whether it has one."""
    if "z" not in fields:
        return np.zeros(len(texts), dtype=np.int64), np.zeros(len(texts), dtype=bool)
    encoded = fields["z"].dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    spellings = encoded.dictionary.to_pylist()
    return np.array([_offset(text) for text in spellings])[codes], np.array([text != "" for text in spellings])[codes]


def _offset(text: str) -> int:
    if text[:1] not in ("+", "-"):
        return 0
    digits = text[1:].replace(":", "")
    hours, minutes = (digits[:-2], digits[-2:]) if len(digits) > 2 else (digits, "0")
    return (int(hours) * 3600 + int(minutes) * 60) * (-1 if text[0] == "-" else 1)


def _refuse(bad: Mask, reason: str) -> None:
    if bad.any():
        raise UnreadableDateError(int(np.argmax(bad)), reason)
