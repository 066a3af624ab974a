"""Speed and memory of the Triton kernels on a GPU, beside attention, other bounded memories, and what the GPU can do.

    python benchmarks/operator_gpu.py                                  # everything
    python benchmarks/operator_gpu.py --tables long --longest 4096     # a first look

It needs an NVIDIA GPU of compute capability 8.0 or higher, by arithmetic some 20 GB free for the longest sequences,
torch 2.10 or later built for CUDA, the Triton that comes with it, and this package (``pip install .``). Where
flash-linear-attention is installed it is measured too. Most of the time goes into compiling: a few seconds for each of
some hundred kernels, the first time.

It runs a short correctness check first and stops if it fails, then writes operator_gpu.json and .md to
benchmarks/results/, anew after every shape, so that a run cut short leaves what it has:

- long sequences: batch 8, 8 heads, 64 slots, head width 64, bfloat16, 64 to 32,768 tokens, forward and forward plus
  backward, against torch's FlashAttention and, where `fla` (flash-linear-attention) can be imported, its gated delta
  rule and gated slot attention; and from which length on the memory is the faster one
- many short sequences, as patched time series give: 10,000 rows of up to 64 tokens
- for each time the operations and bytes the work needs at least, as a share of ceilings measured on the same GPU
  (float32 multiply-add, bfloat16 matrix product, copy), and the roofline's bound

What a method failed on is recorded too; the exit code is 1 if one of this package's did.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention

from trellis_ts.kernels import MemoryState, trellis_memory

RESULTS = Path(__file__).parent / "results"
LENGTHS = [64 * 2**i for i in range(10)]
SHORT = [(10_000, 8, 8), (10_000, 16, 16), (10_000, 32, 32), (10_000, 64, 32), (10_000, 64, 64)]
"""Rows, slots, head width."""
SHORT_LENGTHS = [6, 16, 42, 64]
CHUNK_LENGTHS = [1, 16, 32, 64, 128]
MOST_STEPS_IN_ORDER = 8192
"""Longest sequence the exact recurrence is timed on: its time grows with the length and nothing else."""


@dataclass(frozen=True)
class Shape:
    """What is computed on."""

    batch: int
    num_tokens: int
    num_heads: int
    num_slots: int
    head_dim: int

    @property
    def tokens(self) -> int:
        """Return the tokens of all rows together."""
        return self.batch * self.num_tokens * self.num_heads


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches when asked for one thing only."""

    float32_flops: float
    matmul_flops: float
    copy_bytes: float


@dataclass(frozen=True)
class Row:
    """One measurement."""

    table: str
    method: str
    shape: Shape
    with_backward: bool
    milliseconds: float
    peak_bytes: int
    """Above what the inputs take."""
    flops_per_second: float | None
    """Of the work the method's definition needs, whatever the kernel does beyond that."""
    bytes_per_second: float | None
    """Of inputs read and outputs written once."""
    bound_milliseconds: float | None
    """What the roofline allows: the slower of that work and those bytes at the measured ceilings."""


