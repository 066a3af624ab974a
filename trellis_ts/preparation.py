"""Everything decided before the first step: splits, lengths, windows, and the settings a preset chooses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from trellis_ts.causal import check_streaming
from trellis_ts.config import HOMES
from trellis_ts.datasets import calendar
from trellis_ts.datasets.long_horizon import borders as published_borders
from trellis_ts.datasets.long_horizon import find_benchmark
from trellis_ts.datasets.seasons import find_seasons
from trellis_ts.datasets.splits import Splits
from trellis_ts.datasets.streams import SegmentDataset, SegmentShape
from trellis_ts.datasets.windows import ScaledPanel, WindowDataset
from trellis_ts.errors import ConfigError, DataError
from trellis_ts.linear_start import choose_transform
from trellis_ts.presets import DataFacts, choose_settings
from trellis_ts.scaling import LEAST_OBSERVED
from trellis_ts.sizing import choose_cycles, choose_prediction_length, choose_shape, covariate_shape, explain_seasons

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trellis_ts.checkpoints import Checkpoint, SeriesRecord
    from trellis_ts.config import ExperimentConfig, TrainingConfig, WindowShape
    from trellis_ts.types import Borders, Panel

# Without a preset, a panel of a user's own is sampled to epochs of at most this many windows.
_CHOSEN_WINDOWS_PER_EPOCH = 16_384
_CHOSEN_VALIDATION_WINDOWS = 2_048
# A streaming model is trained through so many patches at a time, and so many segments in a row.
_CHOSEN_SEGMENT_PATCHES = 64
_CHOSEN_STREAM_SEGMENTS = 8
_STREAMING_HEAD_DIM = 32


@dataclass(frozen=True, eq=False)
class Preparation:
    """Everything decided before the first step."""

    splits: Splits
    shape: WindowShape
    config: ExperimentConfig
    train: WindowDataset
    validation: WindowDataset
    left_out_series: int
    seasons: tuple[int, ...]
    """Found in the data where a preset looked for them, else the season chosen."""
    segments: tuple[SegmentDataset, SegmentDataset] | None = None
    """What a streaming model is trained and validated on, in the place of windows."""
    known: tuple[SeriesRecord, ...] = ()
    """What a model that was started from knew of series that are not in the panel."""
    reasons: tuple[str, ...] = ()
    """Why a preset chose what it chose, in lines for people."""


def make_splits(panel: Panel, config: ExperimentConfig, prediction_length: int) -> Splits:
    """A benchmark's published borders, else the end of every series held out."""
    if panel.dataset is not None and (spec := find_benchmark(panel.dataset)) is not None:
        return Splits.fixed(panel, published_borders(spec, len(panel.series[0])))
    return Splits.chronological(
        panel,
        validation_size=config.data.validation_size,
        test_size=config.data.test_size,
        prediction_length=prediction_length,
    )


