"""The streaming network for one step of many series at once, in NumPy.

The same numbers as ``CausalModel`` gives, up to rounding. That one is made for long stretches and gradients; a single
step of a single series is mostly the cost of calling operators, of which this makes as few as it can: weights of
normalisations go into the matrices behind them, and projections that read the same features are one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import erf
from torch import nn

from trellis_ts.heads import center_index
from trellis_ts.kernels import MemoryState, precompile, trellis_memory_step
from trellis_ts.layers.causal import CausalBlock
from trellis_ts.scaling import FARTHEST, FLOOR_CONTEXTS, LEAST_OBSERVED, ROUNDING, SCALE_FLOOR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trellis_ts.causal import CausalModel
    from trellis_ts.config import ModelConfig

    Array = NDArray[np.floating[Any]]

_UNIT_EPSILON = 1e-6
_READ_EPSILON = 1e-6
DRIFT_RATE = 0.05
"""Share of the newest token in the averages that show drift."""


@dataclass(eq=False)
class Rows:
    """What the network carries for each series and channel (row): arrays whose first axis is the row."""

    window: NDArray[np.float64]
    """``[row, history]``: the last steps, NaN where missing."""
    scale: NDArray[np.float64]
    """``[row, 3]``: location and scale last found, NaN before the first, and the largest scale, slowly forgotten."""
    memory: Array
    """``[row, layer, 2, head, slot, dim]``: key memories and value memories."""
    waiting: Array
    """``[row, layer, lead, feature]``: the last situations with their clocks, whose outcomes are not known yet."""
    drift: NDArray[np.float64]
    """``[row, 2]``: the mean forget gate and the relative size of the writes, each averaged over the last tokens."""

    def of(self, rows: NDArray[np.int64] | slice) -> Rows:
        """Some rows: views for a slice, copies for an index."""
        return Rows(self.window[rows], self.scale[rows], self.memory[rows], self.waiting[rows], self.drift[rows])

    def put(self, rows: NDArray[np.int64], part: Rows) -> None:
        """Writes copies back."""
        for name, value in vars(part).items():
            getattr(self, name)[rows] = value


@dataclass(frozen=True, eq=False)
class _Layer:
    """A block's weights, transposed, with the weights of the normalisations in them."""

    ask: Array
    """Gate and query of a situation's features; the clock is read by ``ask_clock`` alone."""
    ask_clock: Array
    key: Array
    """Key of a situation with its clock."""
    write: Array
    """Value, target and gates of a situation and its outcome."""
    gate_bias: Array
    output: Array
    gate_up: Array
    down: Array


