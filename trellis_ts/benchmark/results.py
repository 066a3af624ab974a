"""Results as entries of a table: seeds summarised, look-backs chosen on validation."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trellis_ts.benchmark.plan import FIXED_LOOK_BACK
from trellis_ts.benchmark.runner import read_result
from trellis_ts.datasets.long_horizon import benchmark_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and, from two seeds on, their standard deviation."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Entry:
    """One model on one data set: all horizons, at one look-back, over the seeds there are."""

    dataset: str
    contestant: str
    """With its variant, where it has one."""
    look_back: int
    prefix_of: int | None
    """The horizon whose forecast's beginning serves the others; None where each has a model of its own."""
    seeds: tuple[int, ...]
    validation_loss: float
    """Mean over seeds and, where there are several, over models."""
    windows: dict[int, int]
    mse: dict[int, Spread]
    mae: dict[int, Spread]
    mse_average: Spread
    mae_average: Spread
    runs: tuple[dict[str, Any], ...]

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.contestant}, {'one model each' if self.prefix_of is None else f'prefix of {self.prefix_of}'}"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder, in the order of their names.

    Raises:
        ConfigError: a JSON file there is none.
    """
    return [read_result(path) for path in sorted(folder.glob("*.json"))]


def name_of(result: dict[str, Any]) -> str:
    """The contestant with its variant."""
    variant = f" ({result['variant']})" if result["variant"] else ""
    return f"{result['contestant']}{variant}"


def entries_of(results: Iterable[dict[str, Any]]) -> list[Entry]:
    """Every data set, contestant and look-back with all its horizons, benchmarks first and in their order.

    The model of the longest horizon serves twice: with its prefixes, and as the longest of the single models.
    """
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["dataset"], name_of(result), result["look_back"]].append(result)
    entries = []
    for (dataset, contestant, look_back), runs in groups.items():
        longest = max(run["horizon"] for run in runs)
        whole = [run for run in runs if run["horizon"] == longest]
        horizons = sorted(set.intersection(*({int(horizon) for horizon in run["scores"]} for run in whole)))
        entries.append(_entry(dataset, contestant, look_back, horizons, whole, prefix_of=longest))
        seeds = set.intersection(*({run["seed"] for run in runs if run["horizon"] == horizon} for horizon in horizons))
        if seeds and len(horizons) > 1:
            single = [run for run in runs if run["seed"] in seeds and run["horizon"] in horizons]
            entries.append(_entry(dataset, contestant, look_back, horizons, single, prefix_of=None))
    names = benchmark_names()
    rank = {name: index for index, name in enumerate(names)}
    return sorted(
        entries,
        key=lambda each: (
            rank.get(each.dataset, len(rank)),
            each.dataset,
            each.contestant,
            each.prefix_of is None,
            each.look_back,
        ),
    )


def _entry(
    dataset: str,
    contestant: str,
    look_back: int,
    horizons: list[int],
    runs: list[dict[str, Any]],
    *,
    prefix_of: int | None,
) -> Entry:
    seeds = sorted({run["seed"] for run in runs})
    # The run that scores a horizon for a seed: the one model there is, or the one trained for it.
    scores = {
        (run["seed"], horizon): run["scores"][str(horizon)]
        for run in runs
        for horizon in horizons
        if prefix_of is not None or run["horizon"] == horizon
    }

    def over_seeds(metric: str, horizon: int) -> Spread:
        return Spread.of([scores[seed, horizon][metric] for seed in seeds])

    def average(metric: str) -> Spread:
        return Spread.of([statistics.fmean(scores[seed, each][metric] for each in horizons) for seed in seeds])

    return Entry(
        dataset=dataset,
        contestant=contestant,
        look_back=look_back,
        prefix_of=prefix_of,
        seeds=tuple(seeds),
        validation_loss=statistics.fmean(run["validation_loss"] for run in runs),
        windows={horizon: scores[seeds[0], horizon]["num_windows"] for horizon in horizons},
        mse={horizon: over_seeds("mse", horizon) for horizon in horizons},
        mae={horizon: over_seeds("mae", horizon) for horizon in horizons},
        mse_average=average("mse"),
        mae_average=average("mae"),
        runs=tuple(sorted(runs, key=lambda run: (run["seed"], run["horizon"]))),
    )


def of_track(entries: Sequence[Entry], track: str) -> list[tuple[Entry, tuple[int, ...]]]:
    """The entries of one track, each with the look-backs it was chosen from.

    The free track takes, for each data set and contestant, the look-back with the lowest validation loss among those
    that have the most seeds: every candidate predicts the same validation rows, whatever it reads. One candidate is no
    choice, and gives no entry.
    """
    if track == "96":
        return [(each, (FIXED_LOOK_BACK,)) for each in entries if each.look_back == FIXED_LOOK_BACK]
    groups: dict[tuple[str, str, int | None], list[Entry]] = defaultdict(list)
    for each in entries:
        groups[each.dataset, each.contestant, each.prefix_of].append(each)
    chosen = []
    for group in groups.values():
        most = max(len(each.seeds) for each in group)
        candidates = [each for each in group if len(each.seeds) == most]
        if len(candidates) > 1:
            best = min(candidates, key=lambda each: each.validation_loss)
            chosen.append((best, tuple(each.look_back for each in candidates)))
    return chosen
