"""What moved a forecast, and what the memory holds of its context.

Importance is found by occlusion: what would be forecast had a patch not been measured, or a covariate not been known?
The model has learned to do without missing values, so the question is one it can answer (Zeiler and Fergus, 2014, for
pictures). Patches that say the same stand in for each other: of two, neither may seem important.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trellis_ts.datasets.covariates import check_future
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.errors import ConfigError
from trellis_ts.kernels.memory.reference import read
from trellis_ts.layers.trellis import TrellisMixer
from trellis_ts.model import ForecastModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool, Float
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.config import WindowShape
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.kernels import MemoryState
    from trellis_ts.types import Batch, Covariate, Features, Forecast, Panel

    Predict = Callable[[Batch], Forecast]

CALENDAR = "calendar"
"""What the cycles of the calendar are called among the covariates."""


@dataclass(frozen=True, eq=False)
class MemoryRecord:
    """What one layer did with the context; the axes are those of ``Explanation``, then token or slot."""

    forget_gate: NDArray[np.float64]
    """``[series, channel, head, patch]``: share of the memory each token kept."""
    step_size: NDArray[np.float64]
    """``[series, channel, head, patch]``: how strongly each token was written; 0 for one that is missing."""
    written: NDArray[np.float64]
    """``[series, channel, head, patch]``: how far its write moved the value memory (Frobenius norm)."""
    kept: NDArray[np.float64]
    """``[series, channel, head, patch]``: share of that write which later forget gates left at the end."""
    slot_usage: NDArray[np.float64]
    """``[series, channel, head, slot]``: share of all reading that fell on each slot."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Of one forecast per series: ``importance`` is the mean absolute change of the forecast, in units of the data."""

    series: tuple[str, ...]
    channels: tuple[str, ...]
    patches: tuple[tuple[int, int], ...]
    """Steps ``[start, stop)`` of each patch, counted from the first of the context."""
    importance: NDArray[np.float64]
    """``[series, channel, patch]``: without this patch."""
    covariates: tuple[str, ...]
    covariate_importance: NDArray[np.float64]
    """``[series, channel, covariate]``: without this covariate."""
    memory: tuple[MemoryRecord, ...]
    """Per layer; none of a model without Trellis layers."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, for JSON."""
        return {
            "series": list(self.series),
            "channels": list(self.channels),
            "patches": [list(each) for each in self.patches],
            "importance": self.importance.tolist(),
            "covariates": list(self.covariates),
            "covariate_importance": self.covariate_importance.tolist(),
            "memory": [{name: values.tolist() for name, values in vars(each).items()} for each in self.memory],
        }


def patch_steps(shape: WindowShape) -> tuple[tuple[int, int], ...]:
    """Steps ``[start, stop)`` of each patch; the last one ends at the last step, the first may be cut off."""
    stops = [shape.context_length - index * shape.patch_stride for index in range(shape.num_patches)][::-1]
    return tuple((max(0, stop - shape.patch_length), stop) for stop in stops)


def without_steps(batch: Batch, missing: Bool[Tensor, "batch context"]) -> Batch:
    """The batch as if no channel had been measured at some steps."""
    observed = batch.observed & ~missing[..., None]
    return batch._replace(context=batch.context * observed, observed=observed)


def patch_importance(predict: Predict, batch: Batch, shape: WindowShape) -> Float[Tensor, "batch channel patch"]:
    """Mean absolute change of the point forecast when a patch is occluded, on the scale of the batch."""
    expected = predict(batch).point
    changes = []
    for start, stop in patch_steps(shape):
        missing = torch.zeros(batch.context.shape[:2], dtype=torch.bool)
        missing[:, start:stop] = True
        changes.append((predict(without_steps(batch, missing)).point - expected).abs().mean(dim=1))
    return torch.stack(changes, dim=-1)


def covariate_importance(
    predict: Predict, batch: Batch, covariates: Sequence[Covariate], *, has_calendar: bool
) -> tuple[tuple[str, ...], Float[Tensor, "batch channel covariate"]]:
    """The same for each covariate, taken away from the whole window, and for the calendar."""
    expected = predict(batch).point
    names, changes = [], []
    for covariate in covariates:
        own = [each for each in covariates if each.role == covariate.role]
        is_number = covariate.categories is None
        place = [each for each in own if (each.categories is None) == is_number].index(covariate)
        features: Features = getattr(batch, covariate.role)
        occluded = _without_column(features, [place], is_number=is_number)
        names.append(covariate.name)
        changed = predict(_with_features(batch, covariate.role, occluded)).point
        changes.append((changed - expected).abs().mean(dim=1))
    if has_calendar and batch.known is not None:
        first = sum(each.role == "known" and each.categories is None for each in covariates)
        occluded = _without_column(batch.known, list(range(first, batch.known.values.shape[-1])), is_number=True)
        names.append(CALENDAR)
        changes.append((predict(batch._replace(known=occluded)).point - expected).abs().mean(dim=1))
    empty = expected.new_zeros(len(expected), expected.shape[2], 0)
    return tuple(names), torch.stack(changes, dim=-1) if changes else empty


