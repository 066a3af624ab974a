"""The Triton kernels compile for Ampere and Hopper, without a GPU, and the paper's sizes stay in registers."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from trellis_ts.kernels.memory import tuning

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter nothing is compiled"),
]


@pytest.fixture(scope="module")
def registers():
    """The module benchmarks/triton_registers.py, which is no part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "triton_registers.py"
    spec = importlib.util.spec_from_file_location("triton_registers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kernel", ["exact_forward_kernel", "exact_backward_kernel"])
def test_the_exact_recurrence_does_not_spill_at_the_papers_size(kernel, capability, registers):
    (launch,) = (row for row in registers.table() if (row.kernel, row.num_slots, row.head_dim) == (kernel, 64, 64))
    usage = registers.measure(launch, capability)
    assert usage.fits
    assert usage.spill_store_bytes == usage.spill_load_bytes == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "kernel", ["chunk_states_kernel", "chunk_codes_backward_kernel", "chunk_writes_backward_kernel"]
)
def test_the_chunkwise_form_does_not_spill_at_the_papers_size(kernel, capability, registers):
    """The three that come closest, at a chunk of several tiles; the others in the whole table."""
    (launch,) = (row for row in registers.table() if (row.kernel, row.num_slots, row.chunk_length) == (kernel, 64, 64))
    usage = registers.measure(launch, capability)
    assert usage.fits
    assert usage.spill_store_bytes == usage.spill_load_bytes == 0


@pytest.mark.parametrize("field", tuning.Chunk._fields)
def test_the_chunkwise_form_compiles(field, registers):
    shape = (f"chunk_{field}_kernel", 16, 16)
    (launch,) = (row for row in registers.table() if (row.kernel, row.num_slots, row.chunk_length) == shape)
    for capability in registers.SHARED_BYTES:
        assert registers.measure(launch, capability).fits


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_whole_table_compiles_and_does_not_spill_at_the_papers_size(capability, registers):
    for launch in registers.recorded():
        usage = registers.measure(launch, capability)
        assert usage.fits, str(launch)
        if (launch.num_slots, launch.head_dim) == (64, 64):
            assert usage.spill_store_bytes == usage.spill_load_bytes == 0, str(launch)
