"""Two linear recurrences to compare the Trellis memory with, computed a chunk of tokens at a time.

Both are exact whatever the chunk: inside it, tokens are weighed by what the decays between them leave, formed from
differences of cumulated logarithms; what came before is carried in the state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def gated_linear_attention(
    query: Float[Tensor, "row head token dim"],
    key: Float[Tensor, "row head token dim"],
    value: Float[Tensor, "row head token dim"],
    log_forget: Float[Tensor, "row head token"],
    *,
    chunk_length: int = 64,
) -> Float[Tensor, "row head token dim"]:
    """One matrix per head that decays by one number per token (Mamba-2, arXiv 2405.21060, there as ``a_t``):

        S_t = b_t S_{t-1} + k_t v_t^T        y_t = S_t^T q_t        b_t = exp(log_forget_t)

    A token whose key is 0 and whose log-forget is 0 leaves the state as it was.
    """
    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])  # [R, H, D, D]
    outputs = []
    for start in range(0, query.shape[2], chunk_length):
        q, k, v, gates = (part[:, :, start : start + chunk_length] for part in (query, key, value, log_forget))
        since_start, between = _decays(gates[..., None])
        between = between[..., 0]  # [R, H, t, i]
        outputs.append((q @ k.mT * between) @ v + since_start * (q @ state))
        state = since_start[:, :, -1:] * state + (k * between[:, :, -1, :, None]).mT @ v
    return torch.cat(outputs, dim=2)


def gated_slot_attention(
    query: Float[Tensor, "row head token dim"],
    key: Float[Tensor, "row head token dim"],
    value: Float[Tensor, "row head token dim"],
    log_forget: Float[Tensor, "row head token slot"],
    *,
    chunk_length: int = 16,
) -> Float[Tensor, "row head token dim"]:
    """Slots of keys and values that decay each by a number of its own (gated slot attention, arXiv 2409.07146):

        K_t = Diag(a_t) K_{t-1} + (1 - a_t) k_t^T        V_t = Diag(a_t) V_{t-1} + (1 - a_t) v_t^T
        y_t = V_t^T softmax(K_t q_t)                     a_t = exp(log_forget_t)

    A token whose log-forget is 0 leaves both as they were. Inside a chunk the weights of all pairs of tokens take
    ``chunk_length`` numbers per token and slot.
    """
    slots = query.new_zeros(2, *query.shape[:2], log_forget.shape[-1], key.shape[-1])  # K and V, [R, H, M, D] each
    keys, values = slots
    outputs = []
    for start in range(0, query.shape[2], chunk_length):
        q, k, v, gates = (part[:, :, start : start + chunk_length] for part in (query, key, value, log_forget))
        since_start, between = _decays(gates)
        written = between * -torch.expm1(gates)[:, :, None]  # [R, H, t, i, M]: what slot m holds at t of token i
        scores = torch.einsum("rhti,rhtim->rhtm", q @ k.mT, written) + since_start * (q @ keys.mT)
        weight = scores.softmax(dim=-1)
        outputs.append(torch.einsum("rhtm,rhtim->rhti", weight, written) @ v + (weight * since_start) @ values)
        kept, last = since_start[:, :, -1, :, None], written[:, :, -1].mT
        keys, values = kept * keys + last @ k, kept * values + last @ v
    return torch.cat(outputs, dim=2)


def _decays(
    log_forget: Float[Tensor, "row head token gate"],
) -> tuple[Float[Tensor, "row head token gate"], Float[Tensor, "row head token token gate"]]:
    """What is left at token t of a state before the first token, and of what token i wrote (0 for a later one)."""
    total = log_forget.cumsum(dim=2)
    later = torch.ones(log_forget.shape[2], log_forget.shape[2], dtype=torch.bool, device=log_forget.device).triu(1)
    # Later tokens are taken out before the exponential, where the differences are positive and could overflow.
    between = (total[:, :, :, None] - total[:, :, None]).masked_fill(later[..., None], -torch.inf)
    return total.exp(), between.exp()
