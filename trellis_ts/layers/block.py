"""One residual block: a mixer behind a gate, then a SwiGLU (figure 1 of the Trellis paper)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional as F

from trellis_ts.layers.attention import AttentionMixer
from trellis_ts.layers.gated import LinearMixer, SlotMixer
from trellis_ts.layers.trellis import TrellisMixer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from trellis_ts.config import Implementation, ModelConfig


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, tokens: Float[Tensor, "*token width"]) -> Float[Tensor, "*token width"]:
        gate, up = self.gate_up(tokens).chunk(2, dim=-1)
        down: Tensor = self.down(F.silu(gate) * up)
        return down


def make_mixer(config: ModelConfig, implementation: Implementation) -> nn.Module:
    """The mixer of a configuration that has one."""
    if config.mixer == "trellis":
        return TrellisMixer(config, implementation=implementation)
    return {"attention": AttentionMixer, "gsa": SlotMixer, "linear": LinearMixer}[config.mixer](config)


class Block(nn.Module):
    """Norm, mixer, norm, GELU gate, linear, residual; then norm, SwiGLU, residual."""

    def __init__(self, config: ModelConfig, mixer: nn.Module) -> None:
        super().__init__()
        width = config.width
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = mixer
        self.post_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feedforward_norm = nn.RMSNorm(width)
        self.feedforward = SwiGLU(width, config.feedforward_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, tokens: Float[Tensor, "row token width"], observed: Bool[Tensor, "row token"]
    ) -> Float[Tensor, "row token width"]:
        normed = self.mixer_norm(tokens)
        mixed = self.post_norm(self.mixer(normed, observed)) * F.gelu(self.gate(normed))
        tokens = tokens + self.dropout(self.output(mixed))
        fed: Tensor = self.dropout(self.feedforward(self.feedforward_norm(tokens)))
        return tokens + fed
