"""Which implementation runs, what is said about it, and what importing the package costs."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from trellis_ts import config, kernels
from trellis_ts.errors import BackendError
from trellis_ts.kernels import dispatch, implementations, trellis_memory
from trellis_ts.kernels.memory import cpu, operator
from trellis_ts.kernels.memory.reference import reference
from trellis_ts.kernels.memory.types import ReadActivation, WriteActivation


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """The operator keeps the choice it made for a call's shapes; here the choices themselves change."""
    monkeypatch.setattr(operator, "_checked_calls", {})


@pytest.fixture
def picky(monkeypatch):
    """A faster implementation that takes float32 alone, preferred to the reference; returns the calls it got."""
    calls = []

    def run(tokens, initial_state, options):
        calls.append(tokens.query.dtype)
        return reference(tokens, initial_state, options)

    def why_not(problem):
        if problem is None:
            return None
        return None if problem.dtype == torch.float32 else f"{problem.dtype} is not float32"

    entries = {name: dispatch.IMPLEMENTATIONS[name] for name in ("reference",)}
    entries = {"picky": dispatch.Entry(run=run, why_not=why_not), **entries}
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", entries)
    return calls


@pytest.fixture
def fresh_log(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_logged", set())
    caplog.set_level(logging.INFO, logger="trellis_ts.kernels")
    return caplog


def test_every_implementation_has_a_name_and_a_setting():
    assert get_args(dispatch.Implementation) == ("auto", *implementations())
    assert get_args(config.Implementation) == get_args(dispatch.Implementation)
    assert get_args(config.Activation) == get_args(WriteActivation)
    assert get_args(config.ReadActivation) == get_args(ReadActivation)


def test_the_reference_runs_everywhere():
    assert implementations()["reference"] is None


def test_the_chosen_implementation_gives_the_numbers_of_the_definition(make_inputs):
    inputs = make_inputs()
    torch.testing.assert_close(trellis_memory(**inputs)[0], trellis_memory(**inputs, implementation="reference")[0])


def test_auto_takes_the_first_that_can(picky, make_inputs):
    inputs = make_inputs()
    trellis_memory(**inputs)
    assert picky == []
    trellis_memory(**{name: tensor.float() for name, tensor in inputs.items()})
    assert picky == [torch.float32]


def test_the_compiled_recurrence_gives_its_reasons(monkeypatch, make_inputs):
    with pytest.raises(BackendError, match="it computes the exact recurrence, chunk_length=1, only; use 'auto' or "):
        trellis_memory(**make_inputs(), chunk_length=2, implementation="cpu")
    with pytest.raises(BackendError, match="but the tensors are on meta; use 'auto' or "):
        trellis_memory(**{name: tensor.to("meta") for name, tensor in make_inputs().items()}, implementation="cpu")
    monkeypatch.setattr(cpu, "HAS_NUMBA", False)
    assert implementations()["cpu"] == "Numba is not installed"
    output, _ = trellis_memory(**make_inputs())
    assert torch.equal(output, trellis_memory(**make_inputs(), implementation="reference")[0])


def test_a_request_by_name_never_falls_back(picky, make_inputs):
    message = "implementation='picky' was asked for, but torch.float64 is not float32; use 'auto' or 'reference'"
    with pytest.raises(BackendError, match=message):
        trellis_memory(**make_inputs(), implementation="picky")
    assert picky == []


@pytest.mark.parametrize(("name", "near"), [("refrence", "reference"), ("Auto", "auto"), (None, "auto|reference")])
def test_an_unknown_name_is_refused_with_the_nearest(name, near, picky, make_inputs):
    with pytest.raises(BackendError, match=rf"is unknown; did you mean '({near})'\? There are auto, picky, reference"):
        trellis_memory(**make_inputs(), implementation=name)


def test_a_choice_is_logged_once(fresh_log, picky, make_inputs):
    for time in (2, 3):
        trellis_memory(**make_inputs(time=time))
        trellis_memory(**{name: tensor.float() for name, tensor in make_inputs(time=time).items()})
    assert [record.levelname for record in fresh_log.records] == ["INFO", "INFO"]
    first, second = (record.message for record in fresh_log.records)
    assert first.startswith("memory on cpu in float64: ")
    assert "; not 'picky': torch.float64 is not float32" in first
    assert second.startswith("memory on cpu in float32: 'picky'")


def test_nothing_is_logged_while_compiling(fresh_log, monkeypatch, make_inputs):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    trellis_memory(**make_inputs())
    assert not fresh_log.records


def test_public_names_are_sorted_and_exist():
    assert kernels.__all__ == sorted(kernels.__all__)
    assert all(hasattr(kernels, name) for name in kernels.__all__)


def test_the_folder_refuses_to_be_imported_under_its_own_name():
    spec = importlib.util.spec_from_file_location("kernels", Path(kernels.__file__))
    with pytest.raises(ImportError, match=r"take the checkout root off sys\.path"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_importing_the_package_loads_no_compiler():
    program = (
        "import sys, torch; before = set(sys.modules); import trellis_ts.kernels;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"triton", "numba", "pandas", "lightning"} & set(done.stdout.split())
