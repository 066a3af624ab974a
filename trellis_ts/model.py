"""The forecaster's network: scale, patch, blocks, head, unscale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from trellis_ts.config import CovariateShape
from trellis_ts.covariates import CovariateEmbedding, zeroed
from trellis_ts.heads import ForecastHead, center_index, spread_quantiles
from trellis_ts.layers.block import Block
from trellis_ts.patching import PatchEmbedding
from trellis_ts.scaling import instance_statistics
from trellis_ts.types import Forecast

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig, WindowShape
    from trellis_ts.types import Batch


class ForecastModel(nn.Module):
    """Forecasts each channel by itself, all with the same weights (but for the seasonal cycle, one per channel).

    Covariates are shared by the channels of a window.

    Args:
        config: the network's settings.
        shape: the lengths and the number of channels it is built for.
        quantile_levels: what to forecast; empty for points only.
        implementation: how the memory is computed; it changes no number.
    """

    def __init__(
        self,
        config: ModelConfig,
        shape: WindowShape,
        quantile_levels: tuple[float, ...] = (),
        *,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        self.config, self.shape, self.quantile_levels = config, shape, quantile_levels
        self.patches = PatchEmbedding(shape, config.width, position_embedding=config.position_embedding)
        self.blocks = nn.ModuleList(Block(config, implementation=implementation) for _ in range(config.num_layers))
        self.head = ForecastHead(
            num_patches=shape.num_patches,
            width=config.width,
            prediction_length=shape.prediction_length,
            num_outputs=max(1, len(quantile_levels)),
            pooling=config.pooling,
            dropout=config.dropout,
        )
        self.skip = zeroed(nn.Linear(shape.context_length, shape.prediction_length)) if config.linear_skip else None
        self.cycle = (
            nn.Parameter(torch.zeros(shape.season_length, shape.num_channels)) if config.seasonal_cycle else None
        )
        # Made last, so that the other weights start alike with and without covariates.
        self.covariates = (
            CovariateEmbedding(shape, config.width, config.covariate_width, max(1, len(quantile_levels)))
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

        rows = context.transpose(1, 2).flatten(0, 1)  # [B * C, L]
        tokens, token_observed = self.patches(rows, observed.transpose(1, 2).flatten(0, 1))
        if self.covariates is not None:
            tokens = tokens + self.covariates.tokens(batch).repeat_interleave(context.shape[2], dim=0)
        for block in self.blocks:
            tokens = block(tokens, token_observed)
        output = self.head(tokens, token_observed)  # [B * C, horizon, Q]
        if self.covariates is not None and (added := self.covariates.forecast(batch, tokens.mean(dim=1))) is not None:
            output = output + added

        center = center_index(self.quantile_levels) if self.quantile_levels else 0
        if self.quantile_levels:
            output = spread_quantiles(output, center)
        if self.skip is not None:
            output = output + self.skip(rows)[..., None]
        output = output.view(len(context), -1, *output.shape[1:]).transpose(1, 2)  # [B, horizon, C, Q]
        output = (output + future_cycle[..., None]) * scale[..., None] + loc[..., None]
        return Forecast(
            point=output[..., center],
            quantiles=output if self.quantile_levels else None,
            quantile_levels=self.quantile_levels,
        )

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
