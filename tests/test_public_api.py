"""What the package shows to its users, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import trellis_ts
from trellis_ts import errors, kernels

PUBLIC = [
    "AdaptiveConformal",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Forecast",
    "Forecaster",
    "MemoryState",
    "Panel",
    "StreamingForecaster",
    "TrellisError",
    "TrellisLayer",
    "TrellisState",
    "evaluate",
    "trellis_memory",
    "trellis_memory_step",
]


def test_the_public_names_are_these():
    assert trellis_ts.__all__ == PUBLIC
    assert dir(trellis_ts) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_that_of_its_home(name):
    home = importlib.import_module(f"trellis_ts.{trellis_ts._HOMES[name]}")
    assert getattr(trellis_ts, name) is getattr(home, name)


def test_the_names_for_type_checkers_are_the_lazy_ones():
    tree = ast.parse(Path(trellis_ts.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: str(node.module).removeprefix("trellis_ts.")
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == trellis_ts._HOMES
    assert sorted(typed) == trellis_ts.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'trellis_ts' has no attribute 'forcaster'"):
        _ = trellis_ts.forcaster
    with pytest.raises(ImportError):
        exec("from trellis_ts import forcaster")


def loaded_after(statement):
    """Top-level packages a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    # -P keeps the current folder off the path: the checkout's own folders are called like other packages.
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_costs_nothing():
    loaded = loaded_after("import trellis_ts; dir(trellis_ts); trellis_ts.DataError")
    assert "trellis_ts" in loaded
    assert not loaded & {"torch", "pandas", "numpy", "lightning", "matplotlib", "pyarrow", "triton", "pydantic"}


def test_the_forecaster_needs_no_training_or_plotting_libraries():
    loaded = loaded_after("from trellis_ts import Forecaster")
    assert "torch" in loaded
    assert not loaded & {"lightning", "matplotlib", "statsmodels", "gluonts", "sklearn", "tensorboardX"}


def test_kernels_show_the_operator_only():
    assert kernels.__all__ == sorted(kernels.__all__)
    assert kernels.__all__ == ["MemoryState", "implementations", "precompile", "trellis_memory", "trellis_memory_step"]
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_every_error_is_a_trellis_error():
    ours = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]
    assert len(ours) == 5
    assert all(issubclass(each, trellis_ts.TrellisError) for each in ours)
    assert not issubclass(trellis_ts.TrellisError, (ValueError, OSError, RuntimeError))


@pytest.mark.parametrize("folder", ["kernels", "datasets"])
def test_the_bare_folders_refuse_to_be_imported(folder):
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"this folder is trellis_ts.{folder}" in done.stderr