def prepare(
    panel: Panel,
    config: ExperimentConfig,
    *,
    borders: Sequence[Borders] | None = None,
    start: Checkpoint | None = None,
) -> Preparation:
    """Splits, sizes and windows, with the choices filled into the configuration.

    Args:
        panel: the series.
        config: the settings.
        borders: rows of each series' splits; as the configuration says unless given.
        start: a model to begin with, whose settings the configuration already has (``trellis_ts.warm_start``):
            lengths, covariates and the calendar are the model's, and so are the scales of the series it knows.

    Raises:
        ConfigError: lengths that do not fit the data.
        DataError: too little data.
    """
    if borders is None:
        splits = make_splits(panel, config, choose_prediction_length(panel, config.window))
    else:
        splits = Splits.of(panel, borders)
    if config.training.loss == "negative_binomial":
        _check_counts(splits)
    train_ranges = [each.train for each in splits.borders]
    train_rows = max(stop - start for start, stop in train_ranges)
    seasons = None if config.preset is None or panel.dataset is not None else find_seasons(panel, train_ranges)
    if start is None:
        shape = choose_shape(panel, config.window, train_rows=train_rows, seasons=seasons)
        cycles = choose_cycles(panel, config.model.calendar_features, train_ranges)
        covariates = replace(splits.scaler.covariates, cycles=cycles)
        shape = replace(shape, covariates=covariate_shape(covariates))
        splits = replace(splits, scaler=replace(splits.scaler, covariates=covariates))
    else:
        shape = start.model.shape
        splits = replace(splits, scaler=start.scaler().of(panel, train_ranges))
    if config.model.channel_mixing != "none" and shape.num_channels == 1:
        raise ConfigError(
            f"channel_mixing={config.model.channel_mixing} needs two columns or more to forecast, and {panel.source} "
            "has one; leave it out, or give a wide table"
        )
    scaled = ScaledPanel(panel, splits.scaler, shape.season_length)

    train = windows_of(scaled, splits, shape, "train")
    config, reasons = _choose(config, panel, shape, train, train_ranges, seasons)
    if config.training.initial_skip == "ridge" and not _has_solvable_skip(config):
        raise ConfigError("initial_skip=ridge needs linear_skip, instance_norm and mode=window; leave it out")
    if config.model.transform == "asinh" and not _may_transform(config):
        raise ConfigError(
            f"transform=asinh does not go with mode={config.model.mode}, loss={config.training.loss}: it is for "
            "windows and the losses quantile and mae; leave it out"
        )
    segments = None
    if config.model.mode == "streaming":
        if start is None:
            config = _wide_heads(config)
        check_streaming(config.model, shape)
        if (number := config.training.num_processes) > 1:
            raise ConfigError(f"devices={number} does not go with mode=streaming: one process trains such a model")
        segments = _segments(scaled, splits, shape, config.training)
    validation = windows_of(scaled, splits, shape, "validation", config.training.validation_windows)
    for name, dataset in (("train", train), ("validation", validation)):
        if len(dataset) == 0:
            raise DataError(
                f"{panel.source}: split '{name}' holds no window of {shape.patch_length} + {shape.prediction_length} "
                "rows; lower --prediction-length or bring more rows"
            )
    needed = shape.patch_length + shape.prediction_length
    return Preparation(
        splits=splits,
        shape=shape,
        config=config,
        train=train,
        validation=validation,
        left_out_series=sum(stop - start < needed for start, stop in train_ranges),
        seasons=tuple(seasons or (shape.season_length,)),
        segments=segments,
        known=() if start is None else _not_in(panel, start),
        reasons=reasons,
    )


def _segments(
    scaled: ScaledPanel, splits: Splits, shape: WindowShape, training: TrainingConfig
) -> tuple[SegmentDataset, SegmentDataset]:
    """Training and validation rows as segments; a step of training makes about ``batch_size`` forecasts per channel."""
    patch = shape.patch_length
    num_tokens = max(1, round((training.segment_length or _CHOSEN_SEGMENT_PATCHES * patch) / patch))
    steps = num_tokens * patch
    lengths = SegmentShape(shape.history_length, shape.prediction_length, patch, num_tokens)
    stream_segments = max(1, round((training.stream_length or _CHOSEN_STREAM_SEGMENTS * steps) / steps))

    def segments(split: Literal["train", "validation"], max_forecasts: int | None, streams: int) -> SegmentDataset:
        return SegmentDataset(
            scaled,
            [each.of(split) for each in splits.borders],
            lengths,
            stream_segments=stream_segments,
            batch_streams=streams,
            max_forecasts=max_forecasts,
        )

    if max(each.train[1] - each.train[0] for each in splits.borders) < LEAST_OBSERVED + shape.prediction_length:
        raise DataError(
            f"a streaming model needs {LEAST_OBSERVED} rows before a horizon of {shape.prediction_length} to train on, "
            "and no series has as many; lower --prediction-length, or bring more rows"
        )
    streams = max(1, round(training.batch_size / num_tokens))
    return segments("train", training.windows_per_epoch, streams), segments("validation", None, 4 * streams)


