"""The state a training run goes on from: safetensors and JSON in one file, which appears whole or not at all.

Lightning gathers and restores the state; only how it is written and read is ours, because Lightning's own checkpoints
are pickles. The tensors of the nested state are taken out and numbered, the rest is kept as JSON among the file's
metadata, with a digest of both.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint as CheckpointCallback
from lightning.pytorch.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trellis_ts.errors import CheckpointError
from trellis_ts.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STATE_FILE = "state.safetensors"
_FORMAT, _VERSION = "trellis_ts.training", "1"


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replaces the file by one of this state; after a crash at any moment there is the old one or the new one, whole.

    Args:
        path: of the file.
        state: dictionaries, lists and tuples of tensors, numbers, text and None.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; the old one stays.
        TypeError: there is something else in the state.
    """
    tensors: dict[str, Tensor] = {}
    spelled = json.dumps(_spell(state, tensors))
    metadata = {"format": _FORMAT, "version": _VERSION, "state": spelled, "sha256": _digest(spelled, tensors)}
    replace_file(path, save(tensors, metadata))


def read_state(path: Path) -> dict[str, Any]:
    """What ``write_state`` wrote, on the CPU.

    Raises:
        CheckpointError: the file is damaged or of a newer version; nothing in it is ever executed.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == _FORMAT and metadata.get("version") != _VERSION:
                raise CheckpointError(f"{path} was written by a newer trellis; upgrade trellis-ts to resume from it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        spelled = metadata["state"]
        if metadata["format"] != _FORMAT or metadata["sha256"] != _digest(spelled, tensors):
            raise ValueError("checksum")
        state = _read(json.loads(spelled), tensors)
        if not isinstance(state, dict):
            raise TypeError("no dictionary")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path} is damaged and cannot be resumed from; train anew with --overwrite") from None
    return state


def _spell(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold, with tensors by their number; dictionaries keep keys that are no text."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_spell(key, tensors), _spell(each, tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list" if isinstance(value, list) else "tuple": [_spell(each, tensors) for each in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a state cannot hold a {type(value).__name__}")


def _read(spelled: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(spelled, dict):
        return spelled
    ((kind, content),) = spelled.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_read(key, tensors): _read(each, tensors) for key, each in content}
    parts = [_read(each, tensors) for each in content]
    return {"list": parts, "tuple": tuple(parts)}[kind]


def _digest(spelled: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(spelled.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class SafeCheckpoints(CheckpointIO):
    """How Lightning writes and reads the state of a run."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        write_state(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_state(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        Path(path).unlink(missing_ok=True)


class KeepState(CheckpointCallback):
    """Writes the state at the end of every epoch, after all else that belongs to it.

    An epoch that the user cut short is left out, so that a resumed run repeats it and ends as an uninterrupted one.

    Args:
        path: of the state file.
        is_cut: tells whether the user has stopped this epoch.
    """

    def __init__(self, path: Path, is_cut: Callable[[], bool]) -> None:
        self.path = path
        self._is_cut = is_cut

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        is_whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if is_whole or not self._is_cut():
            trainer.save_checkpoint(self.path)


class KeepBest(lightning.Callback):
    """Remembers the weights of the epoch with the lowest validation loss, as part of the state.

    Args:
        validation_loss: of the weights that training begins with, if they may remain the best.
        weights: those weights.
    """

    def __init__(self, validation_loss: float = math.inf, weights: dict[str, Tensor] | None = None) -> None:
        self.validation_loss, self.weights = validation_loss, weights
        self.epoch = 0
        """Of the best weights; 0 for those that training began with."""
        self.num_finite = 0
        """Epochs that ended with a finite loss."""

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        loss = float(trainer.callback_metrics["validation_loss"])
        self.num_finite += math.isfinite(loss)
        if loss < self.validation_loss:
            self.validation_loss, self.epoch = loss, trainer.current_epoch + 1
            self.weights = {
                name: value.detach().cpu().clone() for name, value in pl_module.kept_model.state_dict().items()
            }

    def state_dict(self) -> dict[str, Any]:
        return {
            "validation_loss": self.validation_loss,
            "weights": self.weights,
            "epoch": self.epoch,
            "num_finite": self.num_finite,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_loss, self.weights = state_dict["validation_loss"], state_dict["weights"]
        self.epoch, self.num_finite = state_dict["epoch"], state_dict["num_finite"]
