"""Where training starts: from a linear forecast that is solved for, not learnt step by step.

The linear skip gets the weights of a ridge regression from normalised contexts to normalised futures, drawn towards the
best of a few simple forecasts (the context's mean, its last value, the last seasons repeated). The head starts with no
say in the location, and with the spread of what the linear forecast leaves. Everything is computed on training windows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import torch

from trellis_ts.config import Transform
from trellis_ts.heads import center_index
from trellis_ts.scaling import instance_statistics, squash, unsquash

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jaxtyping import Bool, Float
    from numpy.typing import NDArray
    from torch import Tensor

    from trellis_ts.config import WindowShape
    from trellis_ts.datasets.windows import WindowDataset
    from trellis_ts.model import ForecastModel

# Rows (channels of windows) solved with, and those at the end of the training rows that choose among solutions.
_ROWS, _JUDGING_ROWS = 8_192, 4_096
_JUDGED_SHARE = 0.2
_PENALTIES = (0.003, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# A solution has to be better than a simple forecast by this share to replace it.
_LEAST_GAIN = 0.01
_MEAN = "the mean"
# Through asinh a linear forecast may err more by this share: a network makes up for it (docs/model.md has the tables).
_MADE_UP_FOR = 0.06
# In standard deviations of a context; farther ones are outliers that squares would listen to.
_LARGEST_ERROR = 5.0


class _Rows(NamedTuple):
    """Windows on their own scale, a row per channel, as a linear skip reads and forecasts them."""

    context: Float[Tensor, "row context"]
    future: Float[Tensor, "row horizon"]
    observed: Bool[Tensor, "row horizon"]
    transform: Transform

    def errors(self, weight: Float[Tensor, "horizon context"]) -> Float[Tensor, "row horizon"]:
        """What the linear forecast leaves; 0 where nothing was observed."""
        return torch.where(self.observed, self.future - self.context @ weight.T, 0.0)

    def row_errors(self, weight: Float[Tensor, "horizon context"]) -> Float[Tensor, " row"]:
        """Mean absolute error of every row, over what was observed, in standard deviations of its context."""
        errors = self.errors(weight)
        if self.transform == "asinh":
            errors = torch.where(self.observed, unsquash(self.future) - unsquash(self.context @ weight.T), 0.0)
        return errors.abs().sum(dim=1) / self.observed.sum(dim=1).clamp(min=1)

    def shares(self, weight: Float[Tensor, "horizon context"]) -> Float[Tensor, " row"]:
        """How much a row counts: the inverse of its error under a forecast, so that noisy rows do not drown others."""
        error = self.row_errors(weight)
        share = 1 / (error + error.median() + 1e-6)
        return share / share.mean()


class _Solution(NamedTuple):
    """A linear forecast of normalised contexts."""

    weight: Float[Tensor, "horizon context"]
    name: str
    error: float
    """On the last of the training windows, as ``_Rows.row_errors`` has it."""
    judges: _Rows


def start_from_linear(
    model: ForecastModel, windows: WindowDataset, seasons: Sequence[int], generator: torch.Generator
) -> str:
    """Sets the model's linear skip and the bias of its head; gives the name of what was chosen.

    Args:
        model: with a linear skip and instance normalisation, untrained.
        windows: of training.
        seasons: lengths at which the series may repeat themselves.
        generator: draws the windows that are looked at.
    """
    found = _solve(windows, model.shape, seasons, generator, model.config.transform)
    _set(model, found.weight, found.judges)
    return found.name


def choose_transform(windows: WindowDataset, shape: WindowShape, seasons: Sequence[int], seed: int) -> Transform:
    """``asinh`` unless the best linear forecast errs far more through it.

    It tames peaks, and a network learns better from tame numbers; growth it bends, and that shows in a linear forecast.

    Args:
        windows: of training.
        shape: of the model.
        seasons: as for ``start_from_linear``.
        seed: of the windows that are looked at, the same for both.
    """
    plain, squashed = (
        _solve(windows, shape, seasons, torch.Generator().manual_seed(seed), each).error for each in get_args(Transform)
    )
    return "asinh" if squashed <= plain * (1 + _MADE_UP_FOR) else "none"


def _solve(
    windows: WindowDataset,
    shape: WindowShape,
    seasons: Sequence[int],
    generator: torch.Generator,
    transform: Transform,
) -> _Solution:
    """The best of simple forecasts and ridge regressions on the early windows, judged on the late ones, then solved for
    on all."""
    early, late = _by_time(windows)
    judges = _draw(windows, late, _JUDGING_ROWS, generator, transform)
    simple = _simple_forecasts(shape.prediction_length, shape.context_length, seasons)
    scores = {name: float(judges.row_errors(weight).mean()) for name, weight in simple.items()}
    plain = name = min(scores, key=lambda each: scores[each])
    shares = judges.shares(simple[plain])
    error = float((shares * judges.row_errors(simple[plain])).mean())
    best, penalty = error * (1 - _LEAST_GAIN), None
    if len(early):
        rows = _draw(windows, early, _ROWS, generator, transform)
        arounds = {around: simple[around] for around in (plain, _MEAN)}
        for around, candidate, weight in _ridge(rows, rows.shares(simple[plain]), arounds, _PENALTIES):
            found = float((shares * judges.row_errors(weight)).mean())
            if found < best:
                error = best = found
                penalty, name = candidate, around
    if penalty is None:
        return _Solution(simple[name], name, error, judges)
    rows = _draw(windows, np.arange(len(windows)), _ROWS, generator, transform)
    _, _, weight = next(_ridge(rows, rows.shares(simple[plain]), {name: simple[name]}, (penalty,)))
    return _Solution(weight, f"ridge regression around {name}", error, judges)


def _by_time(windows: WindowDataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The windows whose future lies in the first part of their series' training rows, and those of the last part."""
    index = np.arange(len(windows))
    series, origins = windows.locate(index)
    first = np.full(int(series.max()) + 1, np.iinfo(np.int64).max)
    last = np.zeros_like(first)
    np.minimum.at(first, series, origins)
    np.maximum.at(last, series, origins)
    border = first[series] + (1 - _JUDGED_SHARE) * (last - first)[series]
    return index[origins + windows.prediction_length <= border], index[origins >= border]


