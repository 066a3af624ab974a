"""What all GPU kernels share: activations, their derivatives, loads and stores.

Names: ``p_`` pointer, ``b_`` loaded block, ``o_`` offsets, ``m_`` mask, ``i_`` index. ``M`` slots, ``D`` head width,
``H`` heads, ``T`` tokens; ``BM`` and ``BD`` are M and D padded to powers of two. Tensors are contiguous: tokens
``[B, T, H, *]``, states ``[B, H, M, D]``; a row is one head of one batch entry. The entries a block has beyond M or D
are kept at zero throughout, so that sums over slots need no mask. ``grad`` in the name of a pointer means the gradient
of the loss with respect to what precedes it; in formulas, a name that ends in ``bar``. README.md beside this file
derives what is computed.
"""

import triton
import triton.language as tl


@triton.jit
def slope_of_silu(b_z):
    """SiLU and its first derivative."""
    b_sigmoid = tl.sigmoid(b_z)
    b_s = b_z * b_sigmoid
    return b_s, b_sigmoid + b_s * (1.0 - b_sigmoid)


@triton.jit
def normalise(b_s, m_m, epsilon, M: tl.constexpr, AXIS: tl.constexpr = 1):
    """LayerNorm without affine part over slots: what it returns, and the inverse deviation."""
    b_c = tl.where(m_m, b_s - tl.sum(b_s, axis=AXIS, keep_dims=True) / M, 0.0)
    b_rho = tl.rsqrt(tl.sum(b_c * b_c, axis=AXIS, keep_dims=True) / M + epsilon)
    return b_c * b_rho, b_rho


@triton.jit
def write_gradient(b_z, b_a, m_m, epsilon, M: tl.constexpr, WRITE: tl.constexpr, AXIS: tl.constexpr = 1):
    """``u = J_phi(z)^T (phi(z) - a)`` for z and a with slots on ``AXIS``."""
    if WRITE == "identity":
        return b_z - b_a
    b_s, b_slope = slope_of_silu(b_z)
    if WRITE == "silu":
        return b_slope * (b_s - b_a)
    else:
        b_n, b_rho = normalise(b_s, m_m, epsilon, M, AXIS)
        b_e = b_n - b_a
        b_h = (
            b_e - tl.sum(b_e, axis=AXIS, keep_dims=True) / M - b_n * (tl.sum(b_e * b_n, axis=AXIS, keep_dims=True) / M)
        )
        return tl.where(m_m, b_slope * b_rho * b_h, 0.0)


@triton.jit
def write_gradient_vjp(b_z, b_a, b_ubar, m_m, epsilon, M: tl.constexpr, WRITE: tl.constexpr, AXIS: tl.constexpr = 1):
    """``(zbar, abar)`` from ``ubar``, slots on ``AXIS``: the second derivative of the write's loss."""
    if WRITE == "identity":
        return b_ubar, -b_ubar
    b_s, b_slope = slope_of_silu(b_z)
    b_sigmoid = tl.sigmoid(b_z)
    b_curve = b_sigmoid * (1.0 - b_sigmoid) * (2.0 + b_z * (1.0 - 2.0 * b_sigmoid))
    if WRITE == "silu":
        return b_ubar * (b_slope * b_slope + b_curve * (b_s - b_a)), -b_ubar * b_slope
    else:
        b_n, b_rho = normalise(b_s, m_m, epsilon, M, AXIS)
        b_c = b_n / b_rho
        b_e = b_n - b_a
        b_p = tl.sum(b_e * b_n, axis=AXIS, keep_dims=True) / M
        b_h = b_e - tl.sum(b_e, axis=AXIS, keep_dims=True) / M - b_n * b_p
        b_x = b_slope * b_ubar
        b_hbar = b_rho * b_x
        b_pbar = -tl.sum(b_hbar * b_n, axis=AXIS, keep_dims=True)
        b_ebar = b_hbar - tl.sum(b_hbar, axis=AXIS, keep_dims=True) / M + b_pbar * b_n / M
        b_ebar = tl.where(m_m, b_ebar, 0.0)
        b_nbar = b_ebar - b_p * b_hbar + b_pbar * b_e / M
        b_rhobar = tl.sum(b_x * b_h + b_nbar * b_c, axis=AXIS, keep_dims=True)
        b_cbar = b_rho * b_nbar - b_rho * b_rho * b_rho * b_rhobar * b_c / M
        b_zbar = b_slope * (b_cbar - tl.sum(b_cbar, axis=AXIS, keep_dims=True) / M) + b_curve * b_rho * b_h * b_ubar
        return tl.where(m_m, b_zbar, 0.0), -b_ebar


@triton.jit
def read(b_y, m_m, M: tl.constexpr, READ: tl.constexpr):
    """``f(y)`` for ``[*, BM]``."""
    if READ == "softmax":
        b_y = tl.where(m_m, b_y, -1e30)  # finite: a block may hold a row that is masked throughout
        b_y = tl.exp(b_y - tl.max(b_y, axis=1)[:, None])
        return b_y / tl.sum(b_y, axis=1)[:, None]
    b_s = b_y * tl.sigmoid(b_y)
    if READ == "l2_silu":
        return b_s * tl.rsqrt(tl.sum(b_s * b_s, axis=1) + 1e-6)[:, None]
    else:
        b_r, _ = normalise(b_s, m_m, 1e-6, M)
        return b_r


@triton.jit
def read_vjp(b_y, b_r, b_rbar, m_m, M: tl.constexpr, READ: tl.constexpr):
    """``J_f(y)^T rbar`` for ``[*, BM]``, where ``b_r`` is ``f(y)``."""
    if READ == "softmax":
        return b_r * (b_rbar - tl.sum(b_r * b_rbar, axis=1)[:, None])
    b_s, b_slope = slope_of_silu(b_y)
    if READ == "l2_silu":
        b_rho = tl.rsqrt(tl.sum(b_s * b_s, axis=1) + 1e-6)[:, None]
        return b_slope * b_rho * (b_rbar - b_r * tl.sum(b_r * b_rbar, axis=1)[:, None])
    else:
        _, b_rho = normalise(b_s, m_m, 1e-6, M)
        b_mean = tl.sum(b_rbar, axis=1)[:, None] / M
        b_sbar = b_rho * (b_rbar - b_mean - b_r * (tl.sum(b_r * b_rbar, axis=1)[:, None] / M))
        return tl.where(m_m, b_slope * b_sbar, 0.0)


@triton.jit
def load_vector(p, o_token, o, m, WIDTH: tl.constexpr):
    """Row ``o_token`` of a ``[tokens, WIDTH]`` tensor for every token of a block, in float32."""
    return tl.load(p + o_token[:, None] * WIDTH + o[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def store_vector(p, b, o_token, o, m, WIDTH: tl.constexpr):
    """Write every token of a block to row ``o_token`` of a ``[tokens, WIDTH]`` tensor, in that tensor's dtype."""
    tl.store(p + o_token[:, None] * WIDTH + o[None, :], b.to(p.dtype.element_ty), mask=m)
