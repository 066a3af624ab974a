"""What a streaming model and its memory are worth: error against how much it has seen, training time, level shifts.

    python benchmarks/streaming_accuracy.py ETTm1
    python benchmarks/streaming_accuracy.py vic_electricity.csv.gz --time Time --target Demand --settings \\
        '{"prediction_length": 48, "patch_length": 8, "calendar_features": false}' --name "vic_electricity, no calendar"

Models of one set of settings are trained in this process one after the other: streaming with a short and with a long
context; with the short one and the memory's answers set to zero; with the short one and softmax attention over the last
256 situations and outcomes in the memory's place; and window models of both contexts. Times are of the processor,
because a shared machine disturbs only the clock much. Then, on the test rows: the error of each, when it is shown only
the last so many steps before an origin; what one live forecast costs; and after a shift of level by five standard
deviations, how many steps go by until the error is back to 1.1 times what it was. Adds to
``results/streaming_accuracy.json`` model by model, and rewrites ``results/streaming_accuracy.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from trellis_ts.causal import CausalModel
from trellis_ts.config import ExperimentConfig
from trellis_ts.datasets.sources import load_data
from trellis_ts.datasets.windows import ScaledPanel
from trellis_ts.forecaster import Forecaster
from trellis_ts.kernels import MemoryState
from trellis_ts.kernels.memory.types import Tokens
from trellis_ts.layers import causal
from trellis_ts.passes import HistoryPass
from trellis_ts.preparation import prepare
from trellis_ts.streaming.forecaster import StreamingForecaster
from trellis_ts.training import EpochReport, SilentObserver, fit
from trellis_ts.types import Panel

RESULTS = Path(__file__).parent / "results"
CONTEXTS = (96, 192, 384, 512, 1024, 2048, 5000, 10_000, 20_000)
SHIFT = 5.0
SETTINGS: dict[str, Any] = {
    "prediction_length": 96,
    "patch_length": 16,
    "width": 64,
    "feedforward_width": 64,
    "loss": "mae",
    "dropout": 0.1,
    "learning_rate": 0.002,
    "batch_size": 64,
    "max_epochs": 20,
    "windows_per_epoch": 4096,
    "validation_windows": 2048,
    "patience": 100,
}
CACHED = 256


class CachedAttention(causal.CausalMixer):
    """Softmax attention over the last situations and their outcomes, in the place of the memory."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sharpness = nn.Parameter(torch.full((self.num_heads,), 8.0))

    def start(self, num_rows: int) -> causal.CausalLayerState:
        state = super().start(num_rows)
        empty = state.waiting.new_zeros(num_rows, self.num_heads, CACHED, self.head_dim)
        return state._replace(memory=MemoryState(empty, empty))

    def run(
        self, inputs: Tokens, memory: MemoryState | None, *, final_state: bool = True
    ) -> tuple[Tensor, MemoryState]:
        assert memory is not None
        query = inputs.query.transpose(1, 2)  # [R, H, 2 N, D]
        is_written = (inputs.step_size[:, ::2, :, None] > 0).transpose(1, 2)  # [R, H, N, 1]
        new = ((each[:, ::2].transpose(1, 2) * is_written) for each in (inputs.key, inputs.value))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(memory, new, strict=True))
        scores = query @ keys.transpose(2, 3) * self.sharpness[:, None, None]
        places = torch.arange(keys.shape[2], device=keys.device)
        seen = places <= CACHED + torch.arange(query.shape[2], device=keys.device)[:, None] // 2
        is_there = seen & (keys != 0).any(dim=3)[:, :, None]
        weights = scores.masked_fill(~is_there, -1e9).softmax(dim=-1) * is_there
        return (weights @ values).transpose(1, 2).flatten(2), MemoryState(keys[:, :, -CACHED:], values[:, :, -CACHED:])


@contextmanager
def silent() -> Iterator[None]:
    """Within it the memories answer nothing."""
    run = causal.CausalMixer.run

    def answer(mixer: Any, *arguments: Any, **options: Any) -> Any:
        output, memory = run(mixer, *arguments, **options)
        return torch.zeros_like(output), memory

    with mock.patch.object(causal.CausalMixer, "run", answer):
        yield


@dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    mode: str
    context: str
    memory: str = "trellis"

    @property
    def own(self) -> Any:
        """What is in force while it is trained and asked."""
        if self.memory == "attention":
            return mock.patch.object(causal, "CausalMixer", CachedAttention)
        return silent() if self.memory == "silent" else nullcontext()