def make_inputs(shape: Shape) -> dict[str, Tensor]:
    """Return random inputs as a layer would give them, in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = (shape.batch, shape.num_tokens, shape.num_heads)

    def normal(width: int) -> Tensor:
        return torch.randn((*tokens, width), generator=generator, device="cuda")

    inputs = {name: normalize(normal(shape.head_dim), dim=-1) for name in ("query", "key", "value")}
    inputs["target"] = normal(shape.num_slots)
    inputs["log_forget"] = -0.05 * torch.rand(tokens, generator=generator, device="cuda")
    inputs["step_size"] = 0.2 * torch.rand(tokens, generator=generator, device="cuda")
    return {name: tensor.bfloat16().requires_grad_() for name, tensor in inputs.items()}


def check() -> None:
    """Compare with the reference on one shape per form, and stop the program if they differ.

    Raises:
        SystemExit: they differ.
    """
    shape = Shape(2, 100, 2, 64, 64)
    inputs = make_inputs(shape)
    generator = torch.Generator("cuda").manual_seed(1)
    state = MemoryState(*torch.randn((2, 2, 2, 64, 64), generator=generator, device="cuda").unbind())
    for chunk_length in (1, 64):
        gradients = []
        for implementation in ("reference", "triton"):
            output, _ = trellis_memory(
                **inputs, initial_state=state, chunk_length=chunk_length, implementation=implementation
            )
            gradients.append([output, *torch.autograd.grad(output.float().square().sum(), list(inputs.values()))])
        for name, expected, actual in zip(("output", *inputs), *gradients, strict=True):
            error = (expected.float() - actual.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
            print(f"check: chunk_length {chunk_length}, {name}: relative error {error:.1e}")
            if not error < 3e-2:
                sys.exit(f"the kernels do not agree with the reference at chunk_length={chunk_length} in {name}")


def measure_time(run: Callable[[], object]) -> float:
    """Return the median time of a call in milliseconds."""
    import triton

    return float(triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median"))


def measure_ceilings() -> Ceilings:
    """Measure what a large matrix product, a chain of multiply-adds and a large copy reach."""
    size = 8192
    left, right = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / measure_time(lambda: left @ right) * 1e3
    previous = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    wide_left, wide_right = left.float(), right.float()
    float32 = 2 * size**3 / measure_time(lambda: wide_left @ wide_right) * 1e3
    torch.backends.cuda.matmul.allow_tf32 = previous
    source = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / measure_time(lambda: target.copy_(source)) * 1e3
    return Ceilings(float32_flops=float32, matmul_flops=matmul, copy_bytes=copy)


def memory_methods(shape: Shape) -> Iterator[tuple[str, dict[str, Tensor], Callable[..., Tensor]]]:
    """Yield name, inputs and function of the memory at every chunk length worth timing."""
    inputs = make_inputs(shape)
    for chunk_length in CHUNK_LENGTHS:
        too_long = chunk_length == 1 and shape.num_tokens > MOST_STEPS_IN_ORDER
        if too_long or (chunk_length > 1 and chunk_length > shape.num_tokens):
            continue

        def run(chunk_length: int = chunk_length, **inputs: Tensor) -> Tensor:
            return trellis_memory(**inputs, chunk_length=chunk_length, implementation="triton")[0]

        yield f"trellis, chunk {chunk_length}", inputs, run


def attention_methods(shape: Shape) -> Iterator[tuple[str, dict[str, Tensor], Callable[..., Tensor]]]:
    """Yield causal FlashAttention."""
    size = (shape.batch, shape.num_heads, shape.num_tokens, shape.head_dim)
    inputs = {
        name: torch.randn(size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for name in ("query", "key", "value")
    }

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True)

    yield "FlashAttention, causal", inputs, run


def linear_attention_methods(shape: Shape) -> Iterator[tuple[str, dict[str, Tensor], Callable[..., Tensor]]]:
    """Yield flash-linear-attention's gated delta rule and gated slot attention, if it is there."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gsa import chunk_gsa
    except ImportError as error:
        print(f"flash-linear-attention is left out: {error}")
        return
    inputs = make_inputs(shape)

    def gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
        return chunk_gated_delta_rule(query, key, value, g=gate, beta=beta)[0]

    def gated_slot_attention(query: Tensor, key: Tensor, value: Tensor, slots: Tensor, gate: Tensor) -> Tensor:
        return chunk_gsa(query, key, value, slots, g=gate)[0]

    common = {name: inputs[name] for name in ("query", "key", "value")}
    gates = {"gate": inputs["log_forget"], "beta": inputs["step_size"]}
    yield "fla gated delta rule", common | gates, gated_delta_rule
    slot_gate = inputs["log_forget"].detach()[..., None].expand_as(inputs["target"]).contiguous().requires_grad_()
    yield "fla gated slot attention", common | {"slots": inputs["target"], "gate": slot_gate}, gated_slot_attention


