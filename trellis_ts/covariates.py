"""How covariates enter the network: as summands of its tokens, and per step of the horizon beside its head.

Every map into the network starts at zero, so training starts from the model without covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from trellis_ts.datasets.cycles import num_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor

    from trellis_ts.config import CovariateShape, WindowShape
    from trellis_ts.types import Batch, Features

_HORIZON_WIDTH = 32
_WIDEST_EMBEDDING = 8


def zeroed(linear: nn.Linear) -> nn.Linear:
    """Starts a last layer at zero: what it adds to begins alone, and no random weight that the data never corrects is
    left to roughen the forecast."""
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class FeatureEncoder(nn.Module):
    """Numbers with their masks, and an embedding per category, as one vector per step; an unknown category is zero.

    Args:
        num_numbers: columns of numbers, those without a mask of their own included.
        num_masked: how many of them, the first ones, come with a mask.
        category_sizes: how many categories each other column distinguishes.
        width: length of the vector.
    """

    def __init__(self, num_numbers: int, num_masked: int, category_sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.num_masked = num_masked
        self.embeddings = nn.ModuleList(
            nn.Embedding(1 + size, min(_WIDEST_EMBEDDING, 1 + size), padding_idx=0) for size in category_sizes
        )
        embedded = sum(min(_WIDEST_EMBEDDING, 1 + size) for size in category_sizes)
        self.projection = nn.Linear(num_numbers + num_masked + embedded, width)

    def forward(self, features: Features) -> Float[Tensor, "batch *step width"]:
        mask = features.observed[..., : self.num_masked].to(features.values.dtype)
        embedded = [embedding(features.codes[..., column]) for column, embedding in enumerate(self.embeddings)]
        projected: Tensor = self.projection(torch.cat((features.values, mask, *embedded), dim=-1))
        return projected


class CovariateEmbedding(nn.Module):
    """What covariates add to the tokens of a window, the same for all channels, and to its forecast.

    Args:
        shape: the lengths, and the covariates that are read.
        width: features per token.
        covariate_width: features each step's covariates are read as.
        num_outputs: numbers the head gives per step.
    """

    def __init__(self, shape: WindowShape, width: int, covariate_width: int, num_outputs: int) -> None:
        super().__init__()
        read: CovariateShape = shape.covariates
        self.shape, self.patch_length, self.patch_stride = shape, shape.patch_length, shape.patch_stride
        covered = (shape.num_patches - 1) * shape.patch_stride + shape.patch_length
        self.left_padding = covered - shape.context_length
        patch_width = shape.patch_length * covariate_width
        self.past = self.known = self.static = self.horizon = None
        if read.has_past:
            self.past = FeatureEncoder(read.past_numbers, read.past_numbers, read.past_categories, covariate_width)
            self.past_patches = zeroed(nn.Linear(patch_width, width))
        if read.has_known:
            numbers = read.known_numbers + num_features(read.cycles)
            self.known = FeatureEncoder(numbers, read.known_numbers, read.known_categories, covariate_width)
            self.known_patches = zeroed(nn.Linear(patch_width, width))
            self.horizon = HorizonNetwork(covariate_width, width, num_outputs)
        if read.has_static:
            self.static = FeatureEncoder(read.static_numbers, read.static_numbers, read.static_categories, width)
            self.static_token = zeroed(nn.Linear(width, width))

    def tokens(self, batch: Batch) -> Float[Tensor, "batch patch width"]:
        """What is added to the tokens of every channel of a window."""
        length = self.shape.context_length
        total = torch.zeros((), device=batch.context.device)
        if self.past is not None:
            features = self.past(_required(batch.past, "past covariates"))
            total = total + self.past_patches(self._patches(features))
        if self.known is not None:
            features = self.known(_required(batch.known, "known covariates"))
            total = total + self.known_patches(self._patches(features[:, :length]))
        if self.static is not None:
            attributes = self.static(_required(batch.static, "static attributes"))
            total = total + self.static_token(attributes)[:, None]
        return total.to(batch.context.dtype).expand(batch.context.shape[0], self.shape.num_patches, -1)

    def forecast(self, batch: Batch, summary: Float[Tensor, "row width"]) -> Float[Tensor, "row horizon output"] | None:
        """What is added to the head's output for each channel (row), None without known covariates."""
        if self.known is None or self.horizon is None:
            return None
        start = self.shape.context_length
        known = _required(batch.known, "known covariates")
        if known.values.shape[1] < start + self.shape.prediction_length:
            raise ValueError(
                f"known covariates reach over {known.values.shape[1]} steps, context and horizon over "
                f"{start + self.shape.prediction_length}"
            )
        features = self.known(known)[:, start : start + self.shape.prediction_length]
        added: Tensor = self.horizon(features, summary)
        return added

    def _patches(self, features: Float[Tensor, "batch context feature"]) -> Float[Tensor, "batch patch flat"]:
        padded = F.pad(features, (0, 0, self.left_padding, 0))
        return padded.unfold(1, self.patch_length, self.patch_stride).flatten(2)  # [B, N, F * P]


class HorizonNetwork(nn.Module):
    """Maps a future step's covariates and a summary of the window to what is added to the forecast of that step."""

    def __init__(self, covariate_width: int, width: int, num_outputs: int) -> None:
        super().__init__()
        self.step = nn.Linear(covariate_width, _HORIZON_WIDTH)
        self.norm = nn.RMSNorm(width)
        self.window = nn.Linear(width, _HORIZON_WIDTH, bias=False)
        self.hidden = nn.Linear(_HORIZON_WIDTH, _HORIZON_WIDTH)
        self.output = zeroed(nn.Linear(_HORIZON_WIDTH, num_outputs))

    def forward(
        self, features: Float[Tensor, "batch horizon feature"], summary: Float[Tensor, "row width"]
    ) -> Float[Tensor, "row horizon output"]:
        """A window's steps are shared by its channels, whose rows follow one another."""
        windows = self.window(self.norm(summary)).unflatten(0, (features.shape[0], -1))  # [B, C, F]
        hidden = F.silu(self.step(features)[:, None] + windows[:, :, None])  # [B, C, horizon, F]
        added: Tensor = self.output(F.silu(self.hidden(hidden))).flatten(0, 1)
        return added


def _required(features: Features | None, what: str) -> Features:
    if features is None:
        raise ValueError(f"the model reads {what}, and the batch has none")
    return features
