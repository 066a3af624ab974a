"""What the launches of all GPU kernels share: the sizes of a call, and the GPU it runs on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis_ts.kernels.memory import tuning


@dataclass(frozen=True)
class Shape:
    """The sizes of a call."""

    num_rows: int
    """Batch times heads."""
    num_tokens: int
    num_heads: int
    num_slots: int
    head_dim: int

    @classmethod
    def of(cls, query: Tensor, target: Tensor) -> Shape:
        """Read them from two of the inputs."""
        batch, num_tokens, num_heads, head_dim = query.shape
        return cls(batch * num_heads, num_tokens, num_heads, target.shape[-1], head_dim)

    @property
    def times(self) -> tuple[int, int]:
        """What every kernel calls T and H."""
        return self.num_tokens, self.num_heads

    def blocks(self, smallest: int) -> dict[str, int]:
        """Return slots and head width as constants of a kernel, and what they are padded to, ``smallest`` at least."""
        padded_slots, padded_dim = tuning.padded(self.num_slots, smallest), tuning.padded(self.head_dim, smallest)
        return {"M": self.num_slots, "D": self.head_dim, "BM": padded_slots, "BD": padded_dim}


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
