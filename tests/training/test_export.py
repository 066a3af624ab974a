"""Exported models give the forecast of the model they come from, at any batch size and without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from trellis_ts import ConfigError, Forecaster
from trellis_ts.datasets.readers import add_future, panel_from_frame
from trellis_ts.export import DESCRIPTION, ExportedNetwork, export_model, inputs_of

# Reads a file and its inputs without this package, Lightning or (for ONNX) torch.
RUN = """
import importlib.abc, json, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
import numpy as np
inputs = dict(np.load({inputs!r}))
if {file!r}.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession({file!r}, providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == list(inputs)
    outputs = [session.run(None, {{name: value[:size] for name, value in inputs.items()}}) for size in (1, 2, 7)]
else:
    import torch
    extra = {{"trellis_ts": ""}}
    program = torch.export.load({file!r}, extra_files=extra).module()
    assert json.loads(extra["trellis_ts"])["prediction_length"] == 5
    outputs = [
        [each.numpy() for each in program(*(torch.from_numpy(value[:size]) for value in inputs.values()))]
        for size in (1, 2, 7)
    ]
named = {{f"{{name}}_{{len(each[0])}}": value for each in outputs for name, value in zip(("point", "quantiles"), each)}}
np.savez({outputs!r}, **named)
"""


@pytest.fixture(scope="module")
def frames():
    """Seven series with covariates of every kind and gaps; and five steps more of the known ones."""
    rng = np.random.default_rng(0)
    parts = []
    for index in range(7):
        values = 50.0 * index + rng.normal(size=80).cumsum()
        values[rng.random(80) < 0.1] = np.nan
        values[74] = 50.0 * index
        part = {"shop": f"s{index}", "day": pd.date_range("2024-01-01", periods=80, freq="D"), "units": values}
        part |= {"price": rng.normal(size=80), "kind": rng.choice(["a", "b"], size=80), "visits": rng.normal(size=80)}
        parts.append(pd.DataFrame({**part, "region": "north" if index % 2 else "south"}))
    whole = pd.concat(parts)
    is_past = whole["day"] < "2024-03-16"
    return whole[is_past], whole[~is_past][["shop", "day", "price", "kind"]]


@pytest.fixture(scope="module")
def forecaster(frames):
    return Forecaster.fit(
        frames[0],
        preset="fast",
        max_epochs=2,
        id="shop",
        target="units",
        known_covariates=["price", "kind"],
        past_covariates="visits",
        static="region",
        width=8,
        num_heads=2,
        num_slots=4,
        num_layers=1,
        feedforward_width=8,
        prediction_length=5,
        context_length=28,
        patch_length=7,
        seasonal_cycle=True,
        windows_per_epoch=32,
    )


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_exported_model_gives_the_same_forecast_without_this_package(tmp_path, frames, forecaster, ending):
    blocked = ["trellis_ts", "lightning", "pytorch_lightning"]
    if ending == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name, reason="needs the extra onnx")
        blocked.append("torch")
    file = forecaster.export(tmp_path / f"model{ending}")
    panel = add_future(forecaster._read(frames[0]), frames[1], 5)
    network = ExportedNetwork(forecaster.checkpoint)
    np.savez(tmp_path / "inputs.npz", **inputs_of(panel, forecaster.scaler().of(panel), network))
    names = {"file": str(file), "inputs": str(tmp_path / "inputs.npz"), "outputs": str(tmp_path / "outputs.npz")}
    code = RUN.format(blocked=blocked, **names)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = np.load(tmp_path / "outputs.npz")
    expected = forecaster.forecast(panel)
    for size in (1, 2, 7):
        np.testing.assert_allclose(outputs[f"point_{size}"], expected.point[:size], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs[f"quantiles_{size}"], expected.quantiles[:size], rtol=1e-4, atol=1e-4)
    if ending == ".onnx":
        import onnx

        model = onnx.load(str(file))
        assert {each.domain for each in model.graph.node} == {""}  # plain operations only
        about = json.loads({each.key: each.value for each in model.metadata_props}[DESCRIPTION])
        assert [each["name"] for each in about["inputs"]] == network.input_names
        assert about["series"][2]["name"] == "s2"


def test_uncalibrated_and_points(forecaster, frames):
    panel = add_future(forecaster._read(frames[0]), frames[1], 5)
    network = ExportedNetwork(forecaster.checkpoint, calibrated=False)
    inputs = [torch.from_numpy(each) for each in inputs_of(panel, forecaster.scaler().of(panel), network).values()]
    with torch.no_grad():
        point, quantiles = network(*inputs)
    plain = Forecaster(forecaster.checkpoint, calibrated=False).forecast(panel)
    torch.testing.assert_close(point, plain.point, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantiles, plain.quantiles, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_refused(tmp_path, forecaster, monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown ending; use one of \.onnx, \.pt2"):
        forecaster.export(tmp_path / "model.pkl")
    monkeypatch.setattr(forecaster.checkpoint.model, "family", "student_t")
    with pytest.raises(ConfigError, match="--loss student_t cannot be exported"):
        export_model(forecaster.checkpoint, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_extra_says_what_to_install(tmp_path, forecaster, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"not installed.*pip install 'trellis-ts\[onnx\]'"):
        forecaster.export(tmp_path / "model.onnx")


def test_panels_are_not_needed_for_the_names():
    panel = panel_from_frame(pd.DataFrame({"t": pd.date_range("2024", periods=40, freq="D"), "y": np.arange(40.0)}))
    settings = {"preset": "fast", "max_epochs": 1, "width": 8, "loss": "mae", "calendar_features": False}
    model = Forecaster.fit_panel(panel, prediction_length=3, **settings)
    network = ExportedNetwork(model.checkpoint)
    assert network.input_names == ["context", "observed", "phase", "loc", "scale"]
    assert network.output_names == ["point"]
