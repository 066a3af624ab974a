"""Model directories: ``config.json``, ``data.json``, ``model.safetensors`` and, of a calibrated model,
``calibration.json``. Nothing in them is ever executed.

``config.json`` holds the settings, the lengths the model is built for and the checksums of the other files;
``data.json`` the columns, the calendar and the scaler; ``calibration.json`` what the validation windows taught about
bands and paths. All have a closed schema: unknown keys, wrong types and values out of range are refused, and tensors
are compared by name and shape before any is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from trellis_ts.causal import CausalModel
from trellis_ts.config import Closed, ExperimentConfig, WindowShape
from trellis_ts.conformal import Calibration
from trellis_ts.datasets import calendar
from trellis_ts.datasets.covariates import CovariateScaler
from trellis_ts.datasets.splits import Scaler
from trellis_ts.distributions import FAMILIES
from trellis_ts.errors import CheckpointError, ConfigError, DataError
from trellis_ts.files import open_permissions, replace_folder
from trellis_ts.model import ForecastModel
from trellis_ts.sizing import covariate_shape
from trellis_ts.types import Covariate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trellis_ts.config import Implementation

# Version 2 has settings that version 1 lacks; those have defaults. Version 3 has another streaming network, so that of
# older files only window models are read.
FORMAT_VERSION = 3
_FIRST_STREAMING_VERSION = 3
_CONFIG_FILE, _DATA_FILE, _WEIGHTS_FILE = "config.json", "data.json", "model.safetensors"
_CALIBRATION_FILE = "calibration.json"
MODEL_FILES = (_CONFIG_FILE, _DATA_FILE, _WEIGHTS_FILE, _CALIBRATION_FILE)
"""All files that a model can have; nothing else in its directory is ever read."""
TRAINING_FOLDER = "training"
"""Logs and resumable state, kept beside the model's files and not needed to forecast."""
_LARGEST_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class SeriesRecord(Closed):
    """What a model remembers of one training series: its scaler per channel, and where its known rows ended."""

    name: str
    loc: tuple[float, ...]
    scale: tuple[float, ...]
    known_until: int | None
    """Last stamp used to train or to choose the epoch, in nanoseconds since 1970; None if no row was."""


@dataclass(frozen=True)
class DataRecord(Closed):
    """What a model remembers of its data, enough to read the next table and to forecast from it."""

    time_column: str
    id_column: str | None
    channels: tuple[str, ...]
    freq: str
    timezone: str | None
    dataset: str | None
    series: tuple[SeriesRecord, ...]
    covariates: tuple[Covariate, ...] = ()
    day_first: bool | None = None
    """The order of dates like 02/03/2024 in the table, for single dates that do not tell; None where it had none."""

    def __post_init__(self) -> None:
        try:
            calendar.normalize_freq(self.freq)
            if self.timezone is not None:
                calendar.check_timezone(self.timezone)
        except DataError as error:
            raise ConfigError(str(error)) from None
        for covariate in self.covariates:
            if not math.isfinite(covariate.loc) or not 0 < covariate.scale < math.inf:
                raise ConfigError(f"covariate '{covariate.name}' has a loc that is no number or a scale not positive")
            if len(set(covariate.categories or ())) < len(covariate.categories or ()):
                raise ConfigError(f"covariate '{covariate.name}' has a category twice")
        if len({each.name for each in self.covariates}) < len(self.covariates):
            raise ConfigError("every covariate needs a name of its own")
        names = [each.name for each in self.series]
        for kind, found in (("channel", self.channels), ("series", names)):
            if not found or len(set(found)) < len(found):
                raise ConfigError(f"every {kind} needs a name of its own, and there must be at least one")
        for each in self.series:
            if not len(each.loc) == len(each.scale) == len(self.channels):
                raise ConfigError(f"series '{each.name}' needs one loc and one scale per channel")
            if not all(map(math.isfinite, each.loc)) or not all(0 < scale < math.inf for scale in each.scale):
                raise ConfigError(f"series '{each.name}' has a loc that is no number or a scale that is not positive")
            if each.known_until is not None and not -(1 << 63) < each.known_until < 1 << 63:
                raise ConfigError(f"series '{each.name}' has a known_until beyond the calendar")