def work(method: str, shape: Shape, with_backward: bool) -> tuple[float, float] | None:
    """Return operations and bytes the definition of ``method`` needs at least, or None where this does not count them.

    The memory as in kernels/memory/README.md, without recomputation: 14 M D per token forwards, 28 M D backwards;
    attention with the causal half of its products, 2.5 times that backwards.
    """
    token_bytes = 2 * (4 * shape.head_dim + shape.num_slots + 2)
    if method.startswith("trellis"):
        flops = (42 if with_backward else 14) * shape.num_slots * shape.head_dim * shape.tokens
        return flops, token_bytes * shape.tokens * (3 if with_backward else 1)
    if method.startswith("FlashAttention"):
        flops = 2 * shape.num_tokens * shape.head_dim * shape.tokens * (3.5 if with_backward else 1)
        return flops, 8 * shape.head_dim * shape.tokens * (3 if with_backward else 1)
    return None


def measure(
    table: str,
    method: str,
    shape: Shape,
    inputs: dict[str, Tensor],
    run: Callable[..., Tensor],
    ceilings: Ceilings,
) -> Iterator[Row]:
    """Time forward, and forward plus backward."""
    output_grad = torch.randn_like(run(**inputs))
    leaves = list(inputs.values())

    def forward() -> None:
        with torch.no_grad():
            run(**inputs)

    def both() -> None:
        torch.autograd.grad(run(**inputs), leaves, output_grad)

    for with_backward, call in ((False, forward), (True, both)):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        milliseconds = measure_time(call)
        flops_per_second = bytes_per_second = bound = None
        needed = work(method, shape, with_backward)
        if needed is not None:
            flops, moved = needed
            exact = method.endswith("chunk 1")
            bound = 1e3 * max(
                flops / (ceilings.float32_flops if exact else ceilings.matmul_flops), moved / ceilings.copy_bytes
            )
            flops_per_second, bytes_per_second = flops / milliseconds * 1e3, moved / milliseconds * 1e3
        yield Row(table, method, shape, with_backward, milliseconds, peak, flops_per_second, bytes_per_second, bound)


def all_shapes(tables: list[str], longest: int) -> Iterator[tuple[str, Shape]]:
    """Yield every table's name with its shapes."""
    if "long" in tables:
        yield from (("long", Shape(8, length, 8, 64, 64)) for length in LENGTHS if length <= longest)
    if "short" in tables:
        for rows, slots, dim in SHORT:
            yield from (("short", Shape(rows, length, 1, slots, dim)) for length in SHORT_LENGTHS)


def measure_shape(table: str, shape: Shape, ceilings: Ceilings, failures: list[str]) -> Iterator[Row]:
    """Measure every method on a shape; one that fails, or runs out of memory, is entered into ``failures``."""
    makers = [memory_methods, attention_methods] + ([linear_attention_methods] if table == "long" else [])
    for maker in makers:
        for method, inputs, run in maker(shape):
            try:
                for row in measure(table, method, shape, inputs, run, ceilings):
                    kind = "forward+backward" if row.with_backward else "forward"
                    print(f"{table} {method} {shape}: {kind} {row.milliseconds:.3f} ms", flush=True)
                    yield row
            except Exception as error:  # one method's trouble, whatever it is, must not cost the others' results
                first_line = next(iter(str(error).splitlines()), "")
                failures.append(f"{method} {shape}: {type(error).__name__}: {first_line}")
                print(f"{table} {failures[-1]}", flush=True)
        torch.cuda.empty_cache()


def crossover(rows: list[Row], method: str, with_backward: bool) -> int | None:
    """Return the shortest length from which on ``method`` is faster than attention at every length measured."""
    times: dict[str, dict[int, float]] = {method: {}, "FlashAttention, causal": {}}
    for row in rows:
        if row.table == "long" and row.method in times and row.with_backward == with_backward:
            times[row.method][row.shape.num_tokens] = row.milliseconds
    ours, theirs = times.values()
    shortest = None
    for length in sorted(ours.keys() & theirs.keys(), reverse=True):
        if ours[length] >= theirs[length]:
            break
        shortest = length
    return shortest


