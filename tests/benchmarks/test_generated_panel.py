"""The generated panel of the comparison: the same values for ever, and what its description promises."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

VALUES = "1a9790124fc585c59ad7536f8a6ccadccb83f9b2b1ec4dd6358a2de20a8c56b7"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """The module benchmarks/generated_panel.py, which is no part of the package."""
    path = Path(__file__).parents[2] / "benchmarks" / "generated_panel.py"
    spec = importlib.util.spec_from_file_location("generated_panel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generated_panel"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def panel(generated: ModuleType) -> pd.DataFrame:
    return generated.generate()


def test_same_values_for_ever(panel):
    values = panel.units.fillna(-1).to_numpy(np.int64)
    assert hashlib.sha256(values.tobytes()).hexdigest() == VALUES


def test_another_seed_is_another_panel(generated, panel):
    other = generated.generate(generated.SEED + 1)
    assert len(other) != len(panel) or not other.units.equals(panel.units)


def test_holds_what_it_says(generated, panel):
    series = panel.groupby(list(generated.KEYS))
    assert series.ngroups == 301
    assert panel.groupby(["store", "product"]).ngroups == series.ngroups, "a store lies in one region"
    assert (series.date.max() == panel.date.max()).all()
    assert series.date.min().nunique() > 100
    zeros = series.units.agg(lambda units: (units == 0).mean())
    assert 0.2 < (zeros > 0.5).mean() < 0.4, "about a third sells rarely"
    assert 0.005 < panel.units.isna().mean() < 0.03
    assert not panel.promotion.isna().any()
    steady = panel[panel.groupby(list(generated.KEYS)).units.transform("mean") > 5]
    sold = steady.groupby("promotion").units.mean()
    assert sold[1] > 1.2 * sold[0], "promotions help"


def test_files_hold_the_same(generated, tmp_path, panel):
    generated.write(tmp_path / "panel.csv.gz")
    read = pd.read_csv(tmp_path / "panel.csv.gz", parse_dates=["date"])
    pd.testing.assert_series_equal(read.units.astype(float), panel.units)
    assert list(read.columns) == list(panel.columns)
