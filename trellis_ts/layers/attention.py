"""Softmax attention in the place of the Trellis mixer, for comparison in the same shell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import ModelConfig


class AttentionMixer(nn.Module):
    """Multi-head attention among all tokens of a row; unobserved tokens are not attended to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        heads = self.query_key_value(tokens).view(*tokens.shape[:2], 3, self.num_heads, -1)  # [R, N, 3, H, D]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        # A row with nothing observed attends to everything: masking all of it would give NaN.
        visible = observed | ~observed.any(dim=1, keepdim=True)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None, None])
        return mixed.transpose(1, 2).flatten(2).to(tokens.dtype)  # under autocast it comes in half precision
