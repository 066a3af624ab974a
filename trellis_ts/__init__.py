"""Time-series forecasting with Trellis: attention with a memory of fixed size.

The names below are loaded when they are first used: importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trellis_ts.conformal import AdaptiveConformal
    from trellis_ts.errors import BackendError, CheckpointError, ConfigError, DataError, TrellisError
    from trellis_ts.evaluation import evaluate
    from trellis_ts.forecaster import Forecaster
    from trellis_ts.kernels import MemoryState, trellis_memory, trellis_memory_step
    from trellis_ts.layers.trellis import TrellisLayer, TrellisState
    from trellis_ts.streaming.forecaster import StreamingForecaster
    from trellis_ts.types import Forecast, Panel

_HOMES = {
    "AdaptiveConformal": "conformal",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Forecast": "types",
    "Forecaster": "forecaster",
    "MemoryState": "kernels",
    "Panel": "types",
    "StreamingForecaster": "streaming.forecaster",
    "TrellisError": "errors",
    "TrellisLayer": "layers.trellis",
    "TrellisState": "layers.trellis",
    "evaluate": "evaluation",
    "trellis_memory": "kernels",
    "trellis_memory_step": "kernels",
}

__all__ = [
    "AdaptiveConformal",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Forecast",
    "Forecaster",
    "MemoryState",
    "Panel",
    "StreamingForecaster",
    "TrellisError",
    "TrellisLayer",
    "TrellisState",
    "evaluate",
    "trellis_memory",
    "trellis_memory_step",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
