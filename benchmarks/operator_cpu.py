"""How fast the memory operator is on this CPU, beside softmax attention, the reference and what the machine can do.

    OMP_NUM_THREADS=2 python benchmarks/operator_cpu.py                # a few minutes
    OMP_NUM_THREADS=2 python benchmarks/operator_cpu.py --repeats 5    # a first look

All contestants of a shape take turns, so that whatever else the machine does meets them alike. A turn is two passes and
the second is timed, as training has them one after another: threads are awake and memory is at hand. Inputs have the
gates with which training starts. Attention decodes from keys and values kept in tensors that are long enough from the
start: a step writes its own into them and attends to all so far. Writes ``results/operator_cpu.json``, ``.md`` and
``operator_cpu_decoding.png`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional

from trellis_ts.kernels import MemoryState, trellis_memory, trellis_memory_step

SHAPES = ((896, 42, 32), (224, 512, 32), (1792, 8, 8))  # rows, tokens, slots = head dim
GOALS = (1.5, 0.5, 1.5)
HEADS = 4
# Rows, and the contexts after which one token is timed.
MEMORY_CONTEXTS = ((1, (100, 256, 1_000, 10_000, 100_000, 1_000_000)), (10_000, (100, 256, 1_000, 10_000)))
ATTENTION_CONTEXTS = ((1, (64, 256, 1_024, 4_096, 16_384)), (10_000, (64, 256, 1_024)))
PEAK_SHAPES = (*SHAPES, (16, 16_384, 32))
SEED = 0


def tokens(rows: int, time_steps: int, dim: int) -> dict[str, Tensor]:
    shape = (rows // HEADS, time_steps, HEADS)
    vectors = {name: functional.normalize(torch.randn(*shape, dim), dim=-1) for name in ("query", "key", "value")}
    log_forget = functional.logsigmoid(3.9 + torch.randn(shape))
    made = {**vectors, "target": torch.randn(*shape, dim), "log_forget": log_forget, "step_size": torch.rand(shape) / 5}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def memory_pass(implementation: str, inputs: dict[str, Tensor], weight: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    output, _ = trellis_memory(**inputs, final_state=False, implementation=implementation)  # as a layer trains
    middle = time.perf_counter()
    torch.autograd.grad(output, list(inputs.values()), weight)
    return middle - start, time.perf_counter() - middle


def attention_pass(inputs: tuple[Tensor, ...], weight: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    output = functional.scaled_dot_product_attention(*inputs)
    middle = time.perf_counter()
    torch.autograd.grad(output, inputs, weight)
    return middle - start, time.perf_counter() - middle


def summary(seconds: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"min_ms": min(seconds) * 1e3, "q1_ms": low * 1e3, "median_ms": median * 1e3, "q3_ms": high * 1e3}


def measure_shape(shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    rows, time_steps, dim = shape
    inputs = tokens(*shape)
    weight = torch.randn(inputs["query"].shape)
    attention_inputs = tuple(torch.randn(rows // HEADS, HEADS, time_steps, dim).requires_grad_() for _ in range(3))
    attention_weight = torch.randn(attention_inputs[0].shape)
    contestants: dict[str, Callable[[], tuple[float, float]]] = {
        "cpu": lambda: memory_pass("cpu", inputs, weight),
        "attention": lambda: attention_pass(attention_inputs, attention_weight),
        "reference": lambda: memory_pass("reference", inputs, weight),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for repeat in range(repeats):
        for name, run in contestants.items():
            if name != "reference" or repeat < 3:
                run()
                times[name].append(run())
    result: dict[str, Any] = {"rows": rows, "tokens": time_steps, "slots": dim, "dim": dim}
    for name, pairs in times.items():
        result[name] = {
            "forward": summary([forward for forward, _ in pairs]),
            "backward": summary([backward for _, backward in pairs]),
            "both": summary([sum(pair) for pair in pairs]),
        }
    best = result["cpu"]["both"]["min_ms"] / 1e3
    result["gflops"] = 56 * rows * time_steps * dim * dim / best / 1e9
    moved = sum(tensor.numel() for tensor in inputs.values()) * 3 + 3 * weight.numel()
    result["gigabytes_per_second"] = 4 * moved / best / 1e9
    return result


def ceilings() -> dict[str, float]:
    """A matrix product and a triad, as this machine manages them now."""
    a, b = torch.randn(2, 1024, 1024)
    x, y, z = torch.randn(3, 1 << 24)
    product = min(timed(lambda: torch.mm(a, b)) for _ in range(10))
    triad = min(timed(lambda: torch.add(x, y, alpha=3.0, out=z)) for _ in range(10))
    return {"matmul_gflops": 2 * 1024**3 / product / 1e9, "triad_gigabytes_per_second": 12 * (1 << 24) / triad / 1e9}


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(shape: tuple[int, int, int]) -> float:
    """MiB at the peak of one forward and backward pass, beyond inputs, output and gradients, in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", *map(str, shape)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def print_peak(shape: tuple[int, int, int]) -> None:
    memory_pass("cpu", warm := tokens(HEADS, 64, shape[2]), torch.ones(warm["query"].shape))
    inputs = tokens(*shape)
    weight = torch.ones(inputs["query"].shape)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    memory_pass("cpu", inputs, weight)
    needed = sum(tensor.numel() for tensor in inputs.values()) + weight.numel()
    print(resident("VmHWM") - before - 4 * needed / 2**20)


