"""Models: what ``info`` says of them, and model directories that cannot be used."""

from __future__ import annotations

import json
import shutil

import pytest


def test_info(trellis, wide_model):
    text = trellis("info", wide_model).out
    for fact in ("load, heat", "context length      24", "prediction length   6", "time column         date"):
        assert fact in text
    assert "None" not in text
    assert "True" not in text
    data = trellis("info", wide_model, "--json").data
    assert set(data) == {
        *("model", "parameters", "dataset", "time_column", "id_column", "channels", "freq", "timezone", "num_series"),
        *("covariates", "calendar", "quantile_levels", "calibration", "shape", "settings"),
        "reasons",
    }
    assert (data["channels"], data["freq"], data["id_column"]) == (["load", "heat"], "h", None)
    assert data["calibration"]["bands"] == [0.5, 0.8, 0.9, 0.95]
    assert data["calibration"]["num_windows"] > 0
    assert "bands widened (standardised, mean over steps) 50 % by " in text
    assert data["shape"]["context_length"] == data["settings"]["context_length"] == 24


def damage(model, name, change):
    path = model / name
    path.write_bytes(change(path.read_bytes()))


DAMAGES = {
    "truncated weights": (
        lambda m: damage(m, "model.safetensors", lambda b: b[: len(b) // 2]),
        "does not match its checksum",
    ),
    "altered weights": (
        lambda m: damage(m, "model.safetensors", lambda b: b[:-4] + b"\xff\xff\xff\x7f"),
        "does not match its checksum",
    ),
    "altered data": (
        lambda m: damage(m, "data.json", lambda b: b.replace(b"load", b"laod")),
        "does not match its checksum",
    ),
    "truncated settings": (lambda m: damage(m, "config.json", lambda b: b[: len(b) // 2]), "is not a JSON object"),
    "empty settings": (lambda m: damage(m, "config.json", lambda b: b""), "is not a JSON object"),
    "another type": (lambda m: damage(m, "config.json", lambda b: b.replace(b": 24,", b': "24",', 1)), "is damaged"),
    "an unknown key": (lambda m: damage(m, "config.json", lambda b: b.replace(b'"width"', b'"wodth"')), "is damaged"),
    "a newer format": (
        lambda m: damage(m, "config.json", lambda b: b.replace(b'"format_version": ', b'"format_version": 9')),
        "this trellis reads up to 3; upgrade trellis-ts",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        "model.safetensors is missing; copy the whole directory",
    ),
    "no settings": (lambda m: (m / "config.json").unlink(), "config.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models(refused, folder, wide, wide_model, name):
    change, expected = DAMAGES[name]
    shutil.copytree(wide_model, folder / "model")
    change(folder / "model")
    for command in (
        ["info", "model"],
        ["forecast", "model", "wide.csv", "-o", "out.csv"],
        ["evaluate", "model", "wide.csv"],
    ):
        line = refused(*command)
        assert expected in line
        assert line.startswith(f"trellis {command[0]}: error: ")


def test_what_is_no_model(refused, folder, wide):
    assert "there is no such directory; train one with `trellis train`" in refused("forecast", "m", "wide.csv")
    assert "it is a file, and a model is a directory" in refused("forecast", "wide.csv", "wide.csv")
    assert "config.json is missing; it is no model" in refused("info", ".")
    (folder / "m" / "training").mkdir(parents=True)
    assert "its training has not finished; go on with `trellis train ... --resume`" in refused("info", "m")


def test_a_copied_model_works_without_its_training_folder(trellis, folder, wide, wide_model):
    shutil.copytree(wide_model, folder / "copy", ignore=shutil.ignore_patterns("training"))
    assert trellis("forecast", "copy", "wide.csv").out == trellis("forecast", wide_model, "wide.csv").out
    assert json.loads((folder / "copy" / "config.json").read_text())["format"] == "trellis_ts.model"
