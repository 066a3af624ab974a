"""Published results to stand beside ours: facts kept as data in ``configs/published/long_horizon.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml

Errors = tuple[float, float]
"""MSE and MAE."""


@dataclass(frozen=True)
class Published:
    """One model's figures as its source prints them."""

    name: str
    track: str
    look_back: int | None
    """None where it is searched, or not stated."""
    test_windows: Literal["all", "dropped", "unknown"]
    """Whether the loader behind the figures scores every test window, or drops the last incomplete batch."""
    source: str
    note: str
    average: dict[str, Errors]
    """Per data set, over its four horizons."""
    horizons: dict[str, dict[int, Errors]]

    @property
    def label(self) -> str:
        """The name, marked where figures are not known to be of all windows."""
        return self.name if self.test_windows == "all" else f"{self.name}*"


@dataclass(frozen=True)
class Best:
    """The lowest figures of one horizon among sources that score all windows, each with whose it is."""

    mse: float
    mse_by: str
    mae: float
    mae_by: str


@cache
def published() -> tuple[Published, ...]:
    """All of them, in the order of the file."""
    return tuple(
        Published(
            name=each["name"],
            track=each["track"],
            look_back=each["look_back"],
            test_windows=each["test_windows"],
            source=each["source"],
            note=each["note"],
            average={name: _errors(pair) for name, pair in each["average"].items()},
            horizons={
                name: {horizon: _errors(pair) for horizon, pair in pairs.items()}
                for name, pairs in each["horizons"].items()
            },
        )
        for each in _content()["sources"]
    )


def best_published(track: str, dataset: str, horizon: int) -> Best | None:
    """The lowest figures of a horizon; None where none are known."""
    found = _content()["best"][track].get(dataset, {}).get(horizon)
    return None if found is None else Best(*found)


def best_average(track: str, dataset: str) -> Published | None:
    """Whose average MSE is the lowest on a data set among those that score all windows."""
    known = [each for each in published() if each.track == track and each.test_windows == "all"]
    return min(
        (each for each in known if dataset in each.average), key=lambda each: each.average[dataset], default=None
    )


def _errors(pair: list[float]) -> Errors:
    mse, mae = pair
    return mse, mae


@cache
def _content() -> dict[str, dict]:  # type: ignore[type-arg]
    text = (files("trellis_ts.configs") / "published" / "long_horizon.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)  # type: ignore[no-any-return]
