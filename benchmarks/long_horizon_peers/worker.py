"""One model of NeuralForecast, trained and asked for its forecasts in its own environment: ``worker.py FOLDER``.

Reads ``job.json`` and ``rows.npy`` (standardised, one column per channel); writes ``forecasts.npy``
``[origin, horizon, channel]`` and ``facts.json``.
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MAE, MSE
from neuralforecast.models import DLinear, PatchTST, iTransformer

_KINDS = {"dlinear": DLinear, "patchtst": PatchTST, "itransformer": iTransformer}
_ORIGINS_AT_ONCE = 256


def main() -> None:
    """Trains, times, forecasts."""
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    rows = np.load(folder / "rows.npy").astype(np.float32)
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    start, processor = time.monotonic(), time.process_time()
    model, validation_loss = _trained(job, rows)
    facts: dict[str, Any] = {
        "train_seconds": round(time.monotonic() - start, 2),
        "train_processor_seconds": round(time.process_time() - processor, 2),
    }
    start = time.monotonic()
    np.save(folder / "forecasts.npy", _forecasts(model, job, rows))
    facts |= {
        "test_seconds": round(time.monotonic() - start, 2),
        "validation_loss": validation_loss,
        "best_epoch": None,
        "num_epochs": None,
        "train_windows": job["train_stop"] - job["look_back"] - job["horizon"] + 1,
        "validation_windows": job["validation_stop"] - job["train_stop"] - job["horizon"] + 1,
        "num_parameters": sum(each.numel() for each in model.parameters()),
        "peak_memory_bytes": _peak_memory_bytes(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("neuralforecast", "torch", "numpy", "lightning")},
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _trained(job: dict[str, Any], rows: np.ndarray[Any, Any]) -> tuple[Any, float]:
    """The model after its last step, and its validation loss then; the library keeps no better one from before."""
    settings = dict(job["settings"])
    steps, windows, loss = settings.pop("max_steps"), settings.pop("batch_size"), settings.pop("loss")
    channels = rows.shape[1]
    kind = _KINDS[job["peer"]]
    shared: dict[str, Any] = {
        "h": job["horizon"],
        "input_size": job["look_back"],
        "loss": {"mae": MAE, "mse": MSE}[loss](),
        "max_steps": steps,
        "val_check_steps": steps,
        # Windows of all channels together in one step, or rows of single channels: as many numbers either way.
        "batch_size": channels,
        "windows_batch_size": windows if kind.MULTIVARIATE else windows * channels,
        "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR,
        "lr_scheduler_kwargs": {"T_max": steps},
        "random_seed": job["seed"] + 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    if kind.MULTIVARIATE:
        shared["n_series"] = channels
    known = rows[: job["validation_stop"]]
    frame = pd.DataFrame(
        {
            "unique_id": np.repeat([f"{each:04d}" for each in range(channels)], len(known)),
            "ds": np.tile(np.arange(len(known)), channels),
            "y": known.T.ravel(),
        }
    )
    forecaster = NeuralForecast([kind(**shared, **settings)], freq=1)
    forecaster.fit(frame, val_size=job["validation_stop"] - job["train_stop"])
    (model,) = forecaster.models
    return model.eval(), float(model.valid_trajectories[-1][1])


@torch.inference_mode()
def _forecasts(model: Any, job: dict[str, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """From every origin, by the network itself: the library's own way forecasts from the end of a table only."""
    origins = range(job["first_origin"], job["last_origin"] + 1)
    found = np.empty((len(origins), job["horizon"], rows.shape[1]), dtype=np.float32)
    for first in range(0, len(origins), _ORIGINS_AT_ONCE):
        chosen = origins[first : first + _ORIGINS_AT_ONCE]
        contexts = torch.from_numpy(np.stack([rows[each - job["look_back"] : each] for each in chosen]))  # [B, L, C]
        if not model.MULTIVARIATE:
            contexts = contexts.transpose(1, 2).flatten(0, 1)[..., None]  # [B * C, L, 1]
        output = model({"insample_y": contexts, "insample_mask": torch.ones_like(contexts)})
        if not model.MULTIVARIATE:
            output = output.view(len(chosen), rows.shape[1], job["horizon"]).transpose(1, 2)
        found[first : first + len(chosen)] = output.numpy()
    return found


def _peak_memory_bytes() -> int | None:
    """The most memory this process has held; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


if __name__ == "__main__":
    main()
