"""What there is to run: the settings of each data set, and the cells that a benchmark consists of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trellis_ts.config import ExperimentConfig
from trellis_ts.datasets.long_horizon import HORIZONS, find_benchmark, suggest
from trellis_ts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FIXED_LOOK_BACK = 96
TRACKS = ("96", "free")
_PARTS = ("settings", "look_back_96", "longer", "look_backs")
_VARIED = {"context_length": "--look-backs", "prediction_length": "--horizons", "seed": "--seeds", "mixer": "--mixer"}
_OWN_TABLE = "table"


@dataclass(frozen=True)
class Cell:
    """One model to be trained and scored; ``key`` names its result."""

    dataset: str
    """A benchmark's name, or the path of a wide table."""
    contestant: str
    """A mixer, or the name of a peer."""
    variant: str
    """What was changed, empty for the data set's own settings."""
    look_back: int
    horizon: int
    """Steps the model is trained to forecast."""
    horizons: tuple[int, ...]
    """Steps it is scored over: prefixes of its horizon."""
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)
    """Those of ``trellis train`` beside lengths, mixer and seed."""

    @property
    def dataset_name(self) -> str:
        """The benchmark's name, or the table's without folder and ending."""
        spec = find_benchmark(self.dataset)
        return spec.name if spec is not None else Path(self.dataset).name.split(".")[0]

    @property
    def key(self) -> str:
        """The name of its result."""
        who = f"{self.contestant}+{self.variant}" if self.variant else self.contestant
        return f"{self.dataset_name.lower()}-{who}-L{self.look_back}-H{self.horizon}-s{self.seed}"

    def config(self) -> ExperimentConfig:
        """The experiment to train.

        Raises:
            ConfigError: a setting is unknown or out of its range.
        """
        return ExperimentConfig.of(
            **self.settings,
            mixer=self.contestant,
            context_length=self.look_back,
            prediction_length=self.horizon,
            seed=self.seed,
        )


@dataclass(frozen=True)
class DatasetPlan:
    """One setting per data set for all horizons; what depends on the look-back is patching and the like."""

    name: str
    horizons: tuple[int, ...]
    settings: dict[str, Any]
    look_back_96: dict[str, Any]
    longer: dict[str, Any]
    look_backs: tuple[int, ...]
    """Candidates of the free track."""

    def at(self, look_back: int) -> dict[str, Any]:
        """The settings at one look-back."""
        return self.settings | (self.look_back_96 if look_back <= FIXED_LOOK_BACK else self.longer)


def plan_for(dataset: str) -> DatasetPlan:
    """The packaged plan of a benchmark, or the general one for the path of a table.

    Raises:
        ConfigError: there is neither a benchmark nor a file of this name.
    """
    spec = find_benchmark(dataset)
    if spec is None and not Path(dataset).is_file():
        nearest = suggest(dataset)
        hint = f"did you mean {nearest}?" if nearest else "see `trellis datasets`, or give the path of a table"
        raise ConfigError(f"--dataset: '{dataset}' is neither a benchmark nor a file; {hint}")
    name = _OWN_TABLE if spec is None else spec.name.lower()
    content = yaml.safe_load((files("trellis_ts.configs") / "benchmarks" / f"{name}.yaml").read_text(encoding="utf-8"))
    if set(content) != set(_PARTS):
        raise AssertionError(f"benchmarks/{name}.yaml needs {_PARTS}, it has {tuple(content)}")
    horizons = HORIZONS if spec is None else spec.horizons
    return DatasetPlan(
        name=name,
        horizons=horizons,
        settings=content["settings"],
        look_back_96=content["look_back_96"] or {},
        longer=content["longer"] or {},
        look_backs=tuple(content["look_backs"]),
    )


def cells_of(
    plan: DatasetPlan,
    dataset: str,
    *,
    contestants: Sequence[str],
    tracks: Sequence[str],
    seeds: Sequence[int],
    horizons: Sequence[int] | None = None,
    look_backs: Sequence[int] | None = None,
    each_horizon: bool = False,
    variant: str = "",
    changes: dict[str, Any] | None = None,
) -> Iterator[Cell]:
    """The cells of one data set, a whole seed before the next.

    Args:
        plan: the data set's settings.
        dataset: its name or path.
        contestants: mixers or peers.
        tracks: of ``TRACKS``; both share the run at look-back 96.
        seeds: of weights and of the order of windows.
        horizons: instead of the benchmark's.
        look_backs: candidates of the free track, instead of the plan's.
        each_horizon: a model for every horizon, instead of one for the longest whose prefixes serve the others.
        variant: a name for ``changes``.
        changes: settings laid over the plan's.
    """
    changes = changes or {}
    for name, option in _VARIED.items():
        if name in changes:
            raise ConfigError(f"--variant cannot set {name}, which the benchmark varies itself; use {option}")
    scored = tuple(sorted(set(horizons or plan.horizons)))
    trained = scored if each_horizon else scored[-1:]
    lengths: list[int] = []
    for track in tracks:
        lengths += [FIXED_LOOK_BACK] if track == "96" else list(look_backs or plan.look_backs)
    for seed in seeds:
        for contestant in contestants:
            for look_back in dict.fromkeys(lengths):
                for horizon in trained:
                    yield Cell(
                        dataset=dataset,
                        contestant=contestant,
                        variant=variant,
                        look_back=look_back,
                        horizon=horizon,
                        horizons=tuple(each for each in sorted({*scored, *plan.horizons}) if each <= horizon),
                        seed=seed,
                        settings=plan.at(look_back) | changes,
                    )


def choose_names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list of known names.

    Raises:
        ConfigError: one is unknown; the message names the nearest.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"{option} is empty; give one or more of {', '.join(known)}, separated by commas")
    for name in names:
        if name not in known:
            near = get_close_matches(name.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{option}: there is no '{name}'; {hint}")
    return list(dict.fromkeys(names))


def choose_numbers(option: str, text: str, *, least: int) -> list[int]:
    """A comma-separated list of whole numbers.

    Raises:
        ConfigError: one is none, or too small.
    """
    numbers = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        if not re.fullmatch(r"\d+", each) or int(each) < least:
            raise ConfigError(f"{option}: expected whole numbers from {least}, separated by commas, got '{each}'")
        numbers.append(int(each))
    if not numbers:
        raise ConfigError(f"{option} is empty; give whole numbers from {least}, separated by commas")
    return list(dict.fromkeys(numbers))