def resident(field: str) -> float:
    """MiB of this process, as Linux counts them: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def decoding(repeats: int) -> dict[str, Any]:
    """Time per token after a context: the memory, in place, and attention with its keys and values kept."""
    result: dict[str, Any] = {"memory": [], "attention": []}
    for rows, contexts in MEMORY_CONTEXTS:
        one = {name: tensor[:, 0].detach() for name, tensor in tokens(HEADS, 1, 32).items()}
        one = {name: tensor[:, :1].expand(rows, 1, *tensor.shape[2:]).contiguous() for name, tensor in one.items()}
        state = MemoryState(*torch.zeros(2, rows, 1, 32, 32))
        fed = 0
        for context in contexts:
            while fed < context:  # many rows are fed in one long sequence's worth of steps at a time
                fed += feed(one, state, context - fed)
            step = functools.partial(trellis_memory_step, **one, state=state, inplace=True)
            seconds = time_steps(step, repeats, rows)
            entry = {"rows": rows, "context": context, "resident_mib": resident("VmRSS")}
            result["memory"].append({**entry, **summary(seconds)})
    for rows, contexts in ATTENTION_CONTEXTS:
        for context in contexts:
            query, key, value = torch.randn(3, rows, 1, 1, 32)
            keys, values = torch.randn(2, rows, 1, context, 32)
            seconds = time_steps(functools.partial(attend, query, key, value, keys, values), repeats, rows)
            result["attention"].append({"rows": rows, "context": context, **summary(seconds)})
    return result


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys[:, :, -1:] = key
    values[:, :, -1:] = value
    return functional.scaled_dot_product_attention(query, keys, values)


@torch.inference_mode()
def time_steps(step: Callable[[], object], repeats: int, rows: int) -> list[float]:
    for _ in range(5):
        step()
    return [timed(step) for _ in range(repeats if rows > 1 else 20 * repeats)]


def feed(one: dict[str, Tensor], state: MemoryState, remaining: int) -> int:
    """Feed some tokens as one sequence, and leave the state in place; return how many."""
    count = min(remaining, max(1, 1_000_000 // len(one["query"])))
    sequence = {name: tensor.unsqueeze(1).expand(-1, count, *tensor.shape[1:]) for name, tensor in one.items()}
    _, final = trellis_memory(**sequence, initial_state=state)
    for memory, new in zip(state, final, strict=True):
        memory.copy_(new)
    return count


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numba", "llvmlite", "numpy")},
        "commit": commit,
        "seed": SEED,
    }


def table(report: dict[str, Any]) -> str:
    about, limits = report["machine"], report["ceilings"]
    lines = [
        "# The memory operator on a CPU",
        "",
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, load {about['load']:.1f}; float32; "
        f"torch {about['torch']}, numba {about['numba']}; commit {about['commit']}, seed {about['seed']}. Measured "
        f"ceilings: {limits['matmul_gflops']:.0f} GFLOP/s (matrix product), "
        f"{limits['triad_gigabytes_per_second']:.0f} GB/s (triad).",
        "",
        "Forward and backward in ms, median (quartiles); ratios of medians, and of minima in brackets.",
        "",
        "| rows x tokens, slots = dim | memory | attention | reference | memory / attention | goal "
        "| reference / memory | GFLOP/s | GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row, goal in zip(report["shapes"], GOALS, strict=True):
        both = {name: row[name]["both"] for name in ("cpu", "attention", "reference")}
        spread = {
            name: f"{value['median_ms']:.1f} ({value['q1_ms']:.1f}-{value['q3_ms']:.1f})"
            for name, value in both.items()
        }
        ratio = {kind: both["cpu"][kind] / both["attention"][kind] for kind in ("median_ms", "min_ms")}
        faster = both["reference"]["min_ms"] / both["cpu"]["min_ms"]
        lines.append(
            f"| {row['rows']} x {row['tokens']}, {row['dim']} | {spread['cpu']} | {spread['attention']} | "
            f"{spread['reference']} | {ratio['median_ms']:.2f} ({ratio['min_ms']:.2f}) | {goal} | {faster:.0f} | "
            f"{row['gflops']:.0f} | {row['gigabytes_per_second']:.1f} |"
        )
    lines += ["", "Memory at the peak of a forward and backward pass beyond inputs, output and gradients:", ""]
    lines += ["| rows x tokens, slots = dim | MiB |", "|---|---|"]
    for peak in report["peaks"]:
        lines.append(f"| {peak['rows']} x {peak['tokens']}, {peak['dim']} | {peak['extra_mib']:.1f} |")
    lines += ["", "One token after a context, microseconds, median (quartiles):", ""]
    lines += ["| | rows | context | microseconds |", "|---|---|---|---|"]
    for name, entries in report["decoding"].items():
        for entry in entries:
            low, median, high = (entry[key] * 1e3 for key in ("q1_ms", "median_ms", "q3_ms"))
            lines.append(f"| {name} | {entry['rows']} | {entry['context']} | {median:.0f} ({low:.0f}-{high:.0f}) |")
    return "\n".join(lines) + "\n"


def plot_decoding(entries: dict[str, Any], path: Path) -> None:
    """Time per token over the context, one panel per number of rows."""
    figure, panels = pyplot.subplots(1, len(MEMORY_CONTEXTS), figsize=(10, 4), layout="constrained")
    for panel, (rows, _) in zip(panels, MEMORY_CONTEXTS, strict=True):
        for name, marker in (("memory", "o"), ("attention", "s")):
            points = [entry for entry in entries[name] if entry["rows"] == rows]
            panel.errorbar(
                [point["context"] for point in points],
                [point["median_ms"] * 1e3 for point in points],
                yerr=[
                    [(point["median_ms"] - point["q1_ms"]) * 1e3 for point in points],
                    [(point["q3_ms"] - point["median_ms"]) * 1e3 for point in points],
                ],
                marker=marker,
                capsize=3,
                label=name,
            )
        panel.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="microseconds per token")
        panel.set_title(f"{rows:,} row{'s' if rows > 1 else ''}, slots = dim = 32")
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    if options.peak:
        print_peak(tuple(options.peak))
        return
    report: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "shapes": []}
    for shape in SHAPES:
        print(f"rows, tokens, slots = dim: {shape}", file=sys.stderr)
        report["shapes"].append(measure_shape(shape, options.repeats))
    report["peaks"] = [
        {"rows": shape[0], "tokens": shape[1], "dim": shape[2], "extra_mib": peak_memory(shape)}
        for shape in PEAK_SHAPES
    ]
    report["decoding"] = decoding(max(options.repeats, 50))
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "operator_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    (results / "operator_cpu.md").write_text(table(report))
    plot_decoding(report["decoding"], results / "operator_cpu_decoding.png")
    print(table(report))


if __name__ == "__main__":
    main()