def _wide_heads(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with heads that suit a streaming model, unless they are named: a head keeps as many answers
    apart as its keys have features, so a few wide ones remember more than many narrow ones."""
    if "num_heads" in config.named:
        return config
    width = config.model.width
    heads = next(each for each in range(max(1, width // _STREAMING_HEAD_DIM), 0, -1) if width % each == 0)
    return config.replace_settings(num_heads=heads)


def _not_in(panel: Panel, start: Checkpoint) -> tuple[SeriesRecord, ...]:
    names = {each.name for each in panel.series}
    return tuple(each for each in start.data.series if each.name not in names)


def windows_of(
    scaled: ScaledPanel,
    splits: Splits,
    shape: WindowShape,
    split: Literal["train", "validation"],
    max_windows: int | None = None,
) -> WindowDataset:
    """The windows of a split, all of them or so many, evenly spread."""
    return WindowDataset(
        scaled,
        [each.of(split) for each in splits.borders],
        context_length=shape.context_length,
        prediction_length=shape.prediction_length,
        min_context=shape.patch_length,
        max_windows=max_windows,
    )


def _has_solvable_skip(config: ExperimentConfig) -> bool:
    """Whether the model has a linear skip from instance-normalised contexts."""
    return config.model.mode == "window" and config.model.linear_skip and config.model.instance_norm


def _may_transform(config: ExperimentConfig) -> bool:
    """Whether the model forecasts quantiles or medians, which pass through a transform and back, of windows."""
    return config.model.mode == "window" and config.training.loss in ("quantile", "mae")


def _choose(
    config: ExperimentConfig,
    panel: Panel,
    shape: WindowShape,
    train: WindowDataset,
    ranges: Sequence[tuple[int, int]],
    seasons: Mapping[int, float] | None,
) -> tuple[ExperimentConfig, tuple[str, ...]]:
    """The configuration with what a preset chooses filled in, and why."""
    training = config.training
    if config.preset is None:
        if panel.dataset is not None:
            return config, ()
        return config.replace_settings(
            windows_per_epoch=training.windows_per_epoch or _CHOSEN_WINDOWS_PER_EPOCH,
            validation_windows=training.validation_windows or _CHOSEN_VALIDATION_WINDOWS,
        ), ()
    is_linear = _has_solvable_skip(config)
    is_chosen = is_linear and _may_transform(config) and "transform" not in config.named and len(train) > 0
    facts = DataFacts(
        num_series=len(panel.series),
        num_channels=panel.num_channels,
        num_values=sum(
            int((~np.isnan(series.values[start:stop])).sum())
            for series, (start, stop) in zip(panel.series, ranges, strict=True)
        ),
        num_windows=max(1, len(train)),
        prediction_length=shape.prediction_length,
        is_linear_possible=is_linear,
        transform=choose_transform(train, shape, tuple(seasons or ()), training.seed) if is_chosen else "none",
    )
    named = {name: getattr(getattr(config, home), name) for name, home in HOMES.items() if name in config.named}
    settings, reasons = choose_settings(facts, config.preset, named)
    if not settings:
        return config, ()
    return config.replace_settings(**settings), (*explain_seasons(shape, panel, seasons), *reasons)


def _check_counts(splits: Splits) -> None:
    """Refuses what the negative binomial distribution has no probability for, among the rows training reads."""
    panel = splits.panel
    for series, border in zip(panel.series, splits.borders, strict=True):
        values = series.values[: border.validation[1]]
        wrong = np.argwhere(~np.isnan(values) & ((values < 0) | (values != np.round(values))))
        if len(wrong):
            row, column = wrong[0]
            name = panel.channels[column] + ("" if panel.is_wide else f"' of series '{series.name}")
            stamp = calendar.format_times(series.time[[row]], panel.freq, panel.timezone)[0]
            raise DataError(
                f"{panel.source}: --loss negative_binomial takes counts, but column '{name}' holds "
                f"{values[row, column]:g} at {stamp} (row {row + 1} of the series in time order); choose --loss "
                "student_t or quantile, or round and clip the column"
            )
