"""What a streaming model is worth beside a window model: error, training time, error against context, level shifts.

    python benchmarks/streaming_accuracy.py ETTm1 --max-epochs 4 --windows-per-epoch 4096 --origins 120
    python benchmarks/streaming_accuracy.py ~/data/vic_electricity.csv.gz --target Demand

Both models are trained in this process, one after the other, with the same settings; times are of the processor as well
as of the clock, because a shared machine disturbs only the latter much. Then, on the test rows: the error of each; that
of the streaming model when it is shown only the last so many steps before an origin; and after a shift of level by five
standard deviations, how many steps go by until each forecaster's error is back to 1.1 times what it was. Adds to
``results/streaming_accuracy.json`` and rewrites ``results/streaming_accuracy.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trellis_ts.causal import CausalModel
from trellis_ts.config import ExperimentConfig
from trellis_ts.datasets.sources import load_data
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.forecaster import Forecaster
from trellis_ts.passes import HistoryPass
from trellis_ts.preparation import prepare
from trellis_ts.training import EpochReport, SilentObserver, fit
from trellis_ts.types import Panel

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (96, 192, 384, 512, 1024, 2048, 5000, 10_000, 20_000)
SHIFT = 5.0
SETTINGS: dict[str, Any] = {
    "context_length": 512,
    "prediction_length": 96,
    "patch_length": 16,
    "width": 32,
    "num_heads": 4,
    "num_slots": 16,
    "feedforward_width": 64,
    "loss": "mae",
    "dropout": 0.1,
}


class Watch(SilentObserver):
    """Notes when each epoch ended, on both clocks."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def epoch_ended(self, report: EpochReport) -> None:
        self.epochs.append(
            {
                "epoch": report.epoch,
                "wall_seconds": time.monotonic() - self._wall,
                "cpu_seconds": time.process_time() - self._cpu,
                "validation_loss": report.validation_loss,
            }
        )


def train(panel: Panel, mode: str, settings: dict[str, Any]) -> tuple[Forecaster, list[dict[str, float]]]:
    """A model of one mode and the course of its training."""
    config = ExperimentConfig.of(**settings, mode=mode)
    preparation, watch = prepare(panel, config), Watch()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, summary = fit(preparation, Path(folder), observer=watch)
    print(mode, f"{summary.num_parameters:,} parameters, best epoch {summary.best_epoch}", watch.epochs[-1], flush=True)
    return Forecaster(checkpoint), watch.epochs


