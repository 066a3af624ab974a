"""The streaming network: the whole history in a memory of fixed size, a forecast at every step of the way.

A *situation* is what a forecast can be made from at a step: the last ``context_length`` steps and the calendar. It goes
through the blocks, reads their memories and writes nothing, so a forecast may be asked for at any step and changes no
later one. Every ``patch_length`` steps a situation is kept; when its *outcome*, the ``prediction_length`` steps that
followed it, has been seen, the two are written to the memories together. So each memory learns, of every series by
itself and as it goes, what follows what; the weights only say how to ask and what to make of the answers.

Let ``P`` be the patch length, ``L`` the context length and ``D`` the patches that cover a horizon. At token ``n``,
which is sealed when the steps ``[n P, (n + 1) P)`` are there, the outcome of the situation of token ``n - D`` is
written; the query of its place stands ``r < P`` steps later. A situation is normalised by the mean and standard
deviation of its own ``L`` steps, and so is its outcome, of which only what the linear skip did not foresee is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from trellis_ts.covariates import zeroed
from trellis_ts.datasets.cycles import num_features
from trellis_ts.distributions import NUM_PARAMETERS, shape_distribution
from trellis_ts.errors import ConfigError
from trellis_ts.heads import ForecastHead, center_index, spread_quantiles
from trellis_ts.layers.causal import CausalBlock, Outcomes
from trellis_ts.layers.clock import Clock
from trellis_ts.scaling import FARTHEST, ScaleState, running_statistics, window_statistics
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig, WindowShape
    from trellis_ts.distributions import Family
    from trellis_ts.layers.causal import CausalLayerState
    from trellis_ts.types import Segment


class CausalState(NamedTuple):
    """All the network carries from segment to segment, one row per series and channel."""

    layers: tuple[CausalLayerState, ...]
    scale: ScaleState

    def detach(self) -> CausalState:
        """The same numbers without their history."""
        return CausalState(tuple(each.detach() for each in self.layers), self.scale)


class _Reading(NamedTuple):
    """Windows as the network reads them, ``[row, place, context]``."""

    values: Tensor
    observed: Tensor
    loc: Tensor
    scale: Tensor


def check_streaming(config: ModelConfig, shape: WindowShape) -> None:
    """Refuses what the streaming network does not have.

    Raises:
        ConfigError: a setting that only the window model has.
    """
    read = shape.covariates
    for is_wrong, what, hint in (
        (config.mixer != "trellis", f"mixer={config.mixer}", "only trellis carries a state of fixed size"),
        (config.channel_mixing != "none", f"channel_mixing={config.channel_mixing}", "channels are forecast apart"),
        (config.chunk_length != 1, f"chunk_length={config.chunk_length}", "the memory is carried token by token"),
        (config.transform != "none", f"transform={config.transform}", "values are read as they are"),
        (not config.instance_norm, "instance_norm=false", "the running normalisation cannot be left out"),
        (
            shape.patch_stride != shape.patch_length,
            f"patch_stride={shape.patch_stride}",
            f"patches do not overlap; make it patch_length={shape.patch_length}",
        ),
        (
            read.has_past or read.has_static or read.known_numbers > 0 or len(read.known_categories) > 0,
            "covariates",
            "it reads the calendar only; leave them out",
        ),
    ):
        if is_wrong:
            raise ConfigError(f"{what} does not go with mode=streaming: {hint}")


class CausalModel(nn.Module):
    """Forecasts each channel by itself from a state that does not grow.

    Args:
        config: the network's settings.
        shape: the lengths and the number of channels it is built for.
        quantile_levels: as for ``ForecastModel``, and so are the rest.
        family: see there.
        implementation: see there.

    Raises:
        ConfigError: a setting that only the window model has.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: WindowShape,
        quantile_levels: tuple[float, ...] = (),
        *,
        family: Family | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        check_streaming(config, shape)
        self.config, self.shape, self.quantile_levels, self.family = config, shape, quantile_levels, family
        lead = shape.lead_patches
        cycles = shape.covariates.cycles
        self.clock = Clock(cycles, shape.season_length)
        self.situation = nn.Linear(shape.context_length + shape.patch_length, config.width)
        """Of a window and of which of its last ``patch_length`` steps were observed."""
        self.outcome = nn.Linear(shape.prediction_length, config.width, bias=False)
        self.blocks = nn.ModuleList(
            CausalBlock(config, lead, self.clock.size, implementation=implementation) for _ in range(config.num_layers)
        )
        self.head = ForecastHead(
            num_patches=1,
            width=config.width,
            prediction_length=shape.prediction_length,
            num_outputs=NUM_PARAMETERS[family] if family else max(1, len(quantile_levels)),
            pooling="last",
            dropout=config.dropout,
        )
        self.skip = zeroed(nn.Linear(shape.context_length, shape.prediction_length)) if config.linear_skip else None
        self.cycle = (
            nn.Parameter(torch.zeros(shape.season_length, shape.num_channels)) if config.seasonal_cycle else None
        )
        self.calendar = zeroed(nn.Linear(num_features(cycles), config.width)) if cycles else None

    def start(self, num_series: int) -> CausalState:
        """The state before the first step."""
        rows = num_series * self.shape.num_channels
        layers = tuple(block.mixer.start(rows) for block in self.blocks if isinstance(block, CausalBlock))
        return CausalState(layers, ScaleState.start(rows, self.situation.bias.detach()))

    def forward(
        self, segment: Segment, state: CausalState
    ) -> tuple[Forecast, Bool[Tensor, "place channel"], CausalState]:
        """Forecasts from the query of every token of a segment: ``[place, horizon, channel]``, places being those of
        the first series, then of the second, and so on.

        Returns:
            The forecasts on the scale of the segment; where the series had values enough to be forecast from (elsewhere
            they mean nothing); the state after the segment's last token.
        """
        num_series, num_tokens = segment.offsets.shape
        channels, older = self.shape.num_channels, self.shape.lead_patches * self.shape.patch_length
        # [R, D P + L + T + P - 1]; windows of what is recent begin after the first D P steps.
        steps, is_observed, season = _rows(segment.values), _rows(segment.observed), self._cycle(segment)
        values, observed = steps[:, older:], is_observed[:, older:]
        cycle = None if season is None else season[:, older:]
        ends = torch.arange(1, num_tokens + 1, device=segment.offsets.device) * self.shape.patch_length
        ends = torch.stack((ends.expand_as(segment.offsets), ends + segment.offsets), dim=1)  # [B, 2, N]

        tokens, floor, scale_state = self._read_tokens(values, observed, cycle, num_tokens, state.scale)
        queries = self._read_queries(
            values, observed, cycle, ends[:, 1].repeat_interleave(channels, dim=0), tokens, floor
        )
        outcomes = self._read_outcomes(steps, is_observed, season, num_tokens, floor)
        clocks, of_calendar = self._read_clocks(segment, ends)
        token_rows, query_rows = (torch.cat((self._embed(tokens), self._embed(queries)), dim=1) + of_calendar).chunk(
            2, dim=1
        )
        layers = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            token_rows, query_rows, layer = block.stream(  # type: ignore[operator]
                token_rows, query_rows, ~tokens.loc.isnan(), clocks, outcomes, layer_state
            )
            layers.append(layer)
        output = self.head(query_rows.flatten(0, 1)[:, None], queries.observed.new_ones(1, 1))  # [R * N, horizon, Q]
        added = None if self.skip is None else self.skip(queries.values.flatten(0, 1))
        return (
            self._finish(segment, output, added, queries),
            (~queries.loc.isnan()).view(num_series, channels, num_tokens).transpose(1, 2).flatten(0, 1),
            CausalState(tuple(layers), scale_state),
        )

    def _read_tokens(
        self, values: Tensor, observed: Tensor, cycle: Tensor | None, num_tokens: int, state: ScaleState
    ) -> tuple[_Reading, Float[Tensor, "row place"], ScaleState]:
        """The tokens' windows, the floor of the scale at each, and the state after the last."""
        patch, context = self.shape.patch_length, self.shape.context_length

        def cut(each: Tensor) -> Tensor:
            return each.unfold(1, context, patch)[:, 1 : num_tokens + 1]

        windows, mask = cut(values), cut(observed)
        loc, scale, floor, after = running_statistics(windows, mask, state, patch)
        reading = _normalised(windows, mask, loc, torch.maximum(scale, floor), None if cycle is None else cut(cycle))
        return reading, floor, after

    def _read_queries(
        self,
        values: Tensor,
        observed: Tensor,
        cycle: Tensor | None,
        places: Int[Tensor, "row place"],
        tokens: _Reading,
        floor: Tensor,
    ) -> _Reading:
        """The windows that end where the queries stand."""
        index = places[..., None] + torch.arange(self.shape.context_length, device=places.device)

        def cut(each: Tensor) -> Tensor:
            return each.gather(1, index.flatten(1)).view(index.shape)

        windows, mask = cut(values), cut(observed)
        loc, scale, found = window_statistics(windows, mask)
        loc = torch.where(found, loc, tokens.loc)
        scale = torch.where(found, torch.maximum(scale, floor), tokens.scale)
        return _normalised(windows, mask, loc, scale, None if cycle is None else cut(cycle))

    def _read_outcomes(
        self, values: Tensor, observed: Tensor, cycle: Tensor | None, num_tokens: int, floor: Tensor
    ) -> Outcomes:
        """At every token what followed the situation ``lead_patches`` before it, less what the skip made of that."""
        patch, context = self.shape.patch_length, self.shape.context_length

        def cut(each: Tensor) -> Tensor:
            return each.unfold(1, context + self.shape.prediction_length, patch)[:, 1 : num_tokens + 1]

        windows, mask = cut(values), cut(observed)
        loc, scale, found = window_statistics(windows[..., :context], mask[..., :context])
        loc, scale = torch.where(found, loc, torch.nan), torch.maximum(scale, floor)
        reading = _normalised(windows, mask, loc, scale, None if cycle is None else cut(cycle))
        mask, followed = mask[..., context:], reading.values[..., context:]
        if self.skip is not None:
            followed = torch.where(mask, followed - self.skip(reading.values[..., :context]), 0.0)
        # Far from what was expected counts by its logarithm: one outlier does not overwrite what was learned.
        return Outcomes(self.outcome(followed.asinh()).to(values.dtype), found & (scale > 0) & mask.any(dim=-1))

    def _read_clocks(
        self, segment: Segment, ends: Int[Tensor, "batch 2 token"]
    ) -> tuple[Float[Tensor, "row place clock"], Float[Tensor, "row place width"] | float]:
        """The clocks of all tokens, then of all queries, and what the calendar adds to their rows."""
        channels, ends = self.shape.num_channels, ends.flatten(1)
        calendar, added = None, None
        if self.calendar is not None and segment.calendar is not None:
            index = (ends - 1)[..., None].expand(-1, -1, segment.calendar.shape[-1])
            calendar = segment.calendar.to(segment.values.dtype).gather(1, index)
            added = self.calendar(calendar).repeat_interleave(channels, dim=0)
        steps = segment.phase[:, None] + self.shape.history_length + ends
        clocks = self.clock.features(calendar, steps, segment.values.dtype)
        return clocks.repeat_interleave(channels, dim=0), 0.0 if added is None else added

    def _embed(self, reading: _Reading) -> Float[Tensor, "row place width"]:
        mask = reading.observed[..., -self.shape.patch_length :]
        embedded: Tensor = self.situation(torch.cat((reading.values, mask.to(reading.values.dtype)), dim=-1))
        return embedded.to(reading.values.dtype)

    def _finish(self, segment: Segment, output: Tensor, added: Tensor | None, queries: _Reading) -> Forecast:
        """From the head's output ``[row * place, horizon, output]`` to the forecast on the segment's scale."""
        num_series, num_tokens = segment.offsets.shape
        if self.family is None and self.quantile_levels:
            output = spread_quantiles(output, center_index(self.quantile_levels))
        num_moved = 1 if self.family else output.shape[-1]
        location, rest = output[..., :num_moved], output[..., num_moved:]
        if added is not None:
            location = location + added[..., None]

        def by_place(each: Tensor) -> Tensor:
            """``[row * place, ...]`` to ``[place, ..., channel]``, the channel where the window model has it."""
            return (
                each.view(num_series, self.shape.num_channels, num_tokens, *each.shape[1:])
                .transpose(1, 2)
                .flatten(0, 1)
            )

        location, rest = by_place(location).transpose(1, 2), by_place(rest).transpose(1, 2)  # [B * N, horizon, C, Q]
        loc, scale = (
            by_place(each.flatten())[:, None] for each in (queries.loc.nan_to_num(), queries.scale.nan_to_num())
        )
        if (future_cycle := self._future_cycle(segment)) is not None:
            location = location + future_cycle[..., None]
        location = location * scale[..., None] + loc[..., None]
        if self.family is not None:
            units = None
            if segment.loc is not None and segment.scale is not None:
                units = tuple(each.repeat_interleave(num_tokens, dim=0) for each in (segment.loc, segment.scale))
            distribution = shape_distribution(self.family, location[..., 0], rest, scale, units)  # type: ignore[arg-type]
            return Forecast(point=distribution.mean.to(location.dtype), distribution=distribution)
        if not self.quantile_levels:
            return Forecast(point=location[..., 0])
        center = center_index(self.quantile_levels)
        return Forecast(point=location[..., center], quantiles=location, quantile_levels=self.quantile_levels)

    def _cycle(self, segment: Segment) -> Float[Tensor, "row step"] | None:
        """The learned season under every step of the segment, one row per series and channel."""
        if self.cycle is None:
            return None
        steps = torch.arange(segment.values.shape[1], device=segment.phase.device)
        return _rows(self.cycle[(segment.phase[:, None] + steps) % self.shape.season_length])

    def _future_cycle(self, segment: Segment) -> Float[Tensor, "place horizon channel"] | None:
        if self.cycle is None:
            return None
        num_tokens, device = segment.offsets.shape[1], segment.phase.device
        ends = torch.arange(1, num_tokens + 1, device=device) * self.shape.patch_length + self.shape.history_length
        steps = (segment.phase[:, None] + ends + segment.offsets).flatten()[:, None]
        horizon = torch.arange(self.shape.prediction_length, device=device)
        return self.cycle[(steps + horizon) % self.shape.season_length]


def _rows(each: Float[Tensor, "batch step channel"]) -> Float[Tensor, "row step"]:
    """One row per series and channel."""
    return each.transpose(1, 2).flatten(0, 1)


def _normalised(windows: Tensor, mask: Tensor, loc: Tensor, scale: Tensor, cycle: Tensor | None) -> _Reading:
    """The windows without location, scale and season; 0 where missing, and all 0 before there is a location."""
    divisor = torch.where(scale > 0, scale, 1.0)
    values = ((windows - loc[..., None]) / divisor[..., None]).clamp(-FARTHEST, FARTHEST)
    if cycle is not None:
        values = values - cycle
    return _Reading(torch.where(mask & ~loc.isnan()[..., None], values, 0.0), mask, loc, scale)