class Engine:
    """Seals patches and answers queries with a model's weights.

    Args:
        model: the network; its weights are copied.
        dtype: of the arithmetic; float64 serves tests.
    """

    def __init__(self, model: CausalModel, dtype: type[np.floating[Any]] = np.float32) -> None:
        self.config: ModelConfig = model.config
        self.shape, self.levels, self.family = model.shape, model.quantile_levels, model.family
        self.dtype = dtype
        self.torch_dtype = torch.float64 if dtype is np.float64 else torch.float32
        self.patch, self.context = model.shape.patch_length, model.shape.context_length
        self.history = model.shape.history_length
        self.num_heads, self.width = self.config.num_heads, self.config.width
        self.layers = [self._layer(block) for block in model.blocks if isinstance(block, CausalBlock)]
        self.clock = model.clock
        self.situation, self.situation_bias = self._matrix(model.situation), self._vector(model.situation.bias)
        self.outcome = self._matrix(model.outcome)
        self.calendar = None if model.calendar is None else self._matrix(model.calendar)
        self.calendar_bias: Array | float = 0.0 if model.calendar is None else self._vector(model.calendar.bias)
        self.head = self._vector(model.head.norm.weight)[:, None] * self._matrix(model.head.projection)
        self.head_bias = self._vector(model.head.projection.bias)
        self.skip = None if model.skip is None else self._matrix(model.skip)
        self.skip_bias: Array | float = 0.0 if model.skip is None else self._vector(model.skip.bias)
        self.cycle = None if model.cycle is None else model.cycle.detach().double().numpy()
        start = model.start(1)
        self._start_memory = np.stack(
            [np.stack([self._vector(each)[0] for each in layer.memory]) for layer in start.layers]
        )
        self._waiting_shape = (len(self.layers), *start.layers[0].waiting.shape[1:])
        self._decay = 2.0 ** (-self.patch / (FLOOR_CONTEXTS * self.context))
        if self.layers:
            precompile(self.torch_dtype, step=True)  # on the first run on a machine, before a patch waits for it

    def start(self, num_rows: int) -> Rows:
        """Rows before their first step."""
        scale = np.full((num_rows, 3), np.nan)
        scale[:, 2] = 0.0
        return Rows(
            window=np.full((num_rows, self.history), np.nan),
            scale=scale,
            memory=np.repeat(self._start_memory[None], num_rows, axis=0),
            waiting=np.zeros((num_rows, *self._waiting_shape), dtype=self.dtype),
            drift=np.full((num_rows, 2), np.nan),
        )

    def seal(self, rows: Rows, calendar: Array | None, phase: NDArray[np.int64]) -> None:
        """Writes the outcome that has become known to the memories, and keeps the situation at the end of the windows;
        the rows are changed in place.

        Args:
            rows: their windows end with a patch.
            calendar: ``[row, feature]`` of the last step, for a model that reads it.
            phase: ``[row]``, position in the season of the step after the last.
        """
        window = rows.window[:, -self.context :]
        observed = ~np.isnan(window)
        loc, scale, found = self._statistics(window, observed)
        rows.scale[found, 0], rows.scale[found, 1] = loc[found], scale[found]
        rows.scale[:, 2] *= self._decay
        rows.scale[found, 2] = np.maximum(rows.scale[found, 2], scale[found])
        floor = SCALE_FLOOR * rows.scale[:, 2]
        loc, scale = rows.scale[:, 0], np.maximum(rows.scale[:, 1], floor)
        values = self._normalised(window, observed, loc, scale, phase)
        situations, clock = self._embed(values, observed, calendar), self._clock(calendar, phase)
        outcomes, is_known = self._outcomes(rows, floor, phase)
        is_started = ~np.isnan(loc)[:, None]
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            normed = self._unit_rms(situations)
            self._write(rows, number, layer, outcomes, is_known)
            waiting = np.hstack((normed, clock)) * is_started
            rows.waiting[:, number] = np.concatenate((rows.waiting[:, number, 1:], waiting[:, None]), axis=1)
            if number < last:
                situations = self._read(rows, number, layer, situations, normed, clock)

    def rest(self, rows: Rows, patches: int) -> None:
        """Seals so many patches without a value, of rows whose windows hold none any more."""
        rows.scale[:, 2] *= self._decay**patches

    def ask(
        self, rows: Rows, calendar: Array | None, phase: NDArray[np.int64]
    ) -> tuple[Array, NDArray[np.float64], NDArray[np.float64]]:
        """The forecast from the end of the windows: ``[row, horizon, output]`` on the normalised scale, location and
        scale (NaN where there were too few values). Nothing is changed.

        Args:
            rows: as they are.
            calendar: as for ``seal``.
            phase: as for ``seal``.
        """
        window = rows.window[:, -self.context :]
        observed = ~np.isnan(window)
        loc, scale, found = self._statistics(window, observed)
        if not found.all():
            loc = np.where(found, loc, rows.scale[:, 0])
            scale = np.where(found, scale, rows.scale[:, 1])
        scale = np.maximum(scale, SCALE_FLOOR * rows.scale[:, 2])
        values = self._normalised(window, observed, loc, scale, phase)
        queries, clock = self._embed(values, observed, calendar), self._clock(calendar, phase)
        for number, layer in enumerate(self.layers):
            queries = self._read(rows, number, layer, queries, self._unit_rms(queries), clock)
        flat = self._unit_rms(queries) @ self.head + self.head_bias
        output: Array = flat.reshape(len(flat), self.shape.prediction_length, -1)
        if self.family is None and self.levels:
            output = _spread(output, center_index(self.levels))
        moved = slice(0, 1) if self.family else slice(None)
        if self.skip is not None:
            output[..., moved] += (values @ self.skip + self.skip_bias)[..., None]
        if self.cycle is not None:
            steps = phase[:, None] + np.arange(self.shape.prediction_length)
            output[..., moved] += self._cycle_at(steps).astype(self.dtype)[..., None]
        return output, loc, scale

    def _layer(self, block: CausalBlock) -> _Layer:
        mixer, width = block.mixer, self.width
        before = self._vector(block.mixer_norm.weight)[:, None]
        query, key = self._matrix(mixer.query), self._matrix(mixer.key)
        write = np.hstack([self._matrix(each) for each in (mixer.value, mixer.target, mixer.gates)])
        return _Layer(
            ask=before * np.hstack((self._matrix(block.gate), query[:width])),
            ask_clock=query[width:],
            key=np.vstack((before * key[:width], key[width:])),
            write=np.vstack((before * write[:width], write[width:])),
            gate_bias=self._vector(mixer.gates.bias),
            output=self._matrix(block.output),
            gate_up=self._vector(block.feedforward_norm.weight)[:, None] * self._matrix(block.feedforward.gate_up),
            down=self._matrix(block.feedforward.down),
        )

    def _vector(self, tensor: torch.Tensor) -> Array:
        array: Array = tensor.detach().cpu().numpy().astype(self.dtype)
        return array

    def _matrix(self, linear: nn.Linear) -> Array:
        """A linear map as what multiplies rows from the right."""
        return np.ascontiguousarray(self._vector(linear.weight).T)

    def _statistics(
        self, window: NDArray[np.float64], observed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
        """As ``window_statistics``."""
        if observed.all():
            count: Any = window.shape[1]
            deviation = window - (loc := window.sum(axis=1) / count)[:, None]
        else:
            count = observed.sum(axis=1)
            divisor = np.maximum(count, 1)
            loc = np.where(observed, window, 0.0).sum(axis=1) / divisor
            deviation = np.where(observed, window - loc[:, None], 0.0)
        scale = np.sqrt(np.einsum("rt,rt->r", deviation, deviation) / np.maximum(count, 1))
        scale[scale <= ROUNDING * np.finfo(np.float64).eps * np.abs(loc)] = 0.0
        return loc, scale, np.broadcast_to(count >= min(LEAST_OBSERVED, self.context), loc.shape)

    def _normalised(
        self,
        window: NDArray[np.float64],
        observed: NDArray[np.bool_],
        loc: NDArray[np.float64],
        scale: NDArray[np.float64],
        phase: NDArray[np.int64],
    ) -> Array:
        """The window without location, scale and season; 0 where missing. ``phase`` is that of the step after it."""
        divisor = np.where(scale > 0, scale, 1.0)[:, None]
        values = np.clip((window - loc[:, None]) / divisor, -FARTHEST, FARTHEST)
        if self.cycle is not None:
            values -= self._cycle_at(phase[:, None] + np.arange(-window.shape[1], 0))
        is_missing = ~observed | np.isnan(loc)[:, None]
        if is_missing.any():
            values[is_missing] = 0.0
        return values.astype(self.dtype)

    def _outcomes(
        self, rows: Rows, floor: NDArray[np.float64], phase: NDArray[np.int64]
    ) -> tuple[Array, NDArray[np.bool_]]:
        """What followed the situation at the start of the windows, less what the skip made of it, and whether it is
        known."""
        horizon = self.shape.prediction_length
        end = self.context + horizon
        window = rows.window[:, :end]
        observed = ~np.isnan(window)
        loc, scale, found = self._statistics(window[:, : self.context], observed[:, : self.context])
        loc, scale = np.where(found, loc, np.nan), np.maximum(scale, floor)
        values = self._normalised(window, observed, loc, scale, phase - (self.history - end))
        followed = values[:, self.context :]
        if self.skip is not None:
            expected = values[:, : self.context] @ self.skip + self.skip_bias
            followed = np.where(observed[:, self.context :], followed - expected, 0)
        return np.arcsinh(followed) @ self.outcome, found & (scale > 0) & observed[:, self.context :].any(axis=1)

    def _clock(self, calendar: Array | None, phase: NDArray[np.int64]) -> Array:
        """As ``Clock.features``."""
        clock = self.clock
        places = phase[:, None] * np.arange(1, clock.num_waves + 1) % clock.season_length
        angles = (2 * math.pi / clock.season_length) * places
        parts = [np.sin(angles), np.cos(angles)]
        if clock.num_calendar and calendar is not None:
            parts = [calendar, calendar[:, clock.factors[0]] * calendar[:, clock.factors[1]], *parts]
        return np.concatenate(parts, axis=1).astype(self.dtype)

    def _cycle_at(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """``[row, step]``: the learned season of each row's channel, channels being the inner part of the rows."""
        if self.cycle is None:
            raise AssertionError("a model without a season")
        channel = np.arange(len(steps)) % self.shape.num_channels
        return self.cycle[steps % self.shape.season_length, channel[:, None]]

    def _embed(self, values: Array, observed: NDArray[np.bool_], calendar: Array | None) -> Array:
        read = np.concatenate((values, observed[:, -self.patch :].astype(self.dtype)), axis=1)
        rows: Array = read @ self.situation + self.situation_bias
        if self.calendar is not None and calendar is not None:
            rows += calendar.astype(self.dtype) @ self.calendar + self.calendar_bias
        return rows

    def _unit_rms(self, rows: Array) -> Array:
        """RMSNorm without its weight."""
        square = np.einsum("rw,rw->r", rows, rows)
        normed: Array = rows * (1.0 / np.sqrt(square / self.width + np.finfo(self.dtype).eps))[:, None].astype(
            self.dtype
        )
        return normed

    def _unit_heads(self, features: Array, epsilon: float = _UNIT_EPSILON) -> Array:
        heads = features.reshape(len(features), self.num_heads, -1)
        square = np.einsum("rhd,rhd->rh", heads, heads)
        unit: Array = heads * (1.0 / np.sqrt(square + epsilon)).astype(self.dtype)[..., None]
        return unit

    def _write(self, rows: Rows, number: int, layer: _Layer, outcomes: Array, is_known: NDArray[np.bool_]) -> None:
        """Writes the outcomes of the situations that waited longest to one layer's memory."""
        width, heads, slots = self.width, self.num_heads, self.config.num_slots
        situations = rows.waiting[:, number, 0]
        is_written = is_known & situations.any(axis=1)
        episodes = np.hstack((situations[:, :width], outcomes)) @ layer.write
        value, target, gates = np.split(episodes, (width, width + heads * slots), axis=1)
        log_forget, step_size = self._gates(gates + layer.gate_bias)
        before, present = rows.memory[:, number], is_written[:, None].astype(self.dtype)
        key = self._unit_heads(situations @ layer.key)

        def tensor(array: Array) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=self.dtype))

        with torch.inference_mode():
            _, after = trellis_memory_step(
                query=tensor(key),  # what this reads is not used
                key=tensor(key),
                value=tensor(self._unit_heads(value, epsilon=1.0)),
                target=tensor(target.reshape(len(target), heads, slots)),
                log_forget=tensor(log_forget * present),
                step_size=tensor(step_size * present),
                state=MemoryState(tensor(before[:, 0]), tensor(before[:, 1])),
                write_activation=self.config.write_activation,
                read_activation=self.config.read_activation,
                write_epsilon=self.config.write_epsilon,
            )
        new = np.stack([each.numpy() for each in after], axis=1)
        self._note_drift(rows, number, before, new, np.exp(log_forget), is_written)
        rows.memory[:, number] = new

    def _read(self, rows: Rows, number: int, layer: _Layer, situations: Array, normed: Array, clock: Array) -> Array:
        """One block for a situation of each row."""
        projected = normed @ layer.ask
        query = self._unit_heads(projected[:, self.width :] + clock @ layer.ask_clock)
        memory = rows.memory[:, number]
        slots = (memory[:, 0] @ query[..., None])[..., 0]  # [R, H, M]
        read = self._activated(slots)[:, :, None] @ memory[:, 1]  # [R, H, 1, D]
        return self._rest(layer, situations, read.reshape(len(normed), self.width), projected[:, : self.width])

    def _rest(self, layer: _Layer, residual: Array, mixed: Array, gate: Array) -> Array:
        """What follows the memory in a block."""
        if self.config.output_activation == "silu":
            mixed = _silu(mixed)
        opened = gate * (1 + erf(gate * self.dtype(math.sqrt(0.5)))) * self.dtype(0.5)
        residual = residual + (mixed * opened) @ layer.output
        hidden = self._unit_rms(residual) @ layer.gate_up
        half = hidden.shape[1] // 2
        added: Array = residual + (_silu(hidden[:, :half]) * hidden[:, half:]) @ layer.down
        return added

    def _gates(self, gates: Array) -> tuple[Array, Array]:
        """Log-forget and step size ``[row, head]``."""
        step = gates[:, -self.num_heads :]
        log_forget = -np.logaddexp(0, -gates[:, : self.num_heads]) if self.config.forget_gate else np.zeros_like(step)
        if self.config.step_size_form == "bounded":
            return log_forget, (1 + np.exp(log_forget)) / (1 + np.exp(-step))
        return log_forget, np.logaddexp(0, step)

    def _activated(self, slots: Array) -> Array:
        """``f`` between the key pass and the value pass."""
        if self.config.read_activation == "softmax":
            exponentials: Array = np.exp(slots - slots.max(axis=-1, keepdims=True))
            exponentials /= exponentials.sum(axis=-1, keepdims=True)
            return exponentials
        values = _silu(slots)
        if self.config.read_activation == "l2_silu":
            square = np.einsum("rhm,rhm->rh", values, values)
            values *= (1 / np.sqrt(square + _READ_EPSILON)).astype(self.dtype)[..., None]
            return values
        values -= (values.sum(axis=-1) / self.dtype(values.shape[-1]))[..., None]
        variance = np.einsum("rhm,rhm->rh", values, values) / values.shape[-1]
        values *= (1 / np.sqrt(variance + _READ_EPSILON)).astype(self.dtype)[..., None]
        return values

    def _note_drift(
        self, rows: Rows, number: int, before: Array, after: Array, forget: Array, is_written: NDArray[np.bool_]
    ) -> None:
        """Averages the forget gate, and the size of the writes relative to the memory, over layers and tokens."""
        written = after - before * forget[:, None, :, None, None]
        size = np.sqrt(np.einsum("rphmd,rphmd->r", written, written))
        held = np.sqrt(np.einsum("rphmd,rphmd->r", after, after))
        seen = np.stack((forget.mean(axis=1), size / np.maximum(held, 1e-12)), axis=1)
        rate = DRIFT_RATE / len(self.layers)
        moved = np.where(np.isnan(rows.drift), seen, rows.drift + rate * (seen - rows.drift))
        rows.drift[is_written] = moved[is_written]


def _silu(array: Array) -> Array:
    result: Array = array / (1 + np.exp(-array))
    return result


def _spread(raw: Array, center: int) -> Array:
    """As ``spread_quantiles``."""
    steps = np.maximum(raw, 0) + np.log(1 + np.exp(-np.abs(raw)))
    result = np.empty_like(raw)
    result[..., center] = raw[..., center]
    np.cumsum(steps[..., center + 1 :], axis=-1, out=result[..., center + 1 :])
    result[..., center + 1 :] += raw[..., center : center + 1]
    below = np.cumsum(steps[..., :center][..., ::-1], axis=-1)[..., ::-1]
    result[..., :center] = raw[..., center : center + 1] - below
    return result
