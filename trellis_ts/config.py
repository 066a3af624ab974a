"""Every setting of an experiment, as frozen dataclasses.

The docstring under an attribute is its help text on the command line, and its name with dashes the option:
``context_length`` is ``--context-length`` and the key ``context_length`` of a configuration file. Names are unique
over the four classes, so files and options stay flat. ``None`` means: chosen from the data (``trellis_ts.sizing``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args

from trellis_ts.errors import ConfigError

Mode = Literal["window", "streaming"]
Transform = Literal["none", "asinh"]
Mixer = Literal["trellis", "attention", "gsa", "linear", "none"]
Activation = Literal["identity", "silu", "ln_silu"]
ReadActivation = Literal["ln_silu", "l2_silu", "softmax"]
Implementation = Literal["auto", "triton", "cpu", "chunked", "reference"]
Loss = Literal["quantile", "mae", "mse", "huber", "normal", "student_t", "negative_binomial"]
Cycle = Literal["minute", "hour", "day", "week", "year"]
Precision = Literal["32", "bf16-mixed", "16-mixed"]
Preset = Literal["fast", "balanced", "accurate"]

# Far above anything useful; they keep a damaged or hostile model file from asking for absurd amounts of memory.
LARGEST_SIZE = 1 << 20
_MOST_COVARIATES = 10_000


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_size(name: str, value: int | None, maximum: int = LARGEST_SIZE) -> None:
    if value is not None:
        _require(1 <= value <= maximum, f"{name}={value} must lie between 1 and {maximum}")


class Closed:
    """Base of the dataclasses that are also written to model files: reading one back refuses unknown keys."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class DataConfig(Closed):
    """Data: which columns mean what, and how rows are held out."""

    time: str | None = None
    """Column with the time stamps."""
    target: tuple[str, ...] | None = None
    """Column or columns to forecast."""
    id: str | None = None
    """Column that names the series, in a long table; several as store,item."""
    past_covariates: tuple[str, ...] = ()
    """Columns that help to forecast and are known up to the last row only."""
    known_covariates: tuple[str, ...] = ()
    """Columns that help to forecast and are known over the horizon too, such as holidays."""
    static: tuple[str, ...] = ()
    """Columns with one value per series, in a long table."""
    categorical: tuple[str, ...] = ()
    """Covariates of numbers to be read as categories; text always is."""
    freq: str | None = None
    """Time between rows as a pandas offset: h, 15min, D, B, W-SUN, MS, ME, QS, ..."""
    day_first: bool | None = None
    """Whether 02/03/2024 is the 2nd of March; needed only where the file does not tell."""
    regularize: bool = False
    """Bring irregular stamps onto a calendar: the mean of the rows in each step, missing where there are none."""
    validation_size: float = 0.1
    """Rows held out to choose the best epoch: a fraction of each series if below 1, else a count."""
    test_size: float = 0.1
    """Rows held out for `trellis evaluate`, at the end of each series: a fraction if below 1, else a count."""

    def __post_init__(self) -> None:
        for name in ("validation_size", "test_size"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, f"{name}={value} must be a number and not negative")
            _require(
                value < 1 or value == int(value), f"{name}={value} is neither a fraction below 1 nor a whole number"
            )
        _require(
            self.validation_size > 0, "validation_size=0 leaves nothing to choose the best epoch by; hold out some rows"
        )
        _require(self.target is None or len(self.target) > 0, "target is empty; name at least one column")


@dataclass(frozen=True)
class WindowConfig(Closed):
    """Windows: how much is read, how much is predicted, and in which pieces."""

    context_length: int | None = None
    """Past steps the model reads."""
    prediction_length: int | None = None
    """Future steps to predict."""
    patch_length: int | None = None
    """Consecutive steps read as one token."""
    patch_stride: int | None = None
    """Steps from one patch to the next."""
    season_length: int | None = None
    """Steps in a season: 24 for hourly data with a daily rhythm."""

    def __post_init__(self) -> None:
        for name in ("context_length", "prediction_length", "patch_length", "patch_stride", "season_length"):
            _require_size(name, getattr(self, name))


