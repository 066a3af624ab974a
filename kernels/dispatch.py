"""Which implementation of the memory runs a call, and why.

An implementation decides only *how* a call is computed: all of them give the same numbers, up to rounding. Under
``auto`` the first that can run the call is taken, judged by the ``Problem`` alone, so the same command takes the same
path every time. An implementation asked for by name runs or raises; nothing else is taken in its place.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trellis_ts.errors import BackendError
from trellis_ts.kernels.memory import launch
from trellis_ts.kernels.memory.chunked import chunked, why_not_chunked
from trellis_ts.kernels.memory.cpu import cpu, plan_cpu_step, why_not_cpu
from trellis_ts.kernels.memory.reference import reference
from trellis_ts.kernels.memory.types import MemoryState, Problem, Run, RunStep, Tokens

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "triton", "cpu", "chunked", "reference"]


@dataclass(frozen=True)
class Entry:
    """One implementation."""

    run: Run
    why_not: Callable[[Problem | None], str | None]
    """Why it cannot run a problem, as a clause ("the tensors are on cpu"), or None if it can.

    Asked with None for the problem: why this machine cannot run it at all.
    """
    plan_step: Callable[[Problem], RunStep] | None = None
    """What runs one token of a problem without gradients, if there is a shorter way to it than ``run``.

    It is kept for all further tokens of the same shapes, so whatever does not change from one to the next belongs here.
    """


def _why_not_reference(problem: Problem | None) -> None:
    """Give no reason: the definition runs everywhere, whatever the problem."""


def _plan_triton_step(problem: Problem) -> RunStep:
    def step(tokens: Tokens, state: MemoryState, inplace: bool) -> tuple[Tensor, MemoryState]:
        return launch.step(tokens, state, problem.options, inplace)

    return step


# In the order ``auto`` prefers them. The reference runs everything and comes last.
IMPLEMENTATIONS: dict[str, Entry] = {
    "triton": Entry(run=launch.run, why_not=launch.why_not, plan_step=_plan_triton_step),
    "cpu": Entry(run=cpu, why_not=why_not_cpu, plan_step=plan_cpu_step),
    "chunked": Entry(run=chunked, why_not=why_not_chunked),
    "reference": Entry(run=reference, why_not=_why_not_reference),
}

_logged: set[str] = set()


def implementations() -> dict[str, str | None]:
    """Return the name of every implementation, in order of preference, with why this machine cannot run it, or None."""
    return {name: entry.why_not(None) for name, entry in IMPLEMENTATIONS.items()}


def choose(implementation: Implementation, problem: Problem) -> str:
    """Return the name of the implementation that runs ``problem``; each distinct choice is logged once.

    Raises:
        BackendError: the implementation asked for does not exist or cannot run the problem.
    """
    reasons = {name: entry.why_not(problem) for name, entry in IMPLEMENTATIONS.items()}
    if implementation == "auto":
        chosen = next(name for name, reason in reasons.items() if reason is None)
    elif implementation not in reasons:
        known = ["auto", *reasons]
        near = difflib.get_close_matches(str(implementation), known, n=1, cutoff=0.0)[0]
        raise BackendError(
            f"implementation={implementation!r} is unknown; did you mean '{near}'? There are {', '.join(known)}"
        )
    elif reasons[implementation] is not None:
        able = ", ".join(f"'{name}'" for name, reason in reasons.items() if reason is None)
        raise BackendError(
            f"implementation='{implementation}' was asked for, but {reasons[implementation]}; use 'auto' or {able}"
        )
    else:
        chosen = implementation
    _log_once(chosen, problem, reasons)
    return chosen


def _log_once(chosen: str, problem: Problem, reasons: dict[str, str | None]) -> None:
    if torch.compiler.is_compiling():  # a log call would break the graph
        return
    dtype = str(problem.dtype).removeprefix("torch.")
    unable = "".join(f"; not '{name}': {reason}" for name, reason in reasons.items() if reason is not None)
    message = f"memory on {problem.device.type} in {dtype}: '{chosen}'{unable}"
    if message not in _logged:
        _logged.add(message)
        logger.info("%s", message)
