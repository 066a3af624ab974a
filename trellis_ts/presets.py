"""Settings chosen from the data: how large a model, how fast it learns, and for how long.

A preset says how much effort a model is worth; facts about the data say what can be learnt from them. Whatever is
named by the user stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trellis_ts.config import LARGEST_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trellis_ts.config import Preset, Transform

PRESET_SETTINGS = (
    "num_layers",
    "width",
    "num_heads",
    "num_slots",
    "feedforward_width",
    "dropout",
    "learning_rate",
    "batch_size",
    "max_epochs",
    "patience",
    "max_time",
    "windows_per_epoch",
    "validation_windows",
    "initial_skip",
    "average_steps",
    "transform",
)
"""What ``choose_settings`` chooses where it is not named; lengths are ``trellis_ts.sizing``'s."""


@dataclass(frozen=True)
class DataFacts:
    """What the choice rests on; rows and windows are those of training."""

    num_series: int
    num_channels: int
    num_values: int
    """Observed numbers over all series and channels."""
    num_windows: int
    """Windows at stride 1; a window holds all channels."""
    prediction_length: int
    is_linear_possible: bool = True
    """Whether the model has a linear skip that can be solved for."""
    transform: Transform = "none"
    """The one through which a linear forecast errs least (``trellis_ts.linear_start``)."""

    @property
    def num_examples(self) -> int:
        """Channels of windows: what the weights, shared by the channels, see."""
        return self.num_windows * self.num_channels

    @property
    def num_independent(self) -> float:
        """Horizons that fit side by side into the observed values: about how many examples say something new."""
        return self.num_values / self.prediction_length


class _Size(NamedTuple):
    num_layers: int
    width: int
    num_heads: int
    num_slots: int


# Rising; a step up costs two to three times the time of a training step.
_SIZES = (_Size(1, 16, 2, 8), _Size(1, 32, 2, 8), _Size(2, 32, 4, 8), _Size(2, 64, 4, 16), _Size(3, 96, 6, 16))
# A panel with fewer independent examples than this gets the size of the same place.
_EXAMPLES_OF_SIZE = (60, 400, 4_000, math.inf)


class _Effort(NamedTuple):
    """What a preset spends."""

    size_change: int
    """Places up or down among the sizes."""
    most_steps: int
    least_steps: int
    passes: int
    """Over all training windows; with few windows, the steps this makes are raised to ``least_steps``."""
    num_validations: int
    max_time: str


_EFFORTS: dict[str, _Effort] = {
    "fast": _Effort(-1, most_steps=400, least_steps=150, passes=5, num_validations=8, max_time="40s"),
    "balanced": _Effort(0, most_steps=2_000, least_steps=500, passes=20, num_validations=20, max_time="5m"),
    "accurate": _Effort(1, most_steps=8_000, least_steps=1_000, passes=40, num_validations=30, max_time="45m"),
}
# Rows of the network (channels of windows) per step.
_ROWS_PER_STEP, _ROWS_PER_STEP_OF_FEW = 64, 16
# Below this many examples, steps are small, so that a pass over them holds several.
_FEW_EXAMPLES = 500
_LEAST_VALIDATION_WINDOWS, _MOST_VALIDATION_WINDOWS = 256, 2_048


class Choice(NamedTuple):
    """Settings by name, and why they are so, in lines for people."""

    settings: dict[str, Any]
    reasons: tuple[str, ...]


def choose_settings(facts: DataFacts, preset: Preset, named: Mapping[str, Any]) -> Choice:
    """Every setting of ``PRESET_SETTINGS`` that is not named.

    Args:
        facts: about the training rows.
        preset: how much effort.
        named: the values that the user gave.

    Raises:
        ConfigError: named settings do not go together.
    """
    effort = _EFFORTS[preset]
    settings: dict[str, Any] = _choose_size(facts, effort, named)
    settings |= _choose_training(facts, effort, {**settings, **named})
    settings["transform"] = facts.transform
    chosen = {name: value for name, value in settings.items() if named.get(name) is None}
    return Choice(chosen, _explain(facts, preset, chosen, {**chosen, **named}))