@dataclass(frozen=True)
class CovariateShape(Closed):
    """How many covariates of each kind a model reads; a column of categories counts by how many it distinguishes."""

    past_numbers: int = 0
    past_categories: tuple[int, ...] = ()
    known_numbers: int = 0
    known_categories: tuple[int, ...] = ()
    static_numbers: int = 0
    static_categories: tuple[int, ...] = ()
    cycles: tuple[Cycle, ...] = ()
    """Cycles of the calendar that are read as known covariates."""

    def __post_init__(self) -> None:
        for name in ("past_numbers", "known_numbers", "static_numbers"):
            _require(0 <= getattr(self, name) <= _MOST_COVARIATES, f"{name} must lie between 0 and {_MOST_COVARIATES}")
        for name in ("past_categories", "known_categories", "static_categories"):
            sizes = getattr(self, name)
            _require(len(sizes) <= _MOST_COVARIATES, f"{name} has more than {_MOST_COVARIATES} columns")
            for size in sizes:
                _require(0 <= size <= LARGEST_SIZE, f"{name} must lie between 0 and {LARGEST_SIZE}, found {size}")
        _require(len(set(self.cycles)) == len(self.cycles), "a cycle of the calendar is listed twice")

    @property
    def has_past(self) -> bool:
        """Whether anything is read that is known up to the origin only."""
        return self.past_numbers > 0 or len(self.past_categories) > 0

    @property
    def has_known(self) -> bool:
        """Whether anything is read that is known over the horizon, the calendar included."""
        return self.known_numbers > 0 or len(self.known_categories) > 0 or len(self.cycles) > 0

    @property
    def has_static(self) -> bool:
        """Whether the series have attributes."""
        return self.static_numbers > 0 or len(self.static_categories) > 0


