"""The chunkwise form in matrix products (Trellis, arXiv 2512.23852v1, eqs. 9-12): PyTorch on any device.

With the inner gradients of a chunk taken at its start, what is left inside is linear, and a chunk of C tokens is a few
products of ``[C, C]``, ``[C, D]`` and ``[C, M]`` matrices instead of C steps. For the identity write the gradients at
*every* token follow from one triangular solve (the delta rule's), so there the exact recurrence has this form too.
Autograd differentiates it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.kernels.memory.reference import read, write_gradient
from trellis_ts.kernels.memory.types import MemoryState, Options, Problem, Tokens

# Tokens solved at once when the recurrence is exact: large enough for the products to pay, small enough for the
# [C, C] matrices to stay in cache. It changes no number beyond rounding.
_EXACT_CHUNK_LENGTH = 32


def why_not_chunked(problem: Problem | None) -> str | None:
    """Name what it cannot do: the exact recurrence of a write that is not linear."""
    if problem is None or problem.options.chunk_length > 1 or problem.options.write_activation == "identity":
        return None
    phi = problem.options.write_activation
    return f"with chunk_length=1 the chunkwise form exists for write_activation='identity' only, not '{phi}'"


def chunked(
    tokens: Tokens, initial_state: MemoryState, options: Options
) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
    """Compute ``trellis_memory`` chunk by chunk, in the dtype of the state."""
    dtype = initial_state.key_memory.dtype
    with torch.autocast(tokens.query.device.type, enabled=False):  # it would halve the precision of every product
        by_head = [tensor.to(dtype).transpose(1, 2) for tensor in tokens]  # [B, H, T, ...]
        key_memory, value_memory = initial_state
        length = options.chunk_length if options.chunk_length > 1 else _EXACT_CHUNK_LENGTH
        outputs = []
        for pieces in zip(*(torch.split(tensor, length, dim=2) for tensor in by_head), strict=True):
            query, key, value, target, log_forget, step_size = pieces
            decay = _decays(log_forget)
            yhat, key_memory = _pass(key_memory, key, query, target, step_size, decay, options, reads_slots=True)
            r = read(yhat, options.read_activation)
            output, value_memory = _pass(value_memory, value, r, target, step_size, decay, options, reads_slots=False)
            outputs.append(output)
    joined = torch.cat(outputs, dim=2).transpose(1, 2).to(tokens.query.dtype)
    return joined, MemoryState(key_memory, value_memory)


def _decays(log_forget: Float[Tensor, "batch head chunk"]) -> Float[Tensor, "batch head step step"]:
    """Return ``[t, i]``: what is left after token t of what was there after token i.

    Row and column 0 stand for the chunk's start. Products of forget gates are sums of their logarithms, and each sum is
    taken by itself: differences of one running sum would cancel, and be undefined past a gate that is shut.
    """
    length = log_forget.shape[-1]
    later = torch.ones(length + 1, length + 1, dtype=torch.bool, device=log_forget.device).tril(-1)
    steps = torch.nn.functional.pad(log_forget, (1, 0))[..., None]  # row t holds the gate of token t
    sums = torch.where(later, steps, 0.0).cumsum(dim=-2)
    return torch.where(later.logical_not().triu(1), 0.0, sums.exp())


def _pass(
    memory: Float[Tensor, "batch head slot dim"],
    written: Float[Tensor, "batch head chunk dim"],
    reader: Float[Tensor, "batch head chunk any"],
    target: Float[Tensor, "batch head chunk slot"],
    step_size: Float[Tensor, "batch head chunk"],
    decay: Float[Tensor, "batch head step step"],
    options: Options,
    *,
    reads_slots: bool,
) -> tuple[Float[Tensor, "batch head chunk other"], Float[Tensor, "batch head slot dim"]]:
    """Write one chunk to one memory and read it at every token.

    The key pass reads slots (``S q``), the value pass dimensions (``S^T r``).
    """
    z = written @ memory.mT  # [B, H, C, M], at the chunk's start
    if options.chunk_length == 1:
        u = _exact_gradients(z, written, target, step_size, decay, options)
    else:
        u = write_gradient(z if options.second_order else z.detach(), target, options)
    since_start, among = decay[..., 1:, :1], decay[..., 1:, 1:]
    weights = among * step_size[..., None, :]  # [t, i]: what token t sees of write i
    if reads_slots:
        output = since_start * (reader @ memory.mT) - ((reader @ written.mT) * weights) @ u
    else:
        output = since_start * (reader @ memory) - ((reader @ u.mT) * weights) @ written
    kept = since_start[..., -1:, :] * memory - (u * weights[..., -1, :, None]).mT @ written
    return output, kept


def _exact_gradients(
    z: Float[Tensor, "batch head chunk slot"],
    written: Float[Tensor, "batch head chunk dim"],
    target: Float[Tensor, "batch head chunk slot"],
    step_size: Float[Tensor, "batch head chunk"],
    decay: Float[Tensor, "batch head step step"],
    options: Options,
) -> Float[Tensor, "batch head chunk slot"]:
    """Return the identity write's gradients at the state each token finds, not at the chunk's start.

    That state holds the chunk's earlier writes, so ``u_t`` depends on every ``u_i`` before it, linearly:
    ``u_t + sum_i decay[t - 1, i] g_i (w_i . w_t) u_i = decay[t - 1, 0] z_t - a_t``.
    """
    before = decay[..., :-1, :]  # what token t finds of the state after token i
    found = before[..., :1] * z
    system = (written @ written.mT) * before[..., 1:] * step_size[..., None, :]
    u: Tensor = torch.linalg.solve_triangular(system, found - target, upper=False, unitriangular=True)
    return u if options.second_order else (u + target).detach() - target  # u + target is z