def markdown(rows: list[Row], ceilings: Ceilings, machine: dict[str, Any], failures: list[str]) -> str:
    """Lay out what was measured."""
    lines = ["# The memory's kernels on a GPU", "", "`python benchmarks/operator_gpu.py`", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        f"- ceilings measured: float32 {ceilings.float32_flops / 1e12:.1f} TFLOP/s, bfloat16 matrix product "
        f"{ceilings.matmul_flops / 1e12:.1f} TFLOP/s, copy {ceilings.copy_bytes / 1e12:.2f} TB/s",
        "",
        "Times are medians. Operations and bytes are those the definition needs, not those the kernel spends.",
    ]
    for table in ("long", "short"):
        lines += ["", f"## {'Long sequences' if table == 'long' else 'Many short sequences'}", ""]
        lines += [
            "| B | T | H | M | D | method | pass | ms | bound, ms | peak, MB | TFLOP/s | GB/s |",
            "|---" * 12 + "|",
        ]
        for row in rows:
            if row.table != table:
                continue
            cells = [*asdict(row.shape).values(), row.method, "fwd+bwd" if row.with_backward else "fwd"]
            cells += [
                f"{row.milliseconds:.3f}",
                "" if row.bound_milliseconds is None else f"{row.bound_milliseconds:.3f}",
            ]
            cells += [f"{row.peak_bytes / 1e6:.0f}"]
            cells += ["" if row.flops_per_second is None else f"{row.flops_per_second / 1e12:.2f}"]
            cells += ["" if row.bytes_per_second is None else f"{row.bytes_per_second / 1e9:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## From which length on the memory is faster than FlashAttention", "", "| method | fwd | fwd+bwd |"]
    lines.append("|---|---|---|")
    for chunk_length in CHUNK_LENGTHS:
        method = f"trellis, chunk {chunk_length}"
        found = [crossover(rows, method, with_backward) or "not measured" for with_backward in (False, True)]
        lines.append(f"| {method} | {found[0]} | {found[1]} |")
    if failures:
        lines += ["", "## What failed", "", *(f"- {failure}" for failure in failures)]
    return "\n".join(lines) + "\n"


def describe_machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import triton

    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "GPU": torch.cuda.get_device_name(),
        "compute capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA": torch.version.cuda,
        "torch": torch.__version__,
        "Triton": triton.__version__,
        "Python": platform.python_version(),
        "commit": commit or "unknown",
    }


def why_not() -> str | None:
    """Say what this machine lacks, or None."""
    if not torch.cuda.is_available():
        return "a CUDA device that torch can use"
    if torch.cuda.get_device_capability() < (8, 0):
        return "a GPU of compute capability 8.0 or higher"
    return "Triton" if importlib.util.find_spec("triton") is None else None


def main() -> None:
    """Check, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=("long", "short"), default=["long", "short"])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest sequence of the first table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder the results go to")
    arguments = parser.parse_args()
    missing = why_not()
    if missing is not None:
        sys.exit(f"this benchmark needs {missing}, and there is none here")
    check()
    ceilings, machine = measure_ceilings(), describe_machine()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failures: list[str] = []
    for table, shape in all_shapes(arguments.tables, arguments.longest):
        rows += measure_shape(table, shape, ceilings, failures)
        document = {"machine": machine, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}
        document["failures"] = failures
        (arguments.output / "operator_gpu.json").write_text(json.dumps(document, indent=1) + "\n")
        (arguments.output / "operator_gpu.md").write_text(markdown(rows, ceilings, machine, failures))
    if any(failure.startswith("trellis") for failure in failures):
        sys.exit("this package's kernels failed on some shapes: see 'What failed' in operator_gpu.md")


if __name__ == "__main__":
    main()