@dataclass(frozen=True)
class WindowShape(Closed):
    """The same lengths once all are known, with the number of channels: what a model is built for."""

    context_length: int
    prediction_length: int
    patch_length: int
    patch_stride: int
    season_length: int
    num_channels: int
    covariates: CovariateShape = CovariateShape()

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name != "covariates":
                _require_size(name, getattr(self, name))
        _require(
            self.patch_length <= self.context_length,
            f"patch_length={self.patch_length} exceeds context_length={self.context_length}; shorten the patch",
        )
        _require(
            self.patch_stride <= self.patch_length,
            f"patch_stride={self.patch_stride} exceeds patch_length={self.patch_length} and would skip steps",
        )

    @property
    def num_patches(self) -> int:
        """Tokens per window; the first patch is padded on the left where the lengths do not divide."""
        return -(-(self.context_length - self.patch_length) // self.patch_stride) + 1

    @property
    def lead_patches(self) -> int:
        """Patches that cover a horizon: a streaming model knows after so many what followed."""
        return -(-self.prediction_length // self.patch_length)

    @property
    def history_length(self) -> int:
        """Steps that a streaming model keeps: those before a situation whose outcome has just become known."""
        return self.context_length + self.lead_patches * self.patch_length


@dataclass(frozen=True)
class ModelConfig(Closed):
    """Model: the network between the patches and the forecast."""

    mode: Mode = "window"
    """window reads the last context_length steps anew for every forecast; streaming carries the whole history along in
    a memory of fixed size, and can be followed live with `trellis stream`."""
    mixer: Mixer = "trellis"
    """What carries information from patch to patch: the Trellis memory or, to compare, softmax attention, gated slot
    attention or gated linear attention in its place; none leaves the blocks out altogether."""
    channel_mixing: Literal["none", "trellis"] = "none"
    """Whether channels are forecast together: trellis reads them one after the other, in both directions."""
    num_layers: int = 2
    """Blocks."""
    width: int = 64
    """Features per token."""
    num_heads: int = 4
    """Parallel memories (or attention heads)."""
    num_slots: int = 16
    """Rows of each memory; its size does not depend on the context."""
    write_activation: Activation = "silu"
    """phi in the memory's write; identity gives the gated delta rule."""
    read_activation: ReadActivation = "ln_silu"
    """f between the key pass and the value pass."""
    step_size_form: Literal["bounded", "softplus"] = "bounded"
    """bounded keeps a linear write inside its stability limit; softplus lets it grow."""
    forget_gate: bool = True
    """Let the memory decay by a learned rate; gsa cannot do without."""
    output_activation: Literal["identity", "silu"] = "identity"
    """Applied to what is read from the value memory."""
    initial_memory: Literal["zero", "learned"] = "zero"
    """What the memories hold before the first token."""
    write_epsilon: float = 1e-6
    """Added inside the square root of the write's normalisation; ln_silu from a zero memory wants about 1."""
    chunk_length: int = 1
    """1 is the exact recurrence; more freezes the inner gradient at the start of every chunk of this many tokens."""
    second_order: bool = True
    """Differentiate through the inner gradient step."""
    conv_width: int = 4
    """Tokens seen by the causal convolution on queries and keys of a window model; 1 switches it off."""
    feedforward_width: int = 128
    """Hidden features of the SwiGLU."""
    dropout: float = 0.0
    """Fraction of features dropped while training, after each half block and before the head."""
    pooling: Literal["flatten", "last", "mean"] = "flatten"
    """How the head sees the tokens: all side by side, the last one, or their mean."""
    position_embedding: bool = True
    """Add a learned vector to each patch position."""
    instance_norm: bool = True
    """Remove each context's own mean and standard deviation, and put them back on the forecast."""
    transform: Transform = "none"
    """asinh reads and forecasts the inverse hyperbolic sine of normalised values, so that peaks do not drown the rest;
    for quantiles and medians (loss quantile or mae) only."""
    seasonal_cycle: bool = False
    """Learn one season per channel, taken off the context and added to the forecast."""
    linear_skip: bool = True
    """Add a linear map from the whole context to the whole horizon."""
    calendar_features: bool | None = None
    """Read hour, weekday and day of the year as known covariates, those the data hold at least twice."""
    covariate_width: int = 16
    """Features each step's covariates are read as."""

    def __post_init__(self) -> None:
        sizes = ("width", "num_heads", "num_slots", "chunk_length", "conv_width", "feedforward_width")
        for name in (*sizes, "covariate_width"):
            _require_size(name, getattr(self, name))
        _require_size("num_layers", self.num_layers, maximum=1000)
        _require(
            self.width % self.num_heads == 0,
            f"width={self.width} is not a multiple of num_heads={self.num_heads}; change one of them",
        )
        _require(
            self.forget_gate or self.mixer != "gsa",
            "mixer=gsa writes what its gate forgets, so forget_gate=false would write nothing; choose another mixer",
        )
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)")
        _require(0 < self.write_epsilon < math.inf, f"write_epsilon={self.write_epsilon} must be positive and finite")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads


@dataclass(frozen=True)
class TrainingConfig(Closed):
    """Training: what is minimised, for how long, and on what."""

    loss: Loss = "quantile"
    """What is minimised, and with it what is forecast: quantile gives quantiles; mae, mse and huber points; normal,
    student_t and negative_binomial (for counts) a distribution, by its negative log-likelihood."""
    quantile_levels: tuple[float, ...] = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)
    """Levels learned under the quantile loss, and those that a distribution's forecast shows."""
    learning_rate: float = 1e-3
    """Peak learning rate: warmed up over the first steps, then lowered along a cosine."""
    weight_decay: float = 0.01
    """Decay of the weight matrices (AdamW)."""
    batch_size: int = 64
    """Windows per step."""
    max_epochs: int = 30
    """Passes over the training windows at most."""
    patience: int = 5
    """Epochs without a better validation loss before training stops."""
    max_time: str | None = None
    """Wall-clock limit such as 90s, 2m or 1h; the best model so far is kept."""
    windows_per_epoch: int | None = None
    """Training windows drawn per epoch, at random, when there are more."""
    validation_windows: int | None = None
    """Validation windows looked at, evenly spread, when there are more."""
    segment_length: int | None = None
    """Steps of a series through which a streaming model is trained in one go; gradients stop at their start."""
    stream_length: int | None = None
    """Steps over which a streaming model's state is carried in training, segment by segment."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    initial_skip: Literal["zero", "ridge"] = "zero"
    """What the linear skip starts from: nothing, or a ridge regression around the best of simple forecasts."""
    average_steps: int = 0
    """Keep an exponential average of the weights over about this many steps, and validate that; 0 keeps none."""
    seed: int = 0
    """Seed of the initial weights and of the order of windows."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    precision: Precision = "32"
    """Floating-point precision of training."""
    num_workers: int = 0
    """Processes that prepare batches; 0 prepares them in the main one, which is fastest for data in memory."""
    implementation: Implementation = "auto"
    """How the memory is computed; every choice gives the same numbers."""
    deterministic: bool = False
    """Choose operations that repeat their bits, and let no clock decide anything: no max_time, and epochs as long on
    any machine."""
    devices: int = 1
    """Devices (on a CPU: processes) that share every batch."""
    num_nodes: int = 1
    """Machines, each with that many devices, as torchrun or SLURM start them."""
    detect_anomaly: bool = False
    """Look for the layer in which numbers first stop being finite, and end there; slower."""

    def __post_init__(self) -> None:
        sizes = ("batch_size", "max_epochs", "patience", "windows_per_epoch", "validation_windows")
        for name in (*sizes, "devices", "num_nodes"):
            _require_size(name, getattr(self, name))
        _require(
            self.num_processes <= self.batch_size,
            f"batch_size={self.batch_size} is too small to be shared by {self.num_processes} devices",
        )
        _require(
            not (self.deterministic and self.max_time),
            f"deterministic=true lets no clock decide, so max_time={self.max_time} cannot be kept; set max_epochs",
        )
        for name in ("segment_length", "stream_length"):
            _require_size(name, getattr(self, name))
        _require(
            0 <= self.average_steps <= LARGEST_SIZE,
            f"average_steps={self.average_steps} must be 0 or a number of steps",
        )
        levels = self.quantile_levels
        _require(len(levels) > 0, "quantile_levels is empty; give at least one level, such as 0.5")
        _require(
            all(0 < level < 1 for level in levels) and list(levels) == sorted(set(levels)),
            f"quantile_levels={list(levels)} must rise strictly and lie between 0 and 1",
        )
        _require(0 < self.learning_rate < math.inf, f"learning_rate={self.learning_rate} must be positive and finite")
        _require(0 <= self.weight_decay < math.inf, f"weight_decay={self.weight_decay} must be finite and not negative")
        _require(self.gradient_clip > 0, f"gradient_clip={self.gradient_clip} must be positive")
        _require(self.num_workers >= 0, f"num_workers={self.num_workers} must not be negative")
        _require(0 <= self.seed < 1 << 32, f"seed={self.seed} must lie between 0 and 4294967295")
        self.max_time_seconds  # noqa: B018  # raises if the text cannot be read

    @property
    def num_processes(self) -> int:
        """How many processes train together."""
        return self.devices * self.num_nodes

    @property
    def max_time_seconds(self) -> float | None:
        """``max_time`` in seconds; None without a limit."""
        if self.max_time is None:
            return None
        units = {"s": 1.0, "m": 60.0, "h": 3600.0}
        text = self.max_time.strip().lower()
        try:
            seconds = float(text[:-1]) * units[text[-1:]]
        except (ValueError, KeyError):
            raise ConfigError(f"max_time='{self.max_time}' is not a duration; write 90s, 2m or 1.5h") from None
        _require(0 < seconds < math.inf, f"max_time='{self.max_time}' must be positive and finite")
        return seconds