@dataclass(frozen=True)
class _ConfigFile(Closed):
    format: Literal["trellis_ts.model"]
    format_version: int
    package_version: str
    experiment: ExperimentConfig
    shape: WindowShape
    sha256: dict[str, str]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model with all that is needed to use it."""

    model: ForecastModel | CausalModel
    experiment: ExperimentConfig
    data: DataRecord
    calibration: Calibration | None = None
    reasons: tuple[str, ...] = ()
    """Why a preset chose the settings it chose, for people."""

    def scaler(self) -> Scaler:
        """The training rows' statistics."""
        series = self.data.series
        return Scaler(
            tuple(each.name for each in series),
            np.array([each.loc for each in series]),
            np.array([each.scale for each in series]),
            CovariateScaler(self.data.covariates, self.model.shape.covariates.cycles),
        )


_Schema = TypeVar("_Schema")


def save_checkpoint(directory: str | os.PathLike[str], checkpoint: Checkpoint, *, package_version: str) -> Path:
    """Writes a model directory in one step: it appears whole, or what was there before stays as it was.

    Raises:
        CheckpointError: the place cannot be written, or the disk is full.
    """
    target = Path(directory)
    with _explained(f"cannot save the model to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.saving-"))
        try:
            weights = {name: value.detach().cpu().contiguous() for name, value in checkpoint.model.state_dict().items()}
            save_file(weights, stage / _WEIGHTS_FILE)
            _write_json(stage / _DATA_FILE, asdict(checkpoint.data))
            written = [_DATA_FILE, _WEIGHTS_FILE]
            if checkpoint.calibration is not None:
                _write_json(stage / _CALIBRATION_FILE, asdict(checkpoint.calibration))
                written.append(_CALIBRATION_FILE)
            config = _ConfigFile(
                format="trellis_ts.model",
                format_version=FORMAT_VERSION,
                package_version=package_version,
                experiment=checkpoint.experiment,
                shape=checkpoint.model.shape,
                sha256={name: _sha256(stage / name) for name in written},
                reasons=checkpoint.reasons,
            )
            _write_json(stage / _CONFIG_FILE, asdict(config))
            for name in (_CONFIG_FILE, *written):
                _flush(stage / name)
                open_permissions(stage / name, 0o666)
            open_permissions(stage, 0o777)
            if target.is_dir() and not (target / _CONFIG_FILE).exists():  # a training's folder, no model until then
                for name in (*written, _CONFIG_FILE):
                    (stage / name).replace(target / name)
            else:
                replace_folder(stage, target, owned=MODEL_FILES)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return target


def clear_leftovers(directory: str | os.PathLike[str]) -> None:
    """Deletes what a process that was killed while it saved left beside a model directory that is there."""
    target = Path(directory)
    if target.is_dir():
        for kind in ("saving", "old"):
            for each in target.parent.glob(f".{target.name}.{kind}-*"):
                shutil.rmtree(each, ignore_errors=True)


