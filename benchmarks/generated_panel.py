"""A panel of daily sales whose series are named by three columns, drawn from a fixed seed.

    python benchmarks/generated_panel.py panel.csv.gz          # or .parquet

One row per region, store, product and day: ``units`` sold (whole numbers, empty where nobody wrote them down) and
``promotion`` (1 while the product is promoted in the region, decided weeks ahead: a known covariate). Made to hold what
real panels hold: levels over four orders of magnitude, products that sell once a fortnight, weekly and yearly seasons
that regions and products share in part, shocks that meet a whole store, trends that bend, levels that jump, series that
start late, gaps. The seed and everything else here were fixed before any model was trained on it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SEED = 2512
KEYS = ("region", "store", "product")
REGIONS, STORES_PER_REGION, PRODUCTS = ("north", "east", "south", "west", "isles"), 4, 18
# Share of the products that a store carries.
ASSORTMENT = 0.85
FIRST_DAY, DAYS = np.datetime64("2021-01-01"), 1095

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """What all series of a product share."""

    level: float
    """Units a day in an average store, on the scale of logarithms."""
    weekly: Floats
    """``[7]``, logarithms, from Monday."""
    yearly: Floats
    """``[4]``: sine and cosine of one and of two cycles a year."""
    lift: float
    """What a promotion adds to the logarithm."""
    is_steady: bool
    """Whether its noise is little more than that of counts."""


def generate(seed: int = SEED) -> pd.DataFrame:
    """The panel as a frame: region, store, product, date, units, promotion; the same seed gives the same values."""
    rng = np.random.default_rng(seed)
    day = np.arange(DAYS)
    dates = FIRST_DAY + day
    weekday = (dates.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    products = [_product(rng, index) for index in range(PRODUCTS)]
    pieces = []
    for region in REGIONS:
        promoted = [_promotions(rng) for _ in products]
        regional = {"level": rng.normal(0, 0.4), "weekly": _centred(rng.normal(0, 0.1, 7)), "phase": rng.normal(0, 12)}
        for number in range(1, STORES_PER_REGION + 1):
            size, shocks = rng.normal(0, 0.6), _shocks(rng)
            for index, product in enumerate(products):
                own = np.random.default_rng([seed, REGIONS.index(region), number, index])
                if own.random() > ASSORTMENT:
                    continue
                log_rate = (
                    product.level
                    + regional["level"]
                    + size
                    + own.normal(0, 0.3)
                    + (product.weekly + regional["weekly"])[weekday]
                    + _yearly(day + regional["phase"], product.yearly)
                    + product.lift * promoted[index]
                    + shocks
                    + _trend(own)
                    + _shifts(own)
                )
                units = _counts(own, log_rate, spread=0.05 if product.is_steady else 0.4)
                start = _start(own)
                frame = pd.DataFrame(
                    {
                        "region": region,
                        "store": f"{region}-{number}",
                        "product": f"p{index + 1:02d}",
                        "date": dates,
                        "units": np.where(_is_missing(own), np.nan, units),
                        "promotion": promoted[index].astype(np.int64),
                    }
                )
                pieces.append(frame.iloc[start:])
    return pd.concat(pieces, ignore_index=True)


def _product(rng: np.random.Generator, index: int) -> Product:
    """Every third product sells rarely: from once in two weeks to once a day."""
    is_rare = index % 3 == 2
    return Product(
        level=rng.uniform(np.log(0.07), np.log(1.0)) if is_rare else rng.uniform(np.log(4), np.log(300)),
        weekly=_centred(rng.normal(0, 0.25, 7)),
        yearly=rng.normal(0, [0.3, 0.3, 0.12, 0.12]),
        lift=rng.uniform(0.1, 1.0),
        is_steady=bool(rng.random() < 0.5),
    )


def _centred(values: Floats) -> Floats:
    return values - values.mean()


def _yearly(day: Floats, weights: Floats) -> Floats:
    angle = 2 * np.pi * day / 365.25
    return np.stack([np.sin(angle), np.cos(angle), np.sin(2 * angle), np.cos(2 * angle)], axis=-1) @ weights


def _promotions(rng: np.random.Generator) -> NDArray[np.bool_]:
    """Campaigns of four to twelve days, some eight a year."""
    promoted = np.zeros(DAYS, dtype=bool)
    at = int(rng.integers(0, 60))
    while at < DAYS:
        stop = at + int(rng.integers(4, 13))
        promoted[at:stop] = True
        at = stop + int(rng.integers(15, 60))
    return promoted


def _shocks(rng: np.random.Generator) -> Floats:
    """What meets all products of a store: an autoregression of first order."""
    steps, shocks, last = rng.normal(0, 0.05, DAYS), np.zeros(DAYS), 0.0
    for day in range(DAYS):
        last = 0.8 * last + steps[day]
        shocks[day] = last
    return shocks


def _trend(rng: np.random.Generator) -> Floats:
    """Straight in the logarithm, with one bend."""
    slopes, bend = rng.normal(0, 0.25, 2) / 365, rng.integers(200, DAYS - 100)
    day = np.arange(DAYS)
    return slopes[0] * np.minimum(day, bend) + slopes[1] * np.maximum(0, day - bend)


def _shifts(rng: np.random.Generator) -> Floats:
    """In a third of the series the level jumps once or twice."""
    shifts = np.zeros(DAYS)
    if rng.random() < 1 / 3:
        for _ in range(int(rng.integers(1, 3))):
            shifts[int(rng.integers(0, DAYS)) :] += rng.choice([-1, 1]) * rng.uniform(0.3, 0.9)
    return shifts


def _counts(rng: np.random.Generator, log_rate: Floats, spread: float) -> Floats:
    """Negative binomial counts: ``spread`` is the variance of the rate, relative to its square."""
    rate = np.exp(log_rate) * rng.gamma(1 / spread, spread, len(log_rate))
    return rng.poisson(rate).astype(np.float64)


def _start(rng: np.random.Generator) -> int:
    """Two in five series start late, the last of them with some eight months of rows."""
    return int(rng.integers(0, DAYS - 240)) if rng.random() < 0.4 else 0


def _is_missing(rng: np.random.Generator) -> NDArray[np.bool_]:
    """One day in a hundred, and in a fifth of the series a gap of one to four weeks."""
    missing = rng.random(DAYS) < 0.01
    if rng.random() < 0.2:
        start = int(rng.integers(0, DAYS - 28))
        missing[start : start + int(rng.integers(7, 29))] = True
    return missing


def write(path: Path, seed: int = SEED) -> pd.DataFrame:
    """Writes the panel as Parquet or CSV, by the name's ending, and returns it."""
    frame = generate(seed)
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.astype({"units": "Int64"}).to_csv(path, index=False)
    return frame


def main() -> None:
    """The command line: one argument, the file to write."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    panel = write(Path(sys.argv[1]))
    print(
        f"{panel.groupby(list(KEYS)).ngroups} series, {len(panel):,} rows, {panel.units.isna().sum():,} without a value"
    )


if __name__ == "__main__":
    main()
