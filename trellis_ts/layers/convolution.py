"""The short causal depthwise convolution on queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

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
        length = tokens.shape[1]
        mixed = tokens * self.kernel[0]
        for lag in range(1, min(len(self.kernel), length)):
            mixed = mixed + F.pad(tokens[:, : length - lag], (0, 0, lag, 0)) * self.kernel[lag]
        return mixed