def _with_features(batch: Batch, role: str, features: Features) -> Batch:
    changed: dict[str, Any] = {role: features}
    return batch._replace(**changed)


def _without_column(features: Features, columns: Sequence[int], *, is_number: bool) -> Features:
    if not is_number:
        codes = features.codes.clone()
        codes[..., columns] = 0
        return features._replace(codes=codes)
    values, observed = features.values.clone(), features.observed.clone()
    values[..., columns], observed[..., columns] = 0.0, False
    return features._replace(values=values, observed=observed)


@torch.inference_mode()
def memory_records(model: ForecastModel, batch: Batch) -> tuple[MemoryRecord, ...]:
    """What each Trellis layer did while it read the batch."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    mixers = [each.mixer for each in model.blocks if isinstance(each.mixer, TrellisMixer)]
    hooks = [
        mixer.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs}))
        for index, mixer in enumerate(mixers)
    ]
    try:
        model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    shape = (len(batch.context), batch.context.shape[2])
    return tuple(_record(mixer, *seen[index], shape) for index, mixer in enumerate(mixers))


def _record(mixer: TrellisMixer, tokens: Tensor, observed: Tensor, shape: tuple[int, int]) -> MemoryRecord:
    """Reads the tokens one by one, as the recurrence does, and notes what changes."""
    inputs, _ = mixer.project(tokens, observed)
    memory: MemoryState | None = None
    written, usage = [], torch.zeros(len(tokens), mixer.num_heads, mixer.num_slots)
    for token in range(tokens.shape[1]):
        before = memory
        _, memory = mixer.run(type(inputs)(*(each[:, token : token + 1] for each in inputs)), memory)
        kept = inputs.log_forget[:, token].exp()[..., None, None]
        held = 0.0 if before is None else kept * before.value_memory
        written.append((memory.value_memory - held).flatten(2).norm(dim=-1))
        codes = read((memory.key_memory * inputs.query[:, token, :, None]).sum(-1), mixer.read_activation)
        usage += codes.abs().cpu()
    log_forget = inputs.log_forget.transpose(1, 2)  # [R, H, N]
    after = log_forget.flip(-1).cumsum(-1).flip(-1) - log_forget

    def named(values: Tensor) -> NDArray[np.float64]:
        array: NDArray[np.float64] = values.double().cpu().numpy()
        return array.reshape(*shape, *array.shape[1:])

    return MemoryRecord(
        forget_gate=named(log_forget.exp()),
        step_size=named(inputs.step_size.transpose(1, 2)),
        written=named(torch.stack(written, dim=-1)),
        kept=named(after.exp()),
        slot_usage=named(usage / usage.sum(dim=-1, keepdim=True).clamp(min=1e-12)),
    )


def explain_panel(forecaster: Forecaster, panel: Panel) -> Explanation:
    """What moves the forecasts after the last rows of every series; ``Forecaster.explain`` does this for a frame.

    Raises:
        ConfigError: a streaming model, which has no window to occlude.
        DataError: the panel does not fit the model, or its known covariates do not reach over the horizon.
    """
    model, data = forecaster.checkpoint.model, forecaster.checkpoint.data
    if not isinstance(model, ForecastModel):
        raise ConfigError("a streaming model reads no window whose parts could be taken away; train with --mode window")
    panel, shape = forecaster.check(panel), model.shape
    if any(each.role == "known" for each in data.covariates):
        check_future(panel, shape.prediction_length)
    scaler = forecaster.scaler().of(panel)
    scaled = ScaledPanel(panel, scaler, shape.season_length, future_length=shape.prediction_length)
    every = np.arange(len(panel.series), dtype=np.int64)
    ends = np.array([len(series) for series in panel.series], dtype=np.int64)
    batch = scaled.gather(every, ends, shape.context_length, 0, shape.prediction_length)
    predict = forecaster.predictor(scaled)
    has_calendar = bool(shape.covariates.cycles)
    names, of_covariates = covariate_importance(predict, batch, data.covariates, has_calendar=has_calendar)
    units = scaler.scale[..., None]
    return Explanation(
        series=tuple(each.name for each in panel.series),
        channels=panel.channels,
        patches=patch_steps(shape),
        importance=patch_importance(predict, batch, shape).double().numpy() * units,
        covariates=names,
        covariate_importance=of_covariates.double().numpy() * units,
        memory=memory_records(model, batch.to(forecaster.device)),
    )
