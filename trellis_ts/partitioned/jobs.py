"""What is done with a block: forecast it, or score a model on it. Both can be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from trellis_ts.checkpoints import MODEL_FILES
from trellis_ts.datasets.covariates import covariate_options, unseen_categories
from trellis_ts.datasets.readers import panel_from_frame
from trellis_ts.devices import resolve_device
from trellis_ts.doubts import SeriesDoubts
from trellis_ts.evaluation import score
from trellis_ts.forecaster import Forecaster
from trellis_ts.frames import forecast_frame, sample_frame
from trellis_ts.partitioned.output import Part, RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trellis_ts.checkpoints import Checkpoint
    from trellis_ts.datasets.partitions import Block
    from trellis_ts.scored import Scored
    from trellis_ts.types import Panel

_LOADED: dict[str, Forecaster] = {}
"""The model a process works with, by its checksum."""


@dataclass(frozen=True)
class ModelFiles:
    """A model directory's files as bytes, for processes that may not see the directory."""

    files: dict[str, bytes] = field(repr=False)
    device: str
    calibrated: bool

    @classmethod
    def of(cls, directory: str, *, device: str, calibrated: bool) -> ModelFiles:
        """Reads a model directory."""
        files = {name: Path(directory) / name for name in MODEL_FILES}
        return cls({name: path.read_bytes() for name, path in files.items() if path.is_file()}, device, calibrated)

    @property
    def digest(self) -> str:
        """A checksum of all files, and of whether bands are calibrated."""
        digest = sha256(repr(self.calibrated).encode())
        for name in sorted(self.files):
            digest.update(name.encode() + sha256(self.files[name]).digest())
        return digest.hexdigest()

    def load(self) -> Forecaster:
        """The forecaster; a process loads it once."""
        digest = self.digest
        if digest not in _LOADED:
            _LOADED.clear()
            with TemporaryDirectory(prefix="trellis-") as directory:
                for name, content in self.files.items():
                    (Path(directory) / name).write_bytes(content)
                device = resolve_device(self.device)
                _LOADED[digest] = Forecaster.load(directory, device=device, calibrated=self.calibrated)
        return _LOADED[digest]


@dataclass(frozen=True)
class Reading:
    """How a block's rows become a panel: the columns and calendar of the model, but for those named otherwise."""

    time: str
    target: tuple[str, ...]
    keys: tuple[str, ...]
    """The columns that name the series."""
    id: str | None
    freq: str | None
    """None for the block's own."""
    day_first: bool | None
    covariates: dict[str, Any]
    """The reader's options."""
    regularize: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint, keys: Sequence[str], named: dict[str, Any]) -> Reading:
        """The columns of a model.

        Args:
            checkpoint: the model.
            keys: the columns that name the series.
            named: ``time``, ``target``, ``id``, ``freq`` and ``day_first`` where others are meant; None for the rest.
        """
        record, settings = checkpoint.data, checkpoint.experiment.data
        day_first = record.day_first if settings.day_first is None else settings.day_first
        return cls(
            time=named["time"] or record.time_column,
            target=tuple(named["target"] or record.channels),
            keys=tuple(keys),
            id=named["id"] or record.id_column,
            freq=named["freq"] or record.freq,
            day_first=day_first if named["day_first"] is None else named["day_first"],
            covariates=covariate_options(record.covariates),
            regularize=settings.regularize,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        roles = ("past_covariates", "known_covariates", "static")
        covariates = [name for role in roles for name in self.covariates[role]]
        return tuple(dict.fromkeys((self.time, *self.keys, *self.target, *covariates)))

    def panel(self, table: Any, source: str) -> Panel:
        """The panel of some rows.

        Raises:
            DataError: they cannot be read, or are of another kind than those the model was trained on.
        """
        return panel_from_frame(
            table,
            time=self.time,
            target=self.target,
            id=self.id,
            freq=self.freq,
            day_first=self.day_first,
            **self.covariates,
            regularize=self.regularize,
            source=source,
        )

    def read(self, block: Block, checkpoint: Checkpoint) -> tuple[Panel, int]:
        """The panel of a block, its channels called as the model calls them, and the number of rows it was made of."""
        table = block.read()
        panel = self.panel(table, f"{block.address}, partition {block.number}")
        if set(panel.channels) != set(checkpoint.data.channels):
            panel = replace(panel, columns=replace(panel.columns, channels=checkpoint.data.channels))
        # In an order of their own, whatever way the rows were read: a block gives the same file each time.
        return replace(panel, series=tuple(sorted(panel.series, key=lambda each: each.name))), len(table)


@dataclass(frozen=True)
class Report:
    """What was found in a block, beside its result."""

    block: int
    rows: int
    notes: tuple[str, ...]
    doubts: SeriesDoubts

    @classmethod
    def of(cls, block: int, panel: Panel, checkpoint: Checkpoint, num_rows: int) -> Report:
        """What a reader of the result should know."""
        notes = (*panel.notes, *unseen_categories(panel, checkpoint.data.covariates))
        return cls(block, num_rows, notes, SeriesDoubts.of(panel, checkpoint))


@dataclass(frozen=True)
class ForecastJob:
    """Forecasts a block into its file."""

    reading: Reading
    output: RunFolder
    id_name: str
    """The output's column of series, where no more than one names them."""
    time_name: str
    """The output's column of stamps."""
    prediction_length: int | None = None
    quantile_levels: tuple[float, ...] | None = None
    samples: int | None = None
    seed: int = 0

    def run(self, forecaster: Forecaster, block: Block) -> tuple[Report, Part]:
        """Reads, forecasts and writes.

        Raises:
            ConfigError: the file cannot be written.
            DataError: the block cannot be read.
        """
        panel, num_rows = self.reading.read(block, forecaster.checkpoint)
        panel = forecaster.check(panel)
        table = self._forecast(forecaster, panel, block.number)
        part = Part(self.output.run, block.number, len(panel.series), num_rows, len(table))
        self.output.write(part, table)
        return Report.of(block.number, panel, forecaster.checkpoint, num_rows), part

    def _forecast(self, forecaster: Forecaster, panel: Panel, block: int) -> pa.Table:
        names = {"id_name": self.id_name, "time_name": self.time_name}
        if self.samples is None:
            result = forecaster.forecast(
                panel, prediction_length=self.prediction_length, quantile_levels=self.quantile_levels
            )
            return pa.Table.from_pandas(forecast_frame(panel, result, **names), preserve_index=False)
        # A seed of its own for each block, or the first series of all would have the same paths.
        seed = int(np.random.SeedSequence([self.seed, block]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        paths = forecaster.sample_paths(
            panel, num_samples=self.samples, seed=seed, prediction_length=self.prediction_length
        )
        return pa.Table.from_pandas(sample_frame(panel, paths, **names), preserve_index=False)


@dataclass(frozen=True)
class ScoreJob:
    """Scores a model and baselines on a block."""

    reading: Reading
    step: int = 1
    max_origins: int | None = None
    baselines: tuple[str, ...] = ()

    def run(self, forecaster: Forecaster, block: Block) -> tuple[Report, Scored]:
        """Reads and scores.

        Raises:
            ConfigError: an option cannot be used.
            DataError: the block cannot be read.
        """
        panel, num_rows = self.reading.read(block, forecaster.checkpoint)
        scored = score(forecaster, panel, step=self.step, max_origins=self.max_origins, baselines=self.baselines)
        return Report.of(block.number, panel, forecaster.checkpoint, num_rows), scored
