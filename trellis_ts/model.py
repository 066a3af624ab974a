"""The forecaster's network: scale, patch, blocks, head, unscale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from trellis_ts.config import CovariateShape
from trellis_ts.covariates import CovariateEmbedding, zeroed
from trellis_ts.distributions import NUM_PARAMETERS, shape_distribution
from trellis_ts.heads import ForecastHead, center_index, spread_quantiles
from trellis_ts.layers.block import Block, make_mixer
from trellis_ts.layers.channels import ChannelMixing
from trellis_ts.patching import PatchEmbedding
from trellis_ts.scaling import instance_statistics, squash, unsquash
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig, WindowShape
    from trellis_ts.distributions import Family
    from trellis_ts.types import Batch


class ForecastModel(nn.Module):
    """Forecasts each channel by itself, all with the same weights (but for the seasonal cycle, one per channel).

    With ``channel_mixing`` channels tell each other what they know before the head. Covariates are shared by the
    channels of a window.

    Args:
        config: the network's settings.
        shape: the lengths and the number of channels it is built for.
        quantile_levels: what to forecast; empty for points only. A distribution's are those it shows.
        family: the distribution to forecast; None for quantiles or points.
        implementation: how the memory is computed; it changes no number.
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
        self.config, self.shape, self.quantile_levels, self.family = config, shape, quantile_levels, family
        self.patches = PatchEmbedding(shape, config.width, position_embedding=config.position_embedding)
        num_blocks = 0 if config.mixer == "none" else config.num_layers
        self.blocks = nn.ModuleList(Block(config, make_mixer(config, implementation)) for _ in range(num_blocks))
        num_outputs = NUM_PARAMETERS[family] if family else max(1, len(quantile_levels))
        self.head = ForecastHead(
            num_patches=shape.num_patches,
            width=config.width,
            prediction_length=shape.prediction_length,
            num_outputs=num_outputs,
            pooling=config.pooling,
            dropout=config.dropout,
        )
        self.skip = zeroed(nn.Linear(shape.context_length, shape.prediction_length)) if config.linear_skip else None
        self.cycle = (
            nn.Parameter(torch.zeros(shape.season_length, shape.num_channels)) if config.seasonal_cycle else None
        )
        # Made last, so that the other weights start alike with and without these.
        self.channels = (
            ChannelMixing(config, shape.num_channels, implementation=implementation)
            if config.channel_mixing == "trellis"
            else None
        )
        self.covariates = (
            CovariateEmbedding(shape, config.width, config.covariate_width, num_outputs)
            if shape.covariates != CovariateShape()
            else None
        )

    def forward(self, batch: Batch) -> Forecast:
        """Forecasts ``[batch, horizon, channel]`` on the scale of the batch."""
        context, observed = batch.context, batch.observed
        loc, scale = torch.zeros_like(context[:, :1]), torch.ones_like(context[:, :1])
        if self.config.instance_norm:
            loc, scale = instance_statistics(context, observed)
        past_cycle, future_cycle = self._cycle(batch.phase)
        context = ((context - loc) / scale - past_cycle) * observed
        if self.config.transform == "asinh":
            context = squash(context)

        rows = context.transpose(1, 2).flatten(0, 1)  # [B * C, L]
        tokens, token_observed = self.patches(rows, observed.transpose(1, 2).flatten(0, 1))
        if self.covariates is not None:
            tokens = tokens + self.covariates.tokens(batch).repeat_interleave(context.shape[2], dim=0)
        for block in self.blocks:
            tokens = block(tokens, token_observed)
        if self.channels is not None:
            tokens = self.channels(tokens, observed.any(dim=1))
        output = self.head(tokens, token_observed)  # [B * C, horizon, Q]
        if self.covariates is not None and (added := self.covariates.forecast(batch, tokens.mean(dim=1))) is not None:
            output = output + added

        if self.family is None and self.quantile_levels:
            output = spread_quantiles(output, center_index(self.quantile_levels))
        # Of a distribution only the location, which comes first, is moved; what shapes it stays as it is.
        num_moved = 1 if self.family else output.shape[-1]
        location, rest = output[..., :num_moved], output[..., num_moved:]
        if self.skip is not None:
            location = location + self.skip(rows)[..., None]
        location, rest = (self._by_channel(each, context.shape[0]) for each in (location, rest))  # [B, horizon, C, Q]
        if self.config.transform == "asinh":
            location = unsquash(location)
        location = (location + future_cycle[..., None]) * scale[..., None] + loc[..., None]
        if self.family is None:
            return self._quantile_forecast(location)
        units = None if batch.loc is None or batch.scale is None else (batch.loc, batch.scale)
        distribution = shape_distribution(self.family, location[..., 0], rest, scale, units)
        return Forecast(point=distribution.mean.to(location.dtype), distribution=distribution)

    def _by_channel(self, output: Tensor, batch: int) -> Float[Tensor, "batch horizon channel output"]:
        """From one row per channel."""
        return output.view(batch, self.shape.num_channels, *output.shape[1:]).transpose(1, 2)

    def _quantile_forecast(self, quantiles: Float[Tensor, "batch horizon channel quantile"]) -> Forecast:
        """Points where there are no levels."""
        if not self.quantile_levels:
            return Forecast(point=quantiles[..., 0])
        center = center_index(self.quantile_levels)
        return Forecast(point=quantiles[..., center], quantiles=quantiles, quantile_levels=self.quantile_levels)

    def _cycle(
        self, phase: Tensor
    ) -> tuple[Float[Tensor, "batch context channel"], Float[Tensor, "batch horizon channel"]]:
        """The learned season under the context and under the horizon, on the normalised scale; zeros without one."""
        context_length, horizon = self.shape.context_length, self.shape.prediction_length
        if self.cycle is None:
            zero = torch.zeros(1, 1, 1, device=phase.device)
            return zero, zero
        steps = torch.arange(context_length + horizon, device=phase.device)
        values = self.cycle[(phase[:, None] + steps) % self.shape.season_length]
        return values[:, :context_length], values[:, context_length:]