@dataclass(frozen=True)
class ExperimentConfig(Closed):
    """All settings of one run of ``trellis train``."""

    data: DataConfig = field(default_factory=DataConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    preset: Preset | None = None
    """What chooses the settings that are not named (``trellis_ts.presets``); None leaves them at their defaults."""
    named: tuple[str, ...] = field(default=(), compare=False)
    """Settings that a preset leaves as they are."""

    @classmethod
    def of(cls, **settings: Any) -> ExperimentConfig:
        """A configuration from settings by their names, whichever section they belong to; the rest stays as it is.

        A single name will do where a setting takes several, and a list is as good as a tuple. What is given here, and
        is not None, counts as named; ``preset`` may be given as well.

        Raises:
            ConfigError: a name is none of the settings', or a value is out of its range.
        """
        preset = checked_preset(settings.pop("preset", None))
        chosen: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for name, value in settings.items():
            if name not in HOMES:
                near = get_close_matches(name, HOMES, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; they are those of `trellis train --help`"
                raise ConfigError(f"there is no setting {name}{hint}")
            section = HOMES[name]
            if isinstance(value, str) and "tuple" in str(SECTIONS[section].__annotations__[name]):
                value = (value,)
            chosen[section][name] = tuple(value) if isinstance(value, list) else value
        named = tuple(sorted(name for name, value in settings.items() if value is not None))
        return cls(**{name: section(**chosen[name]) for name, section in SECTIONS.items()}, preset=preset, named=named)

    def replace_settings(self, **settings: Any) -> ExperimentConfig:
        """The same with other values of some settings, whichever section they belong to."""
        sections = {
            name: replace(getattr(self, name), **{each.name: settings[each.name] for each in own})
            for name, section in SECTIONS.items()
            if (own := [each for each in fields(section) if each.name in settings])
        }
        return replace(self, **sections)


def checked_preset(name: str | None) -> Preset | None:
    """The preset of this name.

    Raises:
        ConfigError: there is none.
    """
    presets: tuple[Preset, ...] = get_args(Preset)
    for preset in presets:
        if name == preset:
            return preset
    if name is None:
        return None
    near = get_close_matches(str(name).lower(), presets, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets)}"
    raise ConfigError(f"there is no preset '{name}'; {hint}")


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "window": WindowConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
}

HOMES = {each.name: name for name, section in SECTIONS.items() for each in fields(section)}
"""The section each setting belongs to."""
