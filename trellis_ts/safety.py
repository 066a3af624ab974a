"""Losses and gradients that are not finite: the step is left out, the batch is named, and too many end the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trellis_ts.errors import TrellisError
from trellis_ts.types import Batch, Features, Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from trellis_ts.types import Panel

MOST_IN_A_ROW = 10
"""Steps left out one after the other that end the training."""
_MOST_NOTED = 20


class Problem(NamedTuple):
    """A step that was left out."""

    batch: Batch | Segment
    what: str
    """``loss`` or ``gradient``."""


class StepGuard:
    """Counts the steps that are left out because their loss or gradient is not finite.

    Args:
        panel: the series, which a line names; None for numbers in the place of names.
        tell: hears one line per step left out, for the first few.
    """

    def __init__(self, panel: Panel | None, tell: Callable[[str], None]) -> None:
        self._panel, self._tell = panel, tell
        self.num_left_out = self.num_in_a_row = 0

    @property
    def has_given_up(self) -> bool:
        """Whether too many were left out one after the other."""
        return self.num_in_a_row >= MOST_IN_A_ROW

    def passed(self) -> None:
        """A step was taken."""
        self.num_in_a_row = 0

    def left_out(self, problem: Problem, step: int) -> None:
        """A step was not."""
        self.num_left_out += 1
        self.num_in_a_row += 1
        if self.num_left_out <= _MOST_NOTED:
            self._tell(
                f"step {step}: the {problem.what} is not finite, so the step is left out; "
                f"{describe_batch(problem.batch, self._panel)}"
            )


def describe_batch(batch: Batch | Segment, panel: Panel | None) -> str:
    """The window of a batch that is to blame, if one holds numbers that are not finite; else where the batch lies."""
    finite = torch.ones(len(batch.phase), dtype=torch.bool)
    for part in _tensors(batch):
        if part.is_floating_point() and len(part) == len(finite):
            finite &= part.detach().isfinite().flatten(1).all(dim=1).cpu() if part.ndim > 1 else part.isfinite().cpu()
    blamed = (~finite).nonzero().flatten().tolist()
    places = [_place(batch, index, panel) for index in (blamed or range(len(finite)))[:3]]
    kind = "windows" if isinstance(batch, Batch) else "stretches"
    more = f" and {len(finite) - len(places)} more" if len(finite) > len(places) and not blamed else ""
    return f"{'not finite in its batch' if blamed else 'its batch'}: {kind} of {'; of '.join(places)}{more}"


def _tensors(batch: Batch | Segment) -> Iterator[Tensor]:
    for part in batch:
        if isinstance(part, Features):
            yield from part
        elif isinstance(part, torch.Tensor):
            yield part


def _place(batch: Batch | Segment, index: int, panel: Panel | None) -> str:
    if batch.series is None or batch.origin is None:
        return f"place {index}"
    number, row = int(batch.series[index]), int(batch.origin[index])
    if panel is None:
        return f"series {number} at row {row}"
    series = panel.series[number]
    stamp = str(series.time[min(max(row, 0), len(series) - 1)].astype("datetime64[s]"))
    return f"{f'series {series.name!r}' if series.name else 'the series'} at {stamp}"


class AnomalyFinder:
    """Ends a training at the first number that is not finite, and names the layer it comes from.

    Forward, layers are looked at as they finish, inner ones first; backward, weights as their gradients arrive, those
    nearest to the loss first.
    """

    def __init__(self, model: nn.Module, panel: Panel | None) -> None:
        self._panel = panel
        self.batch: Batch | Segment | None = None
        self._handles = [
            *(module.register_forward_hook(self._forward_hook(name)) for name, module in model.named_modules() if name),
            *(
                each.register_hook(self._gradient_hook(name))  # type: ignore[no-untyped-call]
                for name, each in model.named_parameters()
            ),
        ]

    def remove(self) -> None:
        """Lets the model go as it was."""
        for handle in self._handles:
            handle.remove()

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
                self._found(f"the output of layer '{name}' ({type(module).__name__})")

        return look

    def _gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                self._found(f"the gradient of '{name}'")

        return look

    def _found(self, where: str) -> None:
        batch = "" if self.batch is None else f"; {describe_batch(self.batch, self._panel)}"
        raise TrellisError(f"--detect-anomaly: {where} is the first that is not finite{batch}")
