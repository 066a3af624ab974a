"""Channels tell each other what they know: a Trellis memory read along the channels instead of along time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from trellis_ts.covariates import zeroed
from trellis_ts.layers.block import Block
from trellis_ts.layers.trellis import TrellisMixer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig


class BothDirections(nn.Module):
    """The sum of one Trellis mixer's readings from the first channel to the last and from the last to the first.

    So every channel reads every other at a cost linear in their number. A memory depends on the order it is written in:
    channels come in the order of the training table's columns. There is no convolution, for which neighbours would have
    to mean something.
    """

    def __init__(self, config: ModelConfig, *, implementation: Implementation = "auto") -> None:
        super().__init__()
        self.mixer = TrellisMixer(replace(config, conv_width=1), implementation=implementation)

    def forward(
        self, tokens: Float[Tensor, "row channel width"], observed: Bool[Tensor, "row channel"]
    ) -> Float[Tensor, "row channel width"]:
        both = torch.cat((tokens, tokens.flip(1)))
        forward, backward = self.mixer(both, torch.cat((observed, observed.flip(1)))).chunk(2)
        mixed: Tensor = forward + backward.flip(1)
        return mixed


class ChannelMixing(nn.Module):
    """One residual block across the channels, at each patch position by itself.

    A learned vector tells each channel from the others. It and the block's two branches start at zero, so training
    starts from channels that are forecast each by itself. A channel without an observed step is not read by others.
    """

    def __init__(self, config: ModelConfig, num_channels: int, *, implementation: Implementation = "auto") -> None:
        super().__init__()
        self.identity = nn.Parameter(torch.zeros(num_channels, config.width))
        self.block = Block(config, BothDirections(config, implementation=implementation))
        zeroed(self.block.output)
        zeroed(self.block.feedforward.down)

    def forward(
        self, tokens: Float[Tensor, "row patch width"], observed: Bool[Tensor, "batch channel"]
    ) -> Float[Tensor, "row patch width"]:
        """Rows are the channels of one window after another."""
        batch, num_channels = observed.shape
        num_patches, width = tokens.shape[1:]
        across = tokens.view(batch, num_channels, num_patches, width).transpose(1, 2).flatten(0, 1)  # [B * N, C, W]
        mixed: Tensor = self.block(across + self.identity, observed.repeat_interleave(num_patches, dim=0))
        return mixed.view(batch, num_patches, num_channels, width).transpose(1, 2).flatten(0, 1)