def _choose_size(facts: DataFacts, effort: _Effort, named: Mapping[str, Any]) -> dict[str, Any]:
    place = next(place for place, most in enumerate(_EXAMPLES_OF_SIZE) if facts.num_independent < most)
    size = _SIZES[min(max(0, place + effort.size_change), len(_SIZES) - 1)]
    width, num_heads = named.get("width"), named.get("num_heads")
    if width is None:
        # The chosen width, or the next one the named heads divide.
        width = size.width if num_heads is None else num_heads * math.ceil(size.width / num_heads)
    elif num_heads is None:
        num_heads = max(heads for heads in range(1, size.num_heads + 1) if width % heads == 0)
    return {
        "num_layers": size.num_layers,
        "width": width,
        "num_heads": num_heads or size.num_heads,
        "num_slots": size.num_slots,
        "feedforward_width": min(2 * width, LARGEST_SIZE),
        # Few examples are seen again and again.
        "dropout": 0.1 if facts.num_independent < 4_000 else 0.0,
    }


def _choose_training(facts: DataFacts, effort: _Effort, named: Mapping[str, Any]) -> dict[str, Any]:
    rows = _ROWS_PER_STEP if facts.num_examples >= _FEW_EXAMPLES else _ROWS_PER_STEP_OF_FEW
    batch_size = named.get("batch_size") or max(4, min(rows // facts.num_channels, facts.num_windows))
    steps_per_pass = math.ceil(facts.num_windows / batch_size)
    steps = min(effort.most_steps, max(effort.least_steps, effort.passes * steps_per_pass))
    # An epoch is what lies between two validations: all windows, or as many as there is time for.
    windows_per_epoch = named.get("windows_per_epoch") or min(
        facts.num_windows, batch_size * math.ceil(steps / effort.num_validations)
    )
    steps_per_epoch = math.ceil(min(windows_per_epoch, facts.num_windows) / batch_size)
    max_epochs = named.get("max_epochs") or max(1, round(steps / steps_per_epoch))
    return {
        # With a handful of examples the start is nearly all there is to learn; small steps keep it.
        "learning_rate": 3e-4 if facts.num_independent < _EXAMPLES_OF_SIZE[0] else 1e-3,
        "batch_size": batch_size,
        "max_epochs": max_epochs,
        "patience": max(5, max_epochs // 4),
        "max_time": None if named.get("deterministic") else effort.max_time,
        "windows_per_epoch": windows_per_epoch,
        # Looking must not take longer than learning.
        "validation_windows": max(_LEAST_VALIDATION_WINDOWS, min(_MOST_VALIDATION_WINDOWS, windows_per_epoch // 2)),
        "initial_skip": "ridge" if facts.is_linear_possible else "zero",
        "average_steps": max(1, round(0.04 * steps_per_epoch * max_epochs)),
    }


def _explain(
    facts: DataFacts, preset: Preset, chosen: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[str, ...]:
    """One line on the model, one on its training; only what was chosen is claimed."""
    lines = []
    if {"num_layers", "width"} & chosen.keys():
        lines.append(
            f"{preset}: {settings['num_layers']} layer{'s' * (settings['num_layers'] != 1)} of width "
            f"{settings['width']} with {settings['num_heads']} memories of {settings['num_slots']} slots, because "
            f"{facts.num_values:,} training values hold about {round(facts.num_independent):,} horizons side by side"
        )
    if {"max_epochs", "batch_size", "windows_per_epoch"} & chosen.keys():
        drawn = min(settings["windows_per_epoch"], facts.num_windows)
        epochs = f"{settings['max_epochs']} epoch{'s' * (settings['max_epochs'] != 1)}"
        of_all = "all" if drawn == facts.num_windows else f"{drawn:,} of"
        lines.append(
            f"{preset}: at most {epochs} of {of_all} {facts.num_windows:,} windows, "
            f"{settings['batch_size']} per step, learning rate {settings['learning_rate']:g}"
            + (f", at most {settings['max_time']}" if settings["max_time"] else ", however long that takes")
        )
    if chosen.get("transform") == "asinh":
        lines.append("values are read and forecast through asinh: nothing grows so fast that it would be bent")
    return tuple(lines)
