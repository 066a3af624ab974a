"""How fast the memory operator is on this CPU, beside softmax attention, the reference and what the machine can do.

    OMP_NUM_THREADS=2 python benchmarks/operator_cpu.py                # a few minutes
    OMP_NUM_THREADS=2 python benchmarks/operator_cpu.py --repeats 5    # a first look

All contestants of a shape take turns, so that whatever else the machine does meets them alike. Inputs have the gates
with which training starts. Writes ``results/operator_cpu.json`` and ``.md`` beside this file.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trellis_ts.kernels import MemoryState, trellis_memory, trellis_memory_step

SHAPES = ((896, 42, 32), (224, 512, 32), (1792, 8, 8))  # rows, tokens, slots = head dim
GOALS = (1.5, 0.5, 1.5)
HEADS = 4
CONTEXTS = (64, 256, 1024, 4096, 16_384)
SEED = 0


def tokens(rows: int, time_steps: int, dim: int) -> dict[str, Tensor]:
    shape = (rows // HEADS, time_steps, HEADS)
    vectors = {name: functional.normalize(torch.randn(*shape, dim), dim=-1) for name in ("query", "key", "value")}
    log_forget = functional.logsigmoid(3.9 + torch.randn(shape))
    made = {**vectors, "target": torch.randn(*shape, dim), "log_forget": log_forget, "step_size": torch.rand(shape) / 5}
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def memory_pass(implementation: str, inputs: dict[str, Tensor], weight: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    output, _ = trellis_memory(**inputs, implementation=implementation)
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory_pass("cpu", inputs, weight)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    needed = sum(tensor.numel() for tensor in inputs.values()) + weight.numel()
    print(max(0.0, grown - 4 * needed / 2**20))


def decoding(repeats: int, longest_of_many: int) -> dict[str, Any]:
    """Time per token after feeding a context: the memory, in place, and attention with its keys and values kept."""
    result: dict[str, Any] = {"memory": [], "attention": []}
    many = tuple(context for context in (100, 1_000, 10_000) if context <= longest_of_many)
    for rows, contexts in ((1, (100, 1_000, 10_000, 100_000, 1_000_000)), (10_000, many)):
        one = {name: tensor[:, 0].detach() for name, tensor in tokens(HEADS, 1, 32).items()}
        one = {name: tensor[:, :1].expand(rows, 1, *tensor.shape[2:]).contiguous() for name, tensor in one.items()}
        state = MemoryState(*torch.zeros(2, rows, 1, 32, 32))
        fed = 0
        for context in contexts:
            while fed < context:  # many rows are fed in one long sequence's worth of steps at a time
                fed += feed(one, state, context - fed)
            step = functools.partial(trellis_memory_step, **one, state=state, inplace=True)
            seconds = [timed(step) for _ in range(repeats)]
            result["memory"].append({"rows": rows, "context": context, **summary(seconds)})
    for context in CONTEXTS:
        query, keys, values = torch.randn(1, 1, 1, 32), *torch.randn(2, 1, 1, context, 32)
        attend = functools.partial(functional.scaled_dot_product_attention, query, keys, values)
        seconds = [timed(attend) for _ in range(repeats)]
        result["attention"].append({"rows": 1, "context": context, **summary(seconds)})
    return result


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
        "| reference / memory | GFLOP/s | GB/s | extra MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
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
            f"{row['gflops']:.0f} | {row['gigabytes_per_second']:.1f} | {row['extra_mib']:.0f} |"
        )
    lines += ["", "One token after a context, microseconds, median (quartiles):", ""]
    lines += ["| | rows | context | microseconds |", "|---|---|---|---|"]
    for name, entries in report["decoding"].items():
        for entry in entries:
            low, median, high = (entry[key] * 1e3 for key in ("q1_ms", "median_ms", "q3_ms"))
            lines.append(f"| {name} | {entry['rows']} | {entry['context']} | {median:.0f} ({low:.0f}-{high:.0f}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--longest-of-many", type=int, default=1_000, help="context of 10,000 rows; 10000 is slow")
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    if options.peak:
        print_peak(tuple(options.peak))
        return
    report: dict[str, Any] = {"machine": machine(), "ceilings": ceilings(), "shapes": []}
    for shape in SHAPES:
        print(f"rows, tokens, slots = dim: {shape}", file=sys.stderr)
        report["shapes"].append({**measure_shape(shape, options.repeats), "extra_mib": peak_memory(shape)})
    report["decoding"] = decoding(max(options.repeats, 50), options.longest_of_many)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "operator_cpu.json").write_text(json.dumps(report, indent=2) + "\n")
    (results / "operator_cpu.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