def load_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Reads a model directory, checking everything before it allocates.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, or written by a newer version.
    """
    source = Path(directory)
    if not source.is_dir():
        problem = "it is a file, and a model is a directory" if source.exists() else "there is no such directory"
        raise CheckpointError(f"no model at {source}: {problem}; train one with `trellis train`")
    if not (source / _CONFIG_FILE).is_file():
        unfinished = (source / TRAINING_FOLDER).is_dir()
        hint = (
            "its training has not finished; go on with `trellis train ... --resume`" if unfinished else "it is no model"
        )
        raise CheckpointError(f"no model at {source}: {_CONFIG_FILE} is missing; {hint}")
    with _explained(f"cannot read the model at {source}"):
        _check_version(source / _CONFIG_FILE)
        config = _read_json(source / _CONFIG_FILE, _ConfigFile)
        if config.experiment.model.mode == "streaming" and config.format_version < _FIRST_STREAMING_VERSION:
            raise CheckpointError(
                f"{source} is a streaming model of format version {config.format_version}, whose network this trellis "
                "has no more; train it anew"
            )
        if strange := sorted(set(config.sha256) - {_DATA_FILE, _WEIGHTS_FILE, _CALIBRATION_FILE}):
            raise CheckpointError(f"{source / _CONFIG_FILE} is damaged: sha256: '{strange[0]}' is no file of a model")
        is_calibrated = _CALIBRATION_FILE in config.sha256
        for name in (_DATA_FILE, _WEIGHTS_FILE, *([_CALIBRATION_FILE] if is_calibrated else [])):
            expected = config.sha256.get(name)
            if not (source / name).is_file():
                raise CheckpointError(
                    f"the model at {source} is incomplete: {name} is missing; copy the whole directory"
                )
            if _sha256(source / name) != expected:
                raise CheckpointError(
                    f"the model at {source} is damaged: {name} does not match its checksum; copy or train it again"
                )
        data = _read_json(source / _DATA_FILE, DataRecord)
        if len(data.channels) != config.shape.num_channels:
            raise CheckpointError(
                f"the model at {source} is damaged: {_DATA_FILE} and {_CONFIG_FILE} disagree on channels"
            )
        scaler = CovariateScaler(data.covariates, config.shape.covariates.cycles)
        if covariate_shape(scaler) != config.shape.covariates:
            raise CheckpointError(
                f"the model at {source} is damaged: {_DATA_FILE} and {_CONFIG_FILE} disagree on covariates"
            )
        calibration = _read_json(source / _CALIBRATION_FILE, Calibration) if is_calibrated else None
        if calibration is not None and calibration.prediction_length != config.shape.prediction_length:
            raise CheckpointError(
                f"the model at {source} is damaged: {_CALIBRATION_FILE} and {_CONFIG_FILE} disagree on the horizon"
            )
        model = _read_weights(source / _WEIGHTS_FILE, config)
    return Checkpoint(model, config.experiment, data, calibration, config.reasons)


def build_model(
    experiment: ExperimentConfig, shape: WindowShape, *, implementation: Implementation = "auto"
) -> ForecastModel | CausalModel:
    """An untrained model of this configuration.

    Raises:
        ConfigError: settings that the model's mode does not have.
    """
    training = experiment.training
    family = next((each for each in FAMILIES if each == training.loss), None)
    levels = training.quantile_levels if training.loss == "quantile" or family else ()
    kind = CausalModel if experiment.model.mode == "streaming" else ForecastModel
    return kind(experiment.model, shape, levels, family=family, implementation=implementation)


def _read_weights(path: Path, config: _ConfigFile) -> ForecastModel | CausalModel:
    try:
        with torch.device("meta"):  # shapes without memory, so that a forged configuration cannot allocate
            model = build_model(config.experiment, config.shape)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit its configuration: {error}") from None
    except RuntimeError:  # a tensor whose size in bytes is beyond 64 bits
        raise CheckpointError(f"{path} does not fit its configuration, whose sizes are absurd") from None
    expected = {name: (tuple(value.shape), "F32") for name, value in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
            if found != expected:
                wrong = sorted(set(found.items()) ^ set(expected.items()))[0][0]
                raise CheckpointError(f"{path} does not fit its configuration: tensor '{wrong}' differs")
            weights = {name: file.get_tensor(name) for name in found}
            if broken := next((name for name, value in weights.items() if not value.isfinite().all()), None):
                raise CheckpointError(f"{path} is damaged: tensor '{broken}' holds numbers that are not finite")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _check_version(path: Path) -> None:
    """A newer format is named as such before its unknown keys are held against it."""
    try:
        header = json.loads(path.read_bytes())
        version = header.get("format_version")
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object") from None
    if isinstance(version, int) and version < 1:
        raise CheckpointError(f"{path} is damaged: there is no format version {version}")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this trellis reads up to {FORMAT_VERSION}; upgrade trellis-ts"
        )


def _read_json(path: Path, schema: type[_Schema]) -> _Schema:
    if path.stat().st_size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path} is larger than any such file can be; it is damaged")
    adapter: TypeAdapter[_Schema] = TypeAdapter(schema)
    try:
        return adapter.validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is damaged: {place or 'the whole'}: {first['msg']}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns the operating system's refusals into one line."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        raise CheckpointError(f"{what}: {reason}") from error
    except SafetensorError as error:  # it wraps the system's error in its own
        reason = "the disk is full" if "No space left" in str(error) else str(error)
        raise CheckpointError(f"{what}: {reason}") from error
