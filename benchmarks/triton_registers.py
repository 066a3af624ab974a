"""Registers, shared memory and spills of every GPU kernel in the tuning table, compiled without a GPU.

    python benchmarks/triton_registers.py

writes benchmarks/results/triton_registers.json and .md. Spilled registers go to slow memory: no kernel should spill at
64 slots and head width 64, the paper's sizes. A kernel that wants more shared memory than there is cannot run at all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trellis_ts.kernels.memory import (
    triton_chunk_backward,
    triton_chunk_forward,
    triton_chunk_parts,
    triton_exact_backward,
    triton_exact_forward,
    tuning,
)

RESULTS = Path(__file__).parent / "results"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Most shared memory one program can have, by compute capability."""
REGISTERS_PER_SM = 65536

MODULES = (
    triton_exact_forward,
    triton_exact_backward,
    triton_chunk_parts,
    triton_chunk_forward,
    triton_chunk_backward,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VECTORS = {"p_query", "p_key", "p_value", "p_target", "p_output"}
"""Pointers in the dtype of the tokens, as are their gradients."""
OPERANDS = {"p_states", "p_states_grad", "p_written", "p_codes"}
"""Pointers to what products of matrices take: bfloat16 if tokens are, else float32. Gates may be either."""


@dataclass(frozen=True)
class Launch:
    """One kernel as it is launched for one row of the tuning table."""

    kernel: str
    num_slots: int
    head_dim: int
    chunk_length: int
    num_warps: int
    rows: int = 1
    replay: int = 1
    write_activation: str = "silu"
    read_activation: str = "ln_silu"
    dtype: str = "bf16"
    tile: int = 0
    """Of the chunkwise form."""

    def function(self) -> Any:
        """Return the kernel itself."""
        return next(vars(module)[self.kernel] for module in MODULES if self.kernel in vars(module))

    def constants(self) -> dict[str, Any]:
        """Return everything the kernel takes at compile time."""
        smallest = tuning.SMALLEST if self.chunk_length == 1 else 16
        padded_slots = tuning.padded(self.num_slots, smallest)
        if "states" in self.kernel:
            padded_slots = tuning.state_slots(padded_slots, self.write_activation)
        constants = {
            "M": self.num_slots,
            "D": self.head_dim,
            "BM": padded_slots,
            "BD": tuning.padded(self.head_dim, smallest),
            "BT": self.chunk_length,
            "BC": min(self.tile, self.chunk_length),
            "ROWS": self.rows,
            "REPLAY": self.replay,
            "WRITE": self.write_activation,
            "READ": self.read_activation,
            "KEEP": True,
            "SECOND_ORDER": True,
        }
        return {name: value for name, value in constants.items() if name in self.function().arg_names}

    def type_of(self, name: str) -> str:
        """Return the type of an argument as Triton spells it."""
        if name in self.constants():
            return "constexpr"
        if name == "p_shut":
            return "*i32"
        if name.removesuffix("_grad") in VECTORS or (name in OPERANDS and self.dtype == "bf16"):
            return f"*{self.dtype}"
        return "*fp32" if name.startswith("p_") else "fp32" if name == "epsilon" else "i32"

    def __str__(self) -> str:
        shape = f"{self.num_slots}x{self.head_dim} chunk {self.chunk_length}"
        how = f"tile {self.tile} warps {self.num_warps}" if self.tile else f"warps {self.num_warps}"
        return f"{self.kernel} {shape} {self.dtype} {self.write_activation} {how}"


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel takes."""

    registers: int
    """Per thread."""
    shared_bytes: int
    spill_store_bytes: int
    """Per thread."""
    spill_load_bytes: int
    programs_per_sm: int
    """How many the registers of one multiprocessor hold."""
    fits: bool
    """Whether the shared memory is there at all."""


def table(*, dtype: str = "bf16", **activations: str) -> Iterator[Launch]:
    """Yield every launch of the tuning table: the chunkwise form at square sizes, the exact one once per row."""
    by_kernel = {"exact_forward_kernel": tuning.EXACT_FORWARD, "exact_backward_kernel": tuning.EXACT_BACKWARD}
    for kernel, by_area in by_kernel.items():
        for area, tuned in by_area.items():
            slots = 1 << area.bit_length() // 2  # the larger half where the area is not a square
            launched = {"rows": tuned.rows, "replay": tuned.replay, "dtype": dtype, **activations}
            yield Launch(kernel, slots, area // slots, 1, tuned.num_warps, **launched)
    for size, chunk_length in itertools.product((16, 32, 64, 128), tuning.CHUNK_LENGTHS):
        for field, launch in tuning.chunk(size, DTYPES[dtype])._asdict().items():
            yield Launch(
                f"chunk_{field}_kernel",
                size,
                size,
                chunk_length,
                launch.num_warps,
                dtype=dtype,
                tile=min(launch.tile, chunk_length),
                **activations,
            )


def measure(launch: Launch, capability: int) -> Usage:
    """Compile a launch for a GPU that need not be there, and read ptxas's report."""
    function = launch.function()
    names = function.arg_names
    source = ASTSource(
        function,
        signature={name: launch.type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in launch.constants().items()},
        # At a launch Triton finds this out from the arguments: torch aligns what it allocates.
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name.startswith("p_")},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps, "num_stages": 1})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        architecture = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [str(PTXAS), "-v", f"--gpu-name={architecture}", "-o", "/dev/null", ptx.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise RuntimeError(f"ptxas did not report {pattern!r}:\n{report}")
        return int(found[1])

    registers = number(r"Used (\d+) registers")
    return Usage(
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        spill_store_bytes=number(r"(\d+) bytes spill stores"),
        spill_load_bytes=number(r"(\d+) bytes spill loads"),
        programs_per_sm=REGISTERS_PER_SM // (registers * 32 * launch.num_warps),
        fits=compiled.metadata.shared <= SHARED_BYTES[capability],
    )


def recorded() -> Iterator[Launch]:
    """Yield what goes into the results.

    What a program holds depends on its tile and on whether there are several in a chunk, hardly on the chunk length,
    so one length stands for all; other dtypes, ln_silu and the other chunk lengths at the paper's sizes.
    """
    yield from (launch for launch in table() if launch.chunk_length in (1, 64))
    for other in (table(write_activation="ln_silu"), table(dtype="fp32"), table(dtype="fp16")):
        yield from (each for each in other if (each.num_slots, each.head_dim, each.chunk_length) == (64, 64, 64))
    for chunk_length in (16, 32, 128):
        yield from (each for each in table() if (each.num_slots, each.chunk_length) == (64, chunk_length))


def markdown(found: dict[Launch, dict[int, Usage]]) -> str:
    """Lay out what was found, one line per launch."""
    per_capability = " | ".join(f"sm_{name} registers | shared | spills | programs" for name in SHARED_BYTES)
    lines = [
        "# Registers, shared memory and spills of the GPU kernels",
        "",
        f"Triton {triton.__version__}, torch {version('torch')}; compiled ahead of time by",
        "`python benchmarks/triton_registers.py`, read activation ln_silu, second order. Registers and spilled bytes",
        "are per thread, shared memory is per program in kB (**bold**: more than there is, the kernel cannot run),",
        "programs is how many the registers of one multiprocessor hold.",
        "",
        f"| kernel | M | D | chunk | tile | dtype | write | warps | {per_capability} |",
        "|---" * (8 + 4 * len(SHARED_BYTES)) + "|",
    ]
    for launch, by_capability in found.items():
        cells = [launch.kernel, launch.num_slots, launch.head_dim, launch.chunk_length, launch.tile or "", launch.dtype]
        cells += [launch.write_activation, launch.num_warps]
        for usage in by_capability.values():
            shared = f"{usage.shared_bytes / 1024:.1f}"
            cells += [usage.registers, shared if usage.fits else f"**{shared}**"]
            cells += [usage.spill_store_bytes, usage.programs_per_sm]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only launches whose description contains this")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder the results go to")
    arguments = parser.parse_args()
    found: dict[Launch, dict[int, Usage]] = {}
    for launch in recorded():
        if arguments.only in str(launch):
            found[launch] = {capability: measure(launch, capability) for capability in SHARED_BYTES}
            print(launch, *(f"sm_{name}: {usage}" for name, usage in found[launch].items()), sep="\n    ", flush=True)
    rows = [
        asdict(launch) | {"capability": capability} | asdict(usage)
        for launch, by_capability in found.items()
        for capability, usage in by_capability.items()
    ]
    arguments.output.mkdir(parents=True, exist_ok=True)
    document = {"triton": triton.__version__, "torch": version("torch"), "rows": rows}
    (arguments.output / "triton_registers.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.output / "triton_registers.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
