"""Consecutive steps become tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import WindowShape


class PatchEmbedding(nn.Module):
    """Cuts a context into patches and maps each, with its mask of observed steps, to a token.

    Where the lengths do not divide, the context is padded on the left as unobserved, so the last patch always ends at
    the last observed step.
    """

    def __init__(self, shape: WindowShape, width: int, *, position_embedding: bool) -> None:
        super().__init__()
        self.patch_length = shape.patch_length
        self.patch_stride = shape.patch_stride
        covered = (shape.num_patches - 1) * shape.patch_stride + shape.patch_length
        self.left_padding = covered - shape.context_length
        self.projection = nn.Linear(2 * shape.patch_length, width)
        self.position = nn.Parameter(torch.randn(shape.num_patches, width) * 0.02) if position_embedding else None

    def forward(
        self, context: Float[Tensor, "row context"], observed: Bool[Tensor, "row context"]
    ) -> tuple[Float[Tensor, "row patch width"], Bool[Tensor, "row patch"]]:
        """Tokens, and True for each token with at least one observed step."""
        values = F.pad(context, (self.left_padding, 0)).unfold(1, self.patch_length, self.patch_stride)  # [R, N, P]
        mask = F.pad(observed, (self.left_padding, 0)).unfold(1, self.patch_length, self.patch_stride)
        tokens: Tensor = self.projection(torch.cat((values, mask.to(values.dtype)), dim=-1))
        tokens = tokens.to(context.dtype)  # what the blocks add to is kept in full precision under autocast
        if self.position is not None:
            tokens = tokens + self.position
        return tokens, mask.any(dim=-1)