def _draw(
    windows: WindowDataset,
    index: NDArray[np.int64],
    most_rows: int,
    generator: torch.Generator,
    transform: Transform,
) -> _Rows:
    """Some of the windows, at random."""
    count = max(1, most_rows // windows.panel.num_channels)
    if len(index) > count:
        index = index[torch.randperm(len(index), generator=generator)[:count].numpy()]
    pieces = []
    for start in range(0, len(index), 1024):
        batch = windows.__getitems__(index[start : start + 1024].tolist())
        if batch.future is None or batch.future_observed is None:
            raise ValueError("a training window needs a future")
        loc, scale = instance_statistics(batch.context, batch.observed)
        context = (batch.context - loc) / scale * batch.observed
        future = (batch.future - loc) / scale
        if transform == "asinh":
            context, future = squash(context), squash(future)
        pieces.append([each.transpose(1, 2).flatten(0, 1) for each in (context, future, batch.future_observed)])
    context, future, observed = (torch.cat(each) for each in zip(*pieces, strict=True))
    return _Rows(context, future, observed, transform)


def _simple_forecasts(
    horizon: int, context_length: int, seasons: Sequence[int]
) -> dict[str, Float[Tensor, "horizon context"]]:
    """Forecasts a person might make, as weights on the context; the mean of a normalised context is 0."""
    found = {_MEAN: torch.zeros(horizon, context_length)}
    for season in dict.fromkeys((1, *seasons)):
        for count in sorted({1, 2, 4, context_length // season} if season > 1 else {1}):
            if 1 <= count <= context_length // season:
                weight = torch.zeros(horizon, context_length)
                for step in range(horizon):
                    newest = context_length + step - season * (step // season + 1)
                    weight[step, [newest - season * back for back in range(count) if newest >= season * back]] = 1
                repeated = f"the last {'value' if season == 1 else f'season of {season}'}"
                name = repeated if count == 1 else f"the mean of the last {count} seasons of {season}"
                found[name] = weight / weight.sum(dim=1, keepdim=True)
    return found


def _ridge(
    rows: _Rows,
    shares: Float[Tensor, " row"],
    arounds: Mapping[str, Float[Tensor, "horizon context"]],
    penalties: Sequence[float],
) -> Iterator[tuple[str, float, Float[Tensor, "horizon context"]]]:
    """Weights of least squared error, each row counting by its share, their squared distance from others penalised.

    Gives name, penalty and weights of every solution. What all have in common, most of the work, is done once.
    """
    context = rows.context.double()
    shared = context * shares[:, None] / len(context)
    gram = shared.T @ context
    residuals = [rows.errors(each).clamp(-_LARGEST_ERROR, _LARGEST_ERROR).double() for each in arounds.values()]
    moments = shared.T @ torch.cat(residuals, dim=1)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    for penalty in penalties:
        changes = torch.cholesky_solve(moments, torch.linalg.cholesky(gram + penalty * identity))
        for (name, around), change in zip(arounds.items(), torch.split(changes.T, residuals[0].shape[1]), strict=True):
            yield name, penalty, around + change.to(around.dtype)


@torch.no_grad()
def _set(model: ForecastModel, weight: Float[Tensor, "horizon context"], rows: _Rows) -> None:
    """Writes the skip, and a head that adds nothing but the quantiles of the errors."""
    if model.skip is None:
        raise ValueError("the model has no linear skip")
    model.skip.weight.copy_(weight)
    model.skip.bias.zero_()
    projection = model.head.projection
    outputs = projection.weight.view(len(weight), -1, projection.weight.shape[1])  # [horizon, output, input]
    bias = projection.bias.view(len(weight), -1)
    if model.family is not None:  # what shapes the distribution is left to be learnt
        outputs[:, 0] = 0
        bias[:, 0] = 0
        return
    outputs.zero_()
    bias.zero_()
    if model.quantile_levels:
        errors = torch.where(rows.observed, rows.future - rows.context @ weight.T, torch.nan)
        levels = torch.tensor(model.quantile_levels)
        quantiles = torch.nan_to_num(torch.nanquantile(errors, levels, dim=0)).T  # [horizon, quantile]
        steps = quantiles.diff(dim=1).clamp(min=1e-3)
        raw = steps + torch.log(-torch.expm1(-steps))  # the inverse of softplus
        center = center_index(model.quantile_levels)
        bias[:, :center], bias[:, center + 1 :] = raw[:, :center], raw[:, center:]
