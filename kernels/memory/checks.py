"""Whether the tensors of a call fit together, judged without reading a value from them."""

from __future__ import annotations

from torch import Tensor

from trellis_ts.errors import ConfigError
from trellis_ts.kernels.memory.types import STATE_DTYPES, Tokens

_TOKEN_AXES = {
    "query": ("batch", "time", "head", "dim"),
    "key": ("batch", "time", "head", "dim"),
    "value": ("batch", "time", "head", "dim"),
    "target": ("batch", "time", "head", "slot"),
    "log_forget": ("batch", "time", "head"),
    "step_size": ("batch", "time", "head"),
}
_GATES = {"log_forget", "step_size"}
_STATE_AXES = ("batch", "head", "slot", "dim")


def check_tokens(tokens: Tokens, *, has_time: bool) -> dict[str, int]:
    """Check the six inputs against each other and return the size of every axis.

    Args:
        tokens: the inputs; those of a single step have no time axis.
        has_time: whether they have one.

    Raises:
        ConfigError: a shape, dtype or device does not fit the others', or cannot be used at all.
    """
    query = tokens.query
    sizes: dict[str, int] = {}
    for name, axes in _TOKEN_AXES.items():
        kept = axes if has_time else tuple(axis for axis in axes if axis != "time")
        _check_shape(name, getattr(tokens, name), kept, sizes)
    for axis, size in sizes.items():
        if size == 0 and axis != "batch":
            raise ConfigError(f"the {axis} axis of query, key, value or target is empty; it needs at least one entry")

    if query.dtype not in STATE_DTYPES:
        known = ", ".join(_plain(dtype) for dtype in STATE_DTYPES)
        raise ConfigError(f"query has dtype {_plain(query.dtype)}; the memory takes {known}")
    for name, tensor in tokens._asdict().items():
        if tensor.dtype != query.dtype and not (name in _GATES and tensor.dtype == STATE_DTYPES[query.dtype]):
            raise ConfigError(
                f"{name} has dtype {_plain(tensor.dtype)} and query {_plain(query.dtype)}; cast them to one dtype"
            )
        _check_device(name, tensor, query)
    return sizes


def check_state(name: str, state: object, query: Tensor, sizes: dict[str, int]) -> None:
    """Check a state, called ``name`` by the caller, against inputs that ``check_tokens`` has passed.

    Raises:
        ConfigError: it is not a pair of memories, or their shape, dtype or device does not fit the inputs.
    """
    if not isinstance(state, tuple) or len(state) != 2:
        raise ConfigError(f"{name} is a {type(state).__name__}; expected a MemoryState(key_memory, value_memory)")
    dtype = STATE_DTYPES[query.dtype]
    for part, memory in zip((f"{name}.key_memory", f"{name}.value_memory"), state, strict=True):
        _check_shape(part, memory, _STATE_AXES, sizes)
        if memory.dtype != dtype:
            raise ConfigError(
                f"{part} has dtype {_plain(memory.dtype)}; with inputs in {_plain(query.dtype)} the state is kept in "
                f"{_plain(dtype)}, cast it to that"
            )
        _check_device(part, memory, query)


def _check_shape(name: str, tensor: object, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Compare a shape with ``axes``, and enter into ``sizes`` the axes seen for the first time."""
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}; expected a tensor [{', '.join(axes)}]")
    fits = tensor.ndim == len(axes) and all(
        sizes.get(axis, size) == size for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ConfigError(f"{name} has shape {list(tensor.shape)}; expected [{expected}]")
    sizes.update(zip(axes, tensor.shape, strict=True))


def _check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ConfigError(f"{name} is on {tensor.device} and query on {query.device}; move them to one device")


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
