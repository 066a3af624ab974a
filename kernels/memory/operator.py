"""The public memory operator: a whole sequence at once, or one token at a time."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trellis_ts.errors import ConfigError
from trellis_ts.kernels import dispatch
from trellis_ts.kernels.dispatch import Implementation
from trellis_ts.kernels.memory.checks import check_state, check_tokens
from trellis_ts.kernels.memory.types import (
    STATE_DTYPES,
    MemoryState,
    Options,
    Problem,
    ReadActivation,
    RunStep,
    Tokens,
    WriteActivation,
)


def trellis_memory(
    *,
    query: Float[Tensor, "batch time head dim"],
    key: Float[Tensor, "batch time head dim"],
    value: Float[Tensor, "batch time head dim"],
    target: Float[Tensor, "batch time head slot"],
    log_forget: Float[Tensor, "batch time head"],
    step_size: Float[Tensor, "batch time head"],
    initial_state: MemoryState | None = None,
    write_activation: WriteActivation = "silu",
    read_activation: ReadActivation = "ln_silu",
    write_epsilon: float = 1e-6,
    chunk_length: int = 1,
    second_order: bool = True,
    final_state: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Float[Tensor, "batch time head dim"], MemoryState]:
    """Write a sequence into the memory and read it back token by token.

    Every head carries two matrices ``[slot, dim]``, a key memory and a value memory. A token writes to both, each by
    one step of gradient descent on ``1/2 |phi(S w) - target|^2``, and then reads (eqs. 8, 13, 14)::

        z = S w                                         # w is the key for the key memory, the value for the other
        u = J_phi(z)^T (phi(z) - target)
        S = exp(log_forget) S - step_size u w^T
        output = value_memory^T f(key_memory query)     # both memories after their writes

    Inputs are taken as they are: normalising query, key and value, and any activation on the output, are the caller's.
    They share one dtype, except that beside bfloat16 and float16 the gates, ``log_forget`` and ``step_size``, may be
    float32, in which a forget gate close to 1 keeps its digits.

    Args:
        query: what the key memory is read with.
        key: what the key pass writes.
        value: what the value pass writes.
        target: the code both writes should reproduce.
        log_forget: logarithm of the forget gate, at most 0; minus infinity drops everything held before, except what
            this token's own write saw of it, since the write takes its residual before the decay.
        step_size: how far a write moves the memory, at least 0. A token with step size 0 and log-forget 0 is masked:
            it leaves both memories exactly as they were, and still reads them. Neither range is checked, since
            looking at the values would make a GPU wait.
        initial_state: both memories before the first token, ``[batch, head, slot, dim]``; zero if None.
        write_activation: ``phi``. ``ln_silu`` is LayerNorm (without affine part) of SiLU over the slots; from a zero
            memory it needs a ``write_epsilon`` of order 1, see README.md beside this file.
        read_activation: ``f``: LayerNorm of SiLU, SiLU scaled to unit length, or softmax, over the slots. The first
            two add 1e-6 to the variance, or to the sum of squares, inside the square root.
        write_epsilon: added to the variance inside the square root of ``ln_silu`` in the write; otherwise without
            effect.
        chunk_length: 1 computes the exact recurrence above. With C > 1, ``z`` is formed from the state at the start of
            the token's chunk, chunks being C tokens counted from the first of this call and the last one possibly
            shorter; decay, accumulation and reads still go token by token. **This changes the result.**
        second_order: differentiate through ``z``. If False, ``u`` treats ``z`` as a constant in the backward pass:
            no gradient reaches the inputs and earlier states by way of ``z``, while the target keeps its gradient,
            without which its projection could not be trained. The forward pass is the same.
        final_state: whether the state after the last token is wanted. If False it is nan, and the time and memory for
            it are saved where the implementation can.
        implementation: how it is computed, never what: ``auto`` chooses by device, dtype and shape, a name asks for
            that implementation or an error.

    Returns:
        The output ``[batch, time, head, dim]`` in the query's dtype, and the state after the last token, in float32
        for bfloat16 and float16 inputs and in the inputs' dtype otherwise. Nothing passed in is modified.

    Raises:
        ConfigError: shapes, dtypes or devices do not fit together, an axis other than batch is empty, or an option is
            none of its choices.
        BackendError: ``implementation`` is unknown or cannot run this call.
    """
    tokens = Tokens(query, key, value, target, log_forget, step_size)
    settings = (write_activation, read_activation, write_epsilon, chunk_length, second_order, final_state)
    entry, options, _ = _checked(tokens, initial_state, settings, implementation, has_time=True)
    if initial_state is None:
        shape = (query.shape[0], query.shape[2], target.shape[3], query.shape[3])
        zero = query.new_zeros((), dtype=STATE_DTYPES[query.dtype]).expand(shape)
        initial_state = MemoryState(zero, zero)
    output, state = entry.run(tokens, MemoryState(*initial_state), options)
    if not final_state:
        unknown = query.new_full((), math.nan, dtype=STATE_DTYPES[query.dtype]).expand(initial_state[0].shape)
        state = MemoryState(unknown, unknown)
    return output, state


def trellis_memory_step(
    *,
    query: Float[Tensor, "batch head dim"],
    key: Float[Tensor, "batch head dim"],
    value: Float[Tensor, "batch head dim"],
    target: Float[Tensor, "batch head slot"],
    log_forget: Float[Tensor, "batch head"],
    step_size: Float[Tensor, "batch head"],
    state: MemoryState,
    write_activation: WriteActivation = "silu",
    read_activation: ReadActivation = "ln_silu",
    write_epsilon: float = 1e-6,
    second_order: bool = True,
    inplace: bool = False,
    implementation: Implementation = "auto",
) -> tuple[Float[Tensor, "batch head dim"], MemoryState]:
    """Write and read one token: ``trellis_memory`` on a sequence of length one, with ``chunk_length=1``.

    Args:
        query: as for ``trellis_memory``, without the time axis; so are the next five.
        key: see ``query``.
        value: see ``query``.
        target: see ``query``.
        log_forget: see ``query``.
        step_size: see ``query``.
        state: the state the last step returned, each memory ``[batch, head, slot, dim]``; it is not modified unless
            ``inplace``.
        write_activation: as for ``trellis_memory``; so are the rest.
        read_activation: see ``write_activation``.
        write_epsilon: see ``write_activation``.
        second_order: see ``write_activation``.
        inplace: leave the new state in the tensors of ``state``, which saves allocating it; only where autograd
            records nothing.
        implementation: see ``write_activation``.

    Returns:
        The output ``[batch, head, dim]`` and the state to hand to the next step.

    Raises:
        ConfigError: as for ``trellis_memory``, or ``in_place`` where a gradient is wanted.
        BackendError: as for ``trellis_memory``.
    """
    tokens = Tokens(query, key, value, target, log_forget, step_size)
    settings = (write_activation, read_activation, write_epsilon, 1, second_order)
    entry, options, step = _checked(tokens, state, settings, implementation, has_time=False)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tokens, *state)):
        if inplace:
            raise ConfigError(
                "inplace=True would overwrite a state that autograd needs; call it under torch.no_grad(), or leave it "
                "out"
            )
    elif step is not None and type(query) is torch.Tensor and not torch.compiler.is_compiling():
        return step(tokens, state, inplace)
    output, final_state = entry.run(Tokens(*(tensor.unsqueeze(1) for tensor in tokens)), MemoryState(*state), options)
    if inplace:
        for memory, final in zip(state, final_state, strict=True):
            memory.copy_(final)
        return output.squeeze(1), state
    return output.squeeze(1), final_state


_Checked = tuple[dispatch.Entry, Options, RunStep | None]
# What the checks of a call and the choice of its implementation look at, and what came of them. A model asks for the
# same shapes again and again, and to look at them anew costs more than a step, or a tenth of a short sequence.
_checked_calls: dict[tuple[Any, ...], _Checked] = {}
_MOST_CHECKED_CALLS = 256
_shape, _dtype, _device, _is_cpu = map(attrgetter, ("shape", "dtype", "device", "is_cpu"))


def _checked(
    tokens: Tokens,
    state: MemoryState | None,
    settings: tuple[Any, ...],
    implementation: Implementation,
    *,
    has_time: bool,
) -> _Checked:
    # A size that is traced may not be looked up: that would fix it.
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _check(tokens, state, Options(*settings), implementation, has_time)
    try:
        tensors = tokens if state is None else (*tokens, *state)
        places = map(_is_cpu if tokens.query.is_cpu else _device, tensors)  # a device takes longer to look at
        kinds = (has_time, type(state), implementation, settings, *map(type, settings))  # 1 is not 1.0
        seen = (kinds, *map(_shape, tensors), *map(_dtype, tensors), *places)
        checked = _checked_calls.get(seen)
    except (AttributeError, TypeError):  # something among them is no tensor; the checks say what
        return _check(tokens, state, Options(*settings), implementation, has_time)
    if checked is None:
        checked = _check(tokens, state, Options(*settings), implementation, has_time)
        if len(_checked_calls) == _MOST_CHECKED_CALLS:
            _checked_calls.clear()
        _checked_calls[seen] = checked
    return checked


def _check(
    tokens: Tokens, state: MemoryState | None, options: Options, implementation: Implementation, has_time: bool
) -> _Checked:
    sizes = check_tokens(tokens, has_time=has_time)
    if state is not None or not has_time:
        check_state("initial_state" if has_time else "state", state, tokens.query, sizes)
    problem = _problem(tokens if has_time else Tokens(*(tensor.unsqueeze(1) for tensor in tokens)), options)
    entry = dispatch.IMPLEMENTATIONS[dispatch.choose(implementation, problem)]
    plan = None if has_time else entry.plan_step
    return entry, options, None if plan is None else plan(problem)


def _problem(tokens: Tokens, options: Options) -> Problem:
    batch, num_tokens, num_heads, num_slots = tokens.target.shape
    return Problem(
        device=tokens.query.device,
        dtype=tokens.query.dtype,
        num_rows=batch * num_heads,
        num_tokens=num_tokens,
        num_slots=num_slots,
        head_dim=tokens.query.shape[-1],
        options=options,
    )