class Tested:
    """The test rows on the scale of the training rows, and forecasts at some origins in them."""

    def __init__(self, forecaster: Forecaster, panel: Panel, num_origins: int) -> None:
        from trellis_ts.origins import unseen_ranges

        self.forecaster, self.panel = forecaster, panel
        self.scaler, shape = forecaster.scaler().of(panel), forecaster.checkpoint.model.shape
        self.shape = shape
        self.scaled = ScaledPanel(panel, self.scaler, shape.season_length)
        start, stop = unseen_ranges(panel, forecaster.checkpoint.data)[0]
        self.origins = np.linspace(start, stop - shape.prediction_length, num_origins).astype(np.int64)

    def actual(self, origins: np.ndarray) -> torch.Tensor:
        batch = self.scaled.gather(np.zeros_like(origins), origins, 1, self.shape.prediction_length)
        assert batch.future is not None
        assert batch.future_observed is not None
        return torch.where(batch.future_observed, batch.future, torch.nan)

    def points(self, origins: np.ndarray, scaled: ScaledPanel | None = None) -> torch.Tensor:
        """Forecasts from everything before each origin, 64 at a time."""
        scaled = scaled or self.scaled
        predict, pieces = self.forecaster.predictor(scaled), []
        for at in range(0, len(origins), 64):
            part = origins[at : at + 64]
            pieces.append(predict(scaled.gather(np.zeros_like(part), part, self.shape.context_length, 0)).point)
        return torch.cat(pieces)

    def errors(self, points: torch.Tensor, actual: torch.Tensor) -> dict[str, float]:
        return {"mse": float((points - actual).square().nanmean()), "mae": float((points - actual).abs().nanmean())}

    def from_last(self, context: int) -> torch.Tensor:
        """Forecasts of the streaming model that has seen only so many steps before each origin."""
        model = self.forecaster.checkpoint.model
        assert isinstance(model, CausalModel)
        series = self.panel.series[0]
        cut = tuple(
            replace(series, name=str(origin), time=series.time[rows], values=series.values[rows])
            for origin in self.origins
            for rows in [slice(max(0, origin - context), origin)]
        )
        rows = [np.repeat(each, len(cut), axis=0) for each in (self.scaler.loc, self.scaler.scale)]
        scaler = replace(self.scaler, names=tuple(each.name for each in cut), loc=rows[0], scale=rows[1])
        scaled = ScaledPanel(replace(self.panel, series=cut), scaler, self.shape.season_length)
        ends = np.array([len(each) for each in cut], dtype=np.int64)
        passed = HistoryPass(model, scaled, torch.device("cpu"))
        blocks = [np.arange(at, min(at + 16, len(cut))) for at in range(0, len(cut), 16)]
        return torch.cat([passed.forecast(block, ends[block]).point for block in blocks])

    def recovery(self) -> dict[str, float]:
        """Steps after a shift of level until the error over eight origins is back to 1.1 times what it is without."""
        shape, step = self.shape, 8
        middle = int(self.origins[len(self.origins) // 2])
        last = int(self.origins[-1])
        origins = np.arange(middle + 1, min(middle + 3 * shape.context_length, last), step)
        series = self.panel.series[0]
        moved = series.values.copy()
        moved[middle:] += SHIFT * self.scaler.scale[0]
        panel = replace(self.panel, series=(replace(series, values=moved),))
        shifted = ScaledPanel(panel, self.scaler, shape.season_length)
        actual = self.actual(origins)
        usual = (self.points(origins) - actual).abs().nanmean(dim=(1, 2)).numpy()
        found = (self.points(origins, shifted) - actual - SHIFT).abs().nanmean(dim=(1, 2)).numpy()

        def smooth(each: np.ndarray) -> np.ndarray:
            return np.convolve(each, np.ones(8) / 8, mode="valid")

        ratio = smooth(found) / smooth(usual)
        good = np.flatnonzero(ratio <= 1.1)
        still = np.flatnonzero(ratio > 1.1)
        return {
            "first_back_steps": float(step * good[0]) if len(good) else float("nan"),
            "back_for_good_steps": float(step * (still[-1] + 1)) if len(still) else 0.0,
            "worst_ratio": float(ratio.max()),
            "of_steps": float(step * len(ratio)),
        }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All results for one table."""
    panel = load_data(arguments.data, target=None if arguments.target is None else (arguments.target,))
    settings = SETTINGS | {"max_epochs": arguments.max_epochs, "windows_per_epoch": arguments.windows_per_epoch}
    settings |= {"validation_windows": 2048, "seed": arguments.seed, "patience": 100}
    result: dict[str, Any] = {"settings": settings, "streaming_settings": arguments.streaming}
    tested: dict[str, Tested] = {}
    for mode in ("streaming", "window"):
        own = settings | (arguments.streaming if mode == "streaming" else {})
        forecaster, epochs = train(panel, mode, own)
        tested[mode] = Tested(forecaster, panel, arguments.origins)
        origins = tested[mode].origins
        begun = time.process_time()
        points = tested[mode].points(origins)
        result[mode] = tested[mode].errors(points, tested[mode].actual(origins)) | {
            "epochs": epochs,
            "parameters": sum(each.numel() for each in forecaster.checkpoint.model.parameters()),
            "forecast_cpu_seconds": time.process_time() - begun,
            "recovery": tested[mode].recovery(),
        }
        print(mode, {key: value for key, value in result[mode].items() if key != "epochs"}, flush=True)
    own, actual = tested["streaming"], tested["streaming"].actual(tested["streaming"].origins)
    result["by_context"] = {}
    for context in CONTEXTS:
        if context <= own.origins[0]:
            result["by_context"][str(context)] = own.errors(own.from_last(context), actual)
            print(context, result["by_context"][str(context)], flush=True)
    target = min(each["validation_loss"] for each in result["window"]["epochs"])
    reached = [each for each in result["streaming"]["epochs"] if each["validation_loss"] <= target]
    result["reached_window_validation"] = reached[0] if reached else None
    result["gates"] = gates(own)
    return result


def gates(tested: Tested) -> dict[str, Any]:
    """The forget gates along the test rows: how many tokens it takes until half is forgotten, per layer and head."""
    model = tested.forecaster.checkpoint.model
    assert isinstance(model, CausalModel)
    found: list[list[float]] = []
    hooks = []
    for block in model.blocks:
        seen: list[torch.Tensor] = []

        def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor, seen: list[torch.Tensor] = seen) -> None:
            seen.append(torch.sigmoid(output[..., : model.config.num_heads]).flatten(0, 1))

        hooks.append((block.mixer.gates.register_forward_hook(note), seen))  # type: ignore[union-attr, operator]
    HistoryPass(model, tested.scaled, torch.device("cpu")).forecast(np.array([0]), tested.origins[[0]])
    for hook, seen in hooks:
        hook.remove()
        log = torch.cat(seen).log().mean(dim=0)
        found.append((-np.log(2) / log).tolist())
    return {"half_life_tokens": found}


def write(results: dict[str, Any]) -> None:
    """The record as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming_accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Streaming models: error, context, level shifts", ""]
    lines += ["MSE and MAE on the scale of the training rows, at evenly spread origins of the test rows.", ""]
    for name, one in results.items():
        settings = f"Settings {one['settings']}, of the streaming model also {one['streaming_settings']}"
        lines += [f"## {name}", "", f"{settings}; {one['machine']}.", ""]
        titles = ("model", "MSE", "MAE", "parameters", "training, CPU s", "wall s", "back for good after a shift")
        lines += [f"| {' | '.join(titles)} | worst ratio |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for mode in ("window", "streaming"):
            row, shift = one[mode], one[mode]["recovery"]
            lines.append(
                f"| {mode} | {row['mse']:.4f} | {row['mae']:.4f} | {row['parameters']:,} | "
                f"{row['epochs'][-1]['cpu_seconds']:.0f} | {row['epochs'][-1]['wall_seconds']:.0f} | "
                f"{shift['back_for_good_steps']:.0f} of {shift['of_steps']:.0f} steps | {shift['worst_ratio']:.1f} |"
            )
        window, reached = one["window"]["epochs"][-1], one["reached_window_validation"]
        text = "the streaming model never reached the window model's best validation loss"
        if reached:
            share = reached["cpu_seconds"] / window["cpu_seconds"]
            text = (
                f"the streaming model reached the window model's best validation loss in {share:.2f} of its CPU time "
                f"({reached['wall_seconds'] / window['wall_seconds']:.2f} of its wall-clock)"
            )
        lines += ["", f"In training {text}.", "", "| steps seen before the origin | MSE | MAE |", "|---|---|---|"]
        lines += [f"| {int(c):,} | {e['mse']:.4f} | {e['mae']:.4f} |" for c, e in one["by_context"].items()]
        halves = "; ".join(", ".join(f"{each:.0f}" for each in layer) for layer in one["gates"]["half_life_tokens"])
        lines += ["", f"Tokens until the forget gates have halved the memory, per head and layer: {halves}.", ""]
    (RESULTS / "streaming_accuracy.md").write_text("\n".join(lines))


def main() -> None:
    """Runs one table and adds it to the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--target")
    parser.add_argument("--name", help="in the record; that of the data unless given")
    parser.add_argument("--max-epochs", type=int, default=6)
    parser.add_argument("--windows-per-epoch", type=int, default=8192)
    parser.add_argument("--origins", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", type=json.loads, default={}, help="settings of the streaming model, as JSON")
    arguments = parser.parse_args()
    path = RESULTS / "streaming_accuracy.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    one = run(arguments)
    one["machine"] = (
        f"{os.cpu_count()} shared {platform.machine()} cores, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}, commit {commit.strip()}"
    )
    results[arguments.name or Path(arguments.data).name.split(".")[0]] = one
    write(results)


if __name__ == "__main__":
    main()