VARIANTS = {
    "streaming, short": Variant("streaming", "short"),
    "streaming, short, memory silent": Variant("streaming", "short", "silent"),
    "streaming, short, attention with a cache": Variant("streaming", "short", "attention"),
    "streaming, long": Variant("streaming", "long"),
    "streaming, long, memory silent": Variant("streaming", "long", "silent"),
    "window, short": Variant("window", "short"),
    "window, long": Variant("window", "long"),
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


def train(panel: Panel, settings: dict[str, Any]) -> tuple[Forecaster, list[dict[str, float]]]:
    """A model and the course of its training."""
    config = ExperimentConfig.of(**settings)
    preparation, watch = prepare(panel, config), Watch()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, _ = fit(preparation, Path(folder), observer=watch)
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

    def actual(self, origins: np.ndarray) -> Tensor:
        batch = self.scaled.gather(np.zeros_like(origins), origins, 1, self.shape.prediction_length)
        assert batch.future is not None
        assert batch.future_observed is not None
        return torch.where(batch.future_observed, batch.future, torch.nan)

    def points(self, origins: np.ndarray, scaled: ScaledPanel | None = None) -> Tensor:
        """Forecasts from everything before each origin, 64 at a time."""
        scaled = scaled or self.scaled
        predict, pieces = self.forecaster.predictor(scaled), []
        for at in range(0, len(origins), 64):
            part = origins[at : at + 64]
            pieces.append(predict(scaled.gather(np.zeros_like(part), part, self.shape.context_length, 0)).point)
        return torch.cat(pieces)

    def errors(self, points: Tensor) -> dict[str, float]:
        actual = self.actual(self.origins)
        return {"mse": float((points - actual).square().nanmean()), "mae": float((points - actual).abs().nanmean())}

    def from_last(self, context: int) -> Tensor:
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
        step = 8
        middle = int(self.origins[len(self.origins) // 2])
        last = int(self.origins[-1])
        origins = np.arange(middle + 1, min(middle + 1536, last), step)
        series = self.panel.series[0]
        moved = series.values.copy()
        moved[middle:] += SHIFT * self.scaler.scale[0]
        panel = replace(self.panel, series=(replace(series, values=moved),))
        shifted = ScaledPanel(panel, self.scaler, self.shape.season_length)
        actual = self.actual(origins)
        usual = (self.points(origins) - actual).abs().nanmean(dim=(1, 2)).numpy()
        found = (self.points(origins, shifted) - actual - SHIFT).abs().nanmean(dim=(1, 2)).numpy()

        def smooth(each: np.ndarray) -> np.ndarray:
            return np.convolve(each, np.ones(8) / 8, mode="valid")

        ratio = smooth(found) / smooth(usual)
        good, still = np.flatnonzero(ratio <= 1.1), np.flatnonzero(ratio > 1.1)
        return {
            "first_back_steps": float(step * good[0]) if len(good) else float("nan"),
            "back_for_good_steps": float(step * (still[-1] + 1)) if len(still) else 0.0,
            "worst_ratio": float(ratio.max()),
            "of_steps": float(step * len(ratio)),
        }

    def live_cost(self, memory: str) -> dict[str, float]:
        """Processor milliseconds of one forecast of all channels after one more step, and bytes held for it."""
        model, series = self.forecaster.checkpoint.model, self.panel.series[0]
        channels, first = self.panel.num_channels, int(self.origins[0])
        costs = []
        if isinstance(model, CausalModel) and memory == "trellis":
            live = StreamingForecaster(self.forecaster.checkpoint, adaptive=False)
            live.update(series.values[first - 1000 : first], series.time[first - 1000])
            held = live.bytes_per_series
        elif isinstance(model, CausalModel):
            return {"bytes": sum(each.nbytes for layer in model.start(1).layers for each in (*layer.memory,))}
        else:
            predict, held = self.forecaster.predictor(self.scaled), self.shape.context_length * channels * 8
        for index in range(first, first + 200):
            begun = time.thread_time()
            if isinstance(model, CausalModel):
                live.update(series.values[index], series.time[index])
                live.forecast()
            else:
                where = np.array([index])
                predict(self.scaled.gather(np.zeros_like(where), where, self.shape.context_length, 0))
            costs.append(1000 * (time.thread_time() - begun))
        return {"forecast_cpu_ms": float(np.median(costs)), "bytes": held}


def measure(panel: Panel, variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """All of one model."""
    settings = SETTINGS | arguments.settings | {"mode": variant.mode, "seed": arguments.seed}
    settings["context_length"] = arguments.short if variant.context == "short" else arguments.long
    if variant.mode == "streaming":
        settings |= arguments.streaming
    with variant.own:
        forecaster, epochs = train(panel, settings)
        tested = Tested(forecaster, panel, arguments.origins)
        found: dict[str, Any] = {"settings": settings, "epochs": epochs}
        found |= tested.errors(tested.points(tested.origins)) | tested.live_cost(variant.memory)
        found["parameters"] = sum(each.numel() for each in forecaster.checkpoint.model.parameters())
        found["recovery"] = tested.recovery()
        found["by_context"] = {}
        if variant.mode == "streaming":
            contexts = [each for each in CONTEXTS if each <= tested.origins[0]]
            found["by_context"] = {str(each): tested.errors(tested.from_last(each)) for each in contexts}
            found["half_life_tokens"] = half_lives(tested)
    return found


def half_lives(tested: Tested) -> list[list[float]]:
    """How many tokens it takes along the test rows until half is forgotten, per layer and head."""
    model = tested.forecaster.checkpoint.model
    assert isinstance(model, CausalModel)
    found, hooks = [], []
    for block in model.blocks:
        seen: list[Tensor] = []

        def note(module: nn.Module, inputs: Any, output: Tensor, seen: list[Tensor] = seen) -> None:
            seen.append(torch.sigmoid(output[..., : model.config.num_heads]).flatten(0, 1))

        hooks.append((block.mixer.gates.register_forward_hook(note), seen))  # type: ignore[union-attr, operator]
    HistoryPass(model, tested.scaled, torch.device("cpu")).forecast(np.array([0]), tested.origins[[0]])
    for hook, seen in hooks:
        hook.remove()
        found.append((-np.log(2) / torch.cat(seen).log().mean(dim=0)).tolist())
    return found


def write(results: dict[str, Any]) -> None:
    """The record as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "streaming_accuracy.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = ["# Streaming models: error against what was seen, cost, level shifts", ""]
    lines += ["MSE on the scale of the training rows, at evenly spread origins of the test rows.", ""]
    for name, models in results.items():
        one = next(iter(models.values()))
        shared = {key: value for key, value in one["settings"].items() if key not in ("mode", "context_length", "seed")}
        lines += [f"## {name}", "", f"{shared}; {one['machine']}.", ""]
        contexts = [each for each in map(str, CONTEXTS) if any(each in row["by_context"] for row in models.values())]
        heads = ["model", "context", *(f"{int(each):,} seen" for each in contexts), "all seen", "MAE", "parameters"]
        heads += ["training, CPU s", "forecast, CPU ms", "state, bytes", "steps to recover", "worst ratio"]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for label, row in models.items():
            cells = [label, str(row["settings"]["context_length"])]
            cells += [f"{row['by_context'][each]['mse']:.4f}" if each in row["by_context"] else "" for each in contexts]
            cells += [f"{row['mse']:.4f}", f"{row['mae']:.4f}", f"{row['parameters']:,}"]
            cost = f"{row['forecast_cpu_ms']:.2f}" if "forecast_cpu_ms" in row else ""
            cells += [f"{row['epochs'][-1]['cpu_seconds']:.0f}", cost, f"{row['bytes']:,}"]
            shift = row["recovery"]
            cells += [f"{shift['back_for_good_steps']:.0f} of {shift['of_steps']:.0f}", f"{shift['worst_ratio']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_races(models), ""]
    (RESULTS / "streaming_accuracy.md").write_text("\n".join(lines))


def _races(models: dict[str, Any]) -> list[str]:
    """How soon the streaming model was as good as the window model of the same context ever got."""
    lines = []
    for label, row in models.items():
        rival = models.get(label.replace("streaming", "window"))
        if rival is None or rival is row:
            continue
        target = min(each["validation_loss"] for each in rival["epochs"])
        reached = [each["cpu_seconds"] for each in row["epochs"] if each["validation_loss"] <= target]
        share = f"{reached[0] / rival['epochs'][-1]['cpu_seconds']:.2f} of its CPU time" if reached else "never"
        lines += [f"- {label}: as good in validation as the window model's best epoch: {share}."]
    return lines


def main() -> None:
    """Runs one table and adds it to the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--time", help="column with the time stamps")
    parser.add_argument("--target", help="columns to forecast, separated by |")
    parser.add_argument("--name", help="in the record; that of the data unless given")
    parser.add_argument("--models", default="|".join(VARIANTS), help="which, separated by |")
    parser.add_argument("--short", type=int, default=96)
    parser.add_argument("--long", type=int, default=512)
    parser.add_argument("--origins", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="other settings of all models, as JSON")
    parser.add_argument("--streaming", type=json.loads, default={}, help="of the streaming models alone, as JSON")
    arguments = parser.parse_args()
    target = None if arguments.target is None else tuple(arguments.target.split("|"))
    panel = load_data(arguments.data, time=arguments.time, target=target)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    machine = f"{os.cpu_count()} shared {platform.machine()} cores, {torch.get_num_threads()} thread(s), torch "
    machine += f"{torch.__version__}, commit {commit.strip()}"
    path = RESULTS / "streaming_accuracy.json"
    for label in arguments.models.split("|"):
        found = measure(panel, VARIANTS[label], arguments) | {"machine": machine}
        results = json.loads(path.read_text()) if path.exists() else {}
        name = f"{arguments.name or Path(arguments.data).name.split('.')[0]}, seed {arguments.seed}"
        results.setdefault(name, {})[label] = found
        write(results)
        shown = ("mse", "mae", "parameters", "forecast_cpu_ms", "bytes", "recovery", "half_life_tokens")
        print(label, {key: found[key] for key in shown if key in found}, flush=True)
        print([(round(each["cpu_seconds"]), round(each["validation_loss"], 4)) for each in found["epochs"]])
        print({context: round(each["mse"], 4) for context, each in found["by_context"].items()}, flush=True)


if __name__ == "__main__":
    main()
