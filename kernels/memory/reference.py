"""The definition of the memory: a loop over time, equation by equation.

Equation numbers are those of *Trellis* (arXiv 2512.23852v1); README.md beside this file derives what is computed here.
Every other implementation is measured against this one. It is written with elementwise products and sums only, so
that neither autocast nor a GPU's reduced-precision matrix products can change its numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from trellis_ts.kernels.memory.types import MemoryState, Options, ReadActivation, Tokens

READ_EPSILON = 1e-6


def reference(
    tokens: Tokens, initial_state: MemoryState, options: Options
) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
    """Compute ``trellis_memory`` by definition, in the dtype of the state.

    Gradients are autograd's, through every operation of the inner step: exact, and of second order in the write's
    activation unless ``second_order`` is False.
    """
    dtype = initial_state.key_memory.dtype
    query, key, value, target, log_forget, step_size = (tensor.to(dtype) for tensor in tokens)
    by_time = (tensor.unbind(1) for tensor in (query, key, value, target, log_forget.exp(), step_size))

    def write(
        memory: Float[Tensor, "batch head slot dim"],
        anchor: Float[Tensor, "batch head slot dim"],
        w: Float[Tensor, "batch head dim"],
        a: Float[Tensor, "batch head slot"],
        b: Float[Tensor, "batch head"],
        g: Float[Tensor, "batch head"],
    ) -> Float[Tensor, "batch head slot dim"]:
        z = (anchor * w[..., None, :]).sum(-1)  # S w
        u = write_gradient(z if options.second_order else z.detach(), a, options)
        return b[..., None, None] * memory - (g[..., None] * u)[..., None] * w[..., None, :]  # eq. 8

    key_memory, value_memory = initial_state
    outputs = []
    for time, (q, k, v, a, b, g) in enumerate(zip(*by_time, strict=True)):
        if time % options.chunk_length == 0:  # eqs. 9-12: the state the gradients of this chunk are taken at
            key_anchor, value_anchor = key_memory, value_memory

        key_memory = write(key_memory, key_anchor, k, a, b, g)  # eq. 13, the key pass
        r = read((key_memory * q[..., None, :]).sum(-1), options.read_activation)  # f(K q)

        value_memory = write(value_memory, value_anchor, v, a, b, g)  # eq. 14, the value pass
        outputs.append((value_memory * r[..., None]).sum(-2))  # V^T r

    return torch.stack(outputs, dim=1).to(tokens.query.dtype), MemoryState(key_memory, value_memory)


def write_gradient(
    z: Float[Tensor, "*batch slot"], a: Float[Tensor, "*batch slot"], options: Options
) -> Float[Tensor, "*batch slot"]:
    """Return ``u = J(z)^T (phi(z) - a)``: the gradient of ``1/2 |phi(z) - a|^2`` with respect to ``z``.

    A formula in ``z`` and ``a`` rather than a call to autograd, so that autograd can differentiate it in turn.
    """
    if options.write_activation == "identity":
        return z - a
    sigmoid = z.sigmoid()
    s = z * sigmoid
    slope = sigmoid + s * (1 - sigmoid)
    if options.write_activation == "silu":
        return slope * (s - a)
    # ln_silu: through the LayerNorm first, which removes from e its mean and its component along n, then the SiLU.
    c = s - s.mean(-1, keepdim=True)
    inverse_std = (c.square().mean(-1, keepdim=True) + options.write_epsilon).rsqrt()
    n = c * inverse_std
    e = n - a
    h = e - e.mean(-1, keepdim=True) - n * (e * n).mean(-1, keepdim=True)
    return slope * inverse_std * h


def read(yhat: Float[Tensor, "*batch slot"], activation: ReadActivation) -> Float[Tensor, "*batch slot"]:
    """Return ``f(yhat)``, what the key pass hands to the value pass."""
    if activation == "softmax":
        return yhat.softmax(-1)
    s = functional.silu(yhat)
    if activation == "l2_silu":
        return s * (s.square().sum(-1, keepdim=True) + READ_EPSILON).rsqrt()
    return functional.layer_norm(s, s.shape[-1:], eps=READ_EPSILON)
