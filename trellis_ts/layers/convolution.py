"""The short causal depthwise convolution on queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class CausalConvolution(nn.Module):
    """Mixes each feature with its own last ``kernel_width`` tokens, and starts as the identity.

    Written as shifted multiply-adds: on a CPU that is about four times faster than a depthwise ``Conv1d``.
    """

    def __init__(self, width: int, kernel_width: int) -> None:
        super().__init__()
        kernel = torch.zeros(kernel_width, width)
        kernel[0] = 1.0
        self.kernel = nn.Parameter(kernel)
        """Row i weighs the token i steps back."""

    def forward(self, tokens: Float[Tensor, "row token width"]) -> Float[Tensor, "row token width"]:
        """The first token has nothing before it."""
        return self.carry(tokens, self.start(tokens))[0]

    def start(self, tokens: Float[Tensor, "row token width"]) -> Float[Tensor, "row lag width"]:
        """What ``carry`` takes before the first token: zeros."""
        return tokens.new_zeros(tokens.shape[0], len(self.kernel) - 1, tokens.shape[2])

    def carry(
        self, tokens: Float[Tensor, "row token width"], tail: Float[Tensor, "row lag width"]
    ) -> tuple[Float[Tensor, "row token width"], Float[Tensor, "row lag width"]]:
        """The same after earlier tokens, of which ``tail`` holds the last ``kernel_width - 1``, and the next tail."""
        length, num_lags = tokens.shape[1], tail.shape[1]
        past = torch.cat((tail.to(tokens.dtype), tokens), dim=1)
        mixed = tokens * self.kernel[0]
        for lag in range(1, num_lags + 1):
            mixed = mixed + past[:, num_lags - lag : num_lags - lag + length] * self.kernel[lag]
        return mixed, past[:, length:]
