"""Names of devices."""

from __future__ import annotations

import torch

from trellis_ts.errors import ConfigError


def resolve_device(device: str) -> str:
    """``auto`` as the device there is; any other name if it can be used.

    Raises:
        ConfigError: an unknown name, or a device this machine does not have.
    """
    kind, _, index = device.partition(":")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda", "mps") or (":" in device and not (kind == "cuda" and index.isdigit())):
        raise ConfigError(f"device '{device}' is unknown; use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}': torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' is not available on this machine; use --device cpu")
    return device
