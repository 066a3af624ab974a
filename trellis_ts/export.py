"""Models as files that others can run: ``torch.export`` programs (``.pt2``) and ONNX (``.onnx``), without this package.

The graph holds everything between the numbers of a table and the forecast in the same units: scaling, the network with
its memory unrolled into plain operations (the definition, one token after the other, so the result is exact), the
calibration of bands. The batch may be of any size; all other lengths are those the model was trained for.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from trellis_ts import conformal
from trellis_ts.datasets.cycles import num_features
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError
from trellis_ts.files import atomic_file
from trellis_ts.layers.trellis import TrellisMixer
from trellis_ts.model import ForecastModel
from trellis_ts.types import Batch, Features, Forecast

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Bool, Float, Int
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.checkpoints import Checkpoint
    from trellis_ts.config import CovariateShape, WindowShape
    from trellis_ts.datasets.splits import Scaler
    from trellis_ts.types import Panel

FORMATS = (".onnx", ".pt2")
DESCRIPTION = "trellis_ts"
"""Key of the description (JSON) among an ONNX file's metadata, and the name of the extra file in a ``.pt2``."""
_ROLES = ("past", "known", "static")
_PARTS = ("values", "observed", "codes")


class ExportedNetwork(nn.Module):
    """The network between numbers in the units of the data, written for being traced.

    Args:
        checkpoint: the model; it is copied.
        calibrated: whether bands are calibrated where the model holds a calibration.

    Raises:
        ConfigError: the model forecasts a distribution, whose quantiles the graph has no operations for.
    """

    def __init__(self, checkpoint: Checkpoint, *, calibrated: bool = True) -> None:
        super().__init__()
        if not isinstance(checkpoint.model, ForecastModel):
            raise ConfigError("a streaming model cannot be exported yet; train with --mode window")
        model = copy.deepcopy(checkpoint.model).cpu().eval().requires_grad_(False)
        if model.family is not None:
            raise ConfigError(
                f"a model of --loss {model.family} cannot be exported: quantiles of that distribution are computed "
                "outside the network; train with --loss quantile"
            )
        for module in model.modules():
            if isinstance(module, TrellisMixer):
                module.implementation = "chunked" if module.chunk_length > 1 else "reference"
        self.model = model
        self.covariates = [
            f"{role}_{part}" for role in _ROLES if getattr(model.shape.covariates, f"has_{role}") for part in _PARTS
        ]
        self.shifts = None
        if calibrated and checkpoint.calibration is not None and len(model.quantile_levels) > 1:
            self.shifts = conformal.Shifts.of(
                checkpoint.calibration, _example_forecast(model.shape, model.quantile_levels)
            )

    def forward(
        self,
        context: Float[Tensor, "batch context channel"],
        observed: Bool[Tensor, "batch context channel"],
        phase: Int[Tensor, " batch"],
        loc: Float[Tensor, "batch 1 channel"],
        scale: Float[Tensor, "batch 1 channel"],
        *covariates: Tensor,
    ) -> tuple[Tensor, ...]:
        """The point forecast and, of a model of quantiles, those on a last axis; see ``docs/export.md``."""
        parts = dict(zip(self.covariates, covariates, strict=True))
        past, known, static = (
            Features(*(parts[f"{role}_{part}"] for part in _PARTS)) if f"{role}_values" in parts else None
            for role in _ROLES
        )
        scaled = torch.where(observed, (context - loc) / scale, 0.0).float()
        forecast = self.model(Batch(scaled, observed, phase, phase, past=past, known=known, static=static))
        if self.shifts is not None:
            forecast = self.shifts.apply(forecast)
        forecast = forecast.map(torch.Tensor.double).affine(loc, scale)
        return (forecast.point,) if forecast.quantiles is None else (forecast.point, forecast.quantiles)

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in order."""
        return ["context", "observed", "phase", "loc", "scale", *self.covariates]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in order."""
        return ["point", "quantiles"] if self.model.quantile_levels else ["point"]

    def example(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Inputs of the right shapes and types."""
        shape = self.model.shape
        context = torch.zeros(batch, shape.context_length, shape.num_channels, dtype=torch.float64)
        one = torch.ones(batch, 1, shape.num_channels, dtype=torch.float64)
        basic = (context, torch.ones_like(context, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64), one, one)
        return (*basic, *(each for role in _ROLES for each in _example_features(role, shape, batch)))


def _example_forecast(shape: WindowShape, levels: tuple[float, ...]) -> Forecast:
    point = torch.zeros(1, shape.prediction_length, 1)
    return Forecast(point, point[..., None].expand(*point.shape, len(levels)), levels)


def _example_features(role: str, shape: WindowShape, batch: int) -> tuple[Tensor, ...]:
    read: CovariateShape = shape.covariates
    if not getattr(read, f"has_{role}"):
        return ()
    numbers = getattr(read, f"{role}_numbers") + (num_features(read.cycles) if role == "known" else 0)
    steps = {
        "past": (shape.context_length,),
        "known": (shape.context_length + shape.prediction_length,),
        "static": (),
    }[role]
    values = torch.zeros(batch, *steps, numbers)
    codes = torch.zeros(batch, *steps, len(getattr(read, f"{role}_categories")), dtype=torch.int64)
    return values, torch.ones_like(values, dtype=torch.bool), codes


def export_model(checkpoint: Checkpoint, path: Path, *, calibrated: bool = True) -> None:
    """Writes the model as a program that needs neither this package nor its training libraries.

    Args:
        checkpoint: the model.
        path: the file; its ending is the format.
        calibrated: as for ``ExportedNetwork``.

    Raises:
        ConfigError: the ending is unknown, the file cannot be written, the model cannot be exported, or the extra
            ``onnx`` is not installed.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: unknown ending; use one of {', '.join(FORMATS)}")
    network = ExportedNetwork(checkpoint, calibrated=calibrated)
    description = json.dumps(describe(checkpoint, network), allow_nan=False)
    with atomic_file(path) as temporary:
        if path.suffix == ".onnx":
            _write_onnx(network, temporary, description)
        else:
            program = _traced(network)
            torch.export.save(program, temporary, extra_files={DESCRIPTION: description})


def describe(checkpoint: Checkpoint, network: ExportedNetwork) -> dict[str, Any]:
    """What fills the inputs: names, shapes, calendar, and the scale of every series."""
    shape, data = network.model.shape, checkpoint.data
    example = network.example()
    return {
        "inputs": [
            {"name": name, "dtype": str(each.dtype).removeprefix("torch."), "shape": ["batch", *each.shape[1:]]}
            for name, each in zip(network.input_names, example, strict=True)
        ],
        "outputs": network.output_names,
        "quantile_levels": list(network.model.quantile_levels),
        "channels": list(data.channels),
        "freq": data.freq,
        "timezone": data.timezone,
        "context_length": shape.context_length,
        "prediction_length": shape.prediction_length,
        "season_length": shape.season_length,
        "cycles": list(shape.covariates.cycles),
        "covariates": [asdict(each) for each in data.covariates],
        "series": [{"name": each.name, "loc": each.loc, "scale": each.scale} for each in data.series],
    }


def inputs_of(
    panel: Panel, scaler: Scaler, network: ExportedNetwork
) -> dict[str, NDArray[np.float64 | np.float32 | np.bool_ | np.int64]]:
    """The inputs of an exported model for what follows the last rows of every series, by name.

    Args:
        panel: the series, with known covariates over the horizon.
        scaler: the model's, for these series.
        network: what was exported.
    """
    shape = network.model.shape
    horizon = shape.prediction_length
    scaled = ScaledPanel(panel, scaler, shape.season_length, future_length=horizon)
    every = np.arange(len(panel.series), dtype=np.int64)
    ends = np.array([len(each) for each in panel.series], dtype=np.int64)
    batch = scaled.gather(every, ends, shape.context_length, 0, horizon)
    loc, scale = torch.from_numpy(scaler.loc)[:, None], torch.from_numpy(scaler.scale)[:, None]
    context = torch.where(batch.observed, batch.context.double() * scale + loc, 0.0)
    found = {"context": context, "observed": batch.observed, "phase": batch.phase, "loc": loc, "scale": scale}
    for role in _ROLES:
        features: Features | None = getattr(batch, role)
        if features is not None:
            found |= {f"{role}_{part}": getattr(features, part) for part in _PARTS}
    return {name: found[name].numpy() for name in network.input_names}


def _dynamic(network: ExportedNetwork) -> tuple[Any, ...]:
    batch = torch.export.Dim("batch", min=1)
    each = [{0: batch} for _ in network.input_names]
    basic = len(each) - len(network.covariates)
    return (*each[:basic], tuple(each[basic:])) if network.covariates else tuple(each)


def _traced(network: ExportedNetwork) -> torch.export.ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own parts
        return torch.export.export(network, network.example(), dynamic_shapes=_dynamic(network), strict=False)


def _write_onnx(network: ExportedNetwork, path: Path, description: str) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch writes ONNX with it
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed, which ONNX needs; pip install 'trellis-ts[onnx]'") from None
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _traced(network),
                input_names=network.input_names,
                output_names=network.output_names,
                dynamo=True,
                verbose=False,
            )
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
    assert program is not None
    model = program.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = DESCRIPTION, description
    onnx.save(model, str(path))
