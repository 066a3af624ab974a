"""Model directories: what is written comes back, and nothing damaged, forged or half-written is let in."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import trellis_ts.checkpoints as module
from trellis_ts import files
from trellis_ts.checkpoints import FORMAT_VERSION, TRAINING_FOLDER, load_checkpoint, save_checkpoint
from trellis_ts.errors import CheckpointError, ConfigError
from trellis_ts.forecaster import Forecaster

NAMES = {"config.json", "data.json", "model.safetensors"}


@pytest.fixture(scope="module")
def panel(make_panel):
    return make_panel((40, 30), channels=2)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint, panel):
    return make_checkpoint(panel, known=20, seasonal_cycle=True, initial_memory="learned")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, checkpoint):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "sound", checkpoint, package_version="0.1.0")


@pytest.fixture
def model(saved, tmp_path):
    """A sound model directory to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def refusal(directory):
    """The message of the refusal, which is one line that says where."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(directory)
    message = str(error.value)
    assert "\n" not in message
    assert str(directory) in message
    assert len(message) < 600
    return message


def rewrite(directory, name, change):
    """Changes a JSON file, and the checksums with it, as a forger would."""
    path = directory / name
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))
    forge(directory)


def forge(directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if isinstance(config, dict) and "sha256" in config:
        for name in config["sha256"]:
            config["sha256"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        path.write_text(json.dumps(config))


def test_what_is_saved_comes_back(saved, checkpoint, panel):
    loaded = load_checkpoint(saved)
    assert (loaded.experiment, loaded.data) == (checkpoint.experiment, checkpoint.data)
    assert loaded.model.shape == checkpoint.model.shape
    assert not loaded.model.training
    expected, actual = (Forecaster(each).forecast(panel) for each in (checkpoint, loaded))
    assert torch.equal(expected.quantiles, actual.quantiles)
    assert all(
        torch.equal(value, loaded.model.state_dict()[name]) for name, value in checkpoint.model.state_dict().items()
    )


def test_a_directory_holds_three_plain_files(saved):
    assert {path.name for path in saved.iterdir()} == NAMES
    config = json.loads((saved / "config.json").read_text())
    assert config["format_version"] == FORMAT_VERSION
    assert config["package_version"] == "0.1.0"
    assert set(config["sha256"]) == NAMES - {"config.json"}


def test_a_model_from_before_some_settings_is_read(model, panel):
    """Version 1 had none of these; they come in at the values that leave the model as it was."""
    expected = Forecaster(load_checkpoint(model)).forecast(panel)
    config = json.loads((model / "config.json").read_text())
    config["format_version"] = 1
    for name in ("channel_mixing", "forget_gate", "output_activation", "calendar_features", "covariate_width"):
        del config["experiment"]["model"][name]
    (model / "config.json").write_text(json.dumps(config))
    loaded = load_checkpoint(model)
    settings = loaded.experiment.model
    assert (settings.channel_mixing, settings.forget_gate, settings.output_activation) == ("none", True, "identity")
    assert torch.equal(Forecaster(loaded).forecast(panel).quantiles, expected.quantiles)


def test_a_streaming_model_of_an_older_network_is_refused_by_name(make_panel, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(make_panel((60,)), mode="streaming", patch_stride=4)
    saved = save_checkpoint(tmp_path / "model", checkpoint, package_version="0.1.0")
    assert load_checkpoint(saved).experiment.model.mode == "streaming"
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="streaming model of format version 2"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "settings",
    [{"channel_mixing": "trellis"}, {"mixer": "gsa"}, {"mixer": "linear", "forget_gate": False}, {"mixer": "none"}],
)
def test_every_kind_of_network_comes_back(make_panel, make_checkpoint, tmp_path, settings):
    panel = make_panel((60,), channels=3)
    checkpoint = make_checkpoint(panel, **settings)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "model", checkpoint, package_version="0.1.0"))
    expected, actual = (Forecaster(each).forecast(panel) for each in (checkpoint, loaded))
    assert torch.equal(expected.quantiles, actual.quantiles)


def test_saving_twice_gives_the_same_bytes(saved, checkpoint, tmp_path):
    again = save_checkpoint(tmp_path / "again", checkpoint, package_version="0.1.0")
    assert all((again / name).read_bytes() == (saved / name).read_bytes() for name in NAMES)


def test_a_missing_directory(tmp_path):
    assert "no such directory" in refusal(tmp_path / "nowhere")


def test_an_empty_directory(tmp_path):
    assert "config.json is missing; it is no model" in refusal(tmp_path)


def test_an_unfinished_training_is_told_apart(tmp_path):
    (tmp_path / TRAINING_FOLDER).mkdir()
    assert "--resume" in refusal(tmp_path)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_file(model, name):
    (model / name).unlink()
    assert f"{name} is missing" in refusal(model)


@pytest.mark.parametrize("name", sorted(NAMES - {"config.json"}))
@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "appended"])
def test_damaged_bytes(model, name, damage):
    content = bytearray((model / name).read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    changed = {"truncated": content[:-5], "emptied": b"", "flipped": content, "appended": bytes(content) + b" "}[damage]
    (model / name).write_bytes(changed)
    assert f"{name} does not match its checksum" in refusal(model)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", "null", '"text"', "\ud800", "[" * 200_000, '{"format": "trellis_ts.model"}', "9" * 10_000],
    ids=["empty", "cut", "list", "null", "string", "bytes", "deep", "partial", "number"],
)
def test_a_configuration_that_is_none(model, text):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "is damaged" in refusal(model)


@pytest.mark.parametrize("text", ["", "[1, 2]", "null", "{}", "[" * 200_000])
def test_a_data_file_that_is_none(model, text):
    (model / "data.json").write_text(text)
    forge(model)
    assert "data.json is damaged" in refusal(model)


def put(*path, value):
    """A change of one entry, at a path into nested JSON."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("surprise",), 1, "surprise"),
        (("experiment", "model", "surprise"), 1, "surprise"),
        (("format",), "other.model", "format"),
        (("format_version",), "1", "format_version"),
        (("format_version",), True, "format_version"),
        (("format_version",), 0, "format"),
        (("experiment", "model", "width"), "8", "width"),
        (("experiment", "model", "width"), 8.0, "width"),
        (("experiment", "model", "width"), None, "width"),
        (("experiment", "model", "width"), -8, "width=-8"),
        (("experiment", "model", "width"), 1 << 62, "width="),
        (("experiment", "model", "width"), 10, "tensor"),
        (("experiment", "model", "num_layers"), 90, "tensor"),
        (("experiment", "model", "mixer"), "os.system", "mixer"),
        (("experiment", "model", "linear_skip"), False, "tensor 'skip"),
        (("experiment", "training", "loss"), "mae", "tensor 'head"),
        (("experiment", "training", "quantile_levels"), [0.9, 0.1], "quantile_levels"),
        (("experiment", "data", "validation_size"), float("inf"), "validation_size"),
        (("shape", "prediction_length"), 6, "tensor"),
        (("shape", "num_channels"), 3, "disagree on channels"),
        (("shape", "patch_length"), 13, "patch_length=13"),
        (("shape", "context_length"), 1 << 20, "tensor"),
        (("sha256",), [], "sha256"),
        (("sha256",), {}, "checksum"),
    ],
)
def test_a_forged_configuration(model, path, value, complaint):
    rewrite(model, "config.json", put(*path, value=value))
    assert complaint in refusal(model)


def test_absurd_sizes_allocate_nothing(model):
    """The largest sizes that pass one by one make tensors of 2 to the 60 numbers."""

    def change(config):
        config["experiment"]["model"] |= {"width": 1 << 20, "num_heads": 1, "num_slots": 1 << 20, "conv_width": 1 << 20}
        config["experiment"]["model"] |= {"feedforward_width": 1 << 20}
        lengths = ("context_length", "prediction_length", "season_length")
        config["shape"] |= dict.fromkeys(lengths, 1 << 20) | {"patch_length": 1, "patch_stride": 1}

    rewrite(model, "config.json", change)
    refusal(model)


def test_a_newer_format_is_named_before_its_unknown_keys(model):
    def change(config):
        config |= {"format_version": FORMAT_VERSION + 1, "novelty": 3}

    rewrite(model, "config.json", change)
    message = refusal(model)
    assert f"format version {FORMAT_VERSION + 1}" in message
    assert "upgrade" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("channels",), ["c0"]),
        (("channels",), ["c0", "c0"]),
        (("channels",), "c0"),
        (("freq",), 24),
        (("series", 0, "loc"), [float("nan"), 1.0]),
        (("series", 0, "loc"), [float("inf"), 1.0]),
        (("series", 0, "loc"), [1.0]),
        (("series", 0, "loc"), ["1", "2"]),
        (("series", 0, "scale"), [0.0, 1.0]),
        (("series", 0, "scale"), [-1.0, 1.0]),
        (("series", 0, "scale"), [float("nan"), 1.0]),
        (("series", 0, "scale"), [1.0, 1.0, 1.0]),
        (("series", 0, "known_until"), 1 << 70),
        (("series", 0, "known_until"), "2024-01-01"),
        (("series", 1, "name"), "s0"),
        (("series",), []),
    ],
)
def test_a_forged_data_file(model, path, value):
    rewrite(model, "data.json", put(*path, value=value))
    assert "damaged" in refusal(model)


@pytest.mark.parametrize("change", ["renamed", "reshaped", "dropped", "added", "integer", "half"])
def test_forged_weights(model, change):
    path = model / "model.safetensors"
    weights = load_file(path)
    name = "head.projection.weight"
    if change == "renamed":
        weights["head.projection.weights"] = weights.pop(name)
    elif change == "reshaped":
        weights[name] = weights[name].T.contiguous()
    elif change == "dropped":
        del weights[name]
    elif change == "added":
        weights["backdoor"] = torch.zeros(1)
    else:
        weights[name] = weights[name].to(torch.int64 if change == "integer" else torch.float16)
    save_file(weights, path)
    forge(model)
    assert ("backdoor" if change == "added" else name) in refusal(model)


@pytest.fixture
def no_pickle(monkeypatch):
    """Unpickling anything fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for place, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(place, name, refuse)


@pytest.mark.usefixtures("no_pickle")
def test_loading_never_unpickles(saved, panel):
    Forecaster.load(saved).forecast(panel)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.usefixtures("no_pickle")
def test_a_pickle_in_the_place_of_the_weights(model, tmp_path):
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    forge(model)
    assert "model.safetensors is damaged" in refusal(model)
    assert not (tmp_path / "exploded").exists()


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fail_with(code):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def other(make_checkpoint, panel):
    return make_checkpoint(panel, seed=9, seasonal_cycle=True, initial_memory="learned")


@pytest.mark.parametrize("place", ["save_file", "_write_json", "_flush", "_sha256"])
def test_a_full_disk_leaves_the_former_model(model, other, monkeypatch, place):
    (model / TRAINING_FOLDER).mkdir()
    (model / TRAINING_FOLDER / "log.csv").write_text("epoch\n")
    before = snapshot(model.parent)
    monkeypatch.setattr(module, place, fail_with(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="the disk is full"):
        save_checkpoint(model, other, package_version="0.1.0")
    assert snapshot(model.parent) == before


# Where folders are exchanged only the training folder is moved; elsewhere the old one aside, that, and the new one.
@pytest.mark.parametrize(("is_exchanged", "nth"), [(True, 1), (False, 1), (False, 2), (False, 3)])
def test_a_refused_rename_leaves_the_former_model(model, other, monkeypatch, is_exchanged, nth):
    if not is_exchanged:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    elif sys.platform != "linux":
        pytest.skip("only Linux exchanges folders")
    (model / TRAINING_FOLDER).mkdir()
    (model / TRAINING_FOLDER / "log.csv").write_text("epoch\n")
    before = snapshot(model.parent)
    rename, calls = module.Path.rename, []

    def sometimes(path, target):
        calls.append(path)
        return fail_with(errno.EACCES)() if len(calls) == nth else rename(path, target)

    monkeypatch.setattr(module.Path, "rename", sometimes)
    with pytest.raises(CheckpointError, match="permission denied"):
        save_checkpoint(model, other, package_version="0.1.0")
    assert len(calls) >= nth
    assert snapshot(model.parent) == before


@pytest.mark.parametrize("is_exchanged", [True, False])
def test_overwriting_keeps_the_training_folder_and_what_else_lies_there(model, other, monkeypatch, is_exchanged):
    if not is_exchanged:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (model / TRAINING_FOLDER).mkdir()
    (model / TRAINING_FOLDER / "log.csv").write_text("epoch\n")
    (model / "notes.txt").write_text("mine\n")
    save_checkpoint(model, other, package_version="0.1.0")
    assert (model / TRAINING_FOLDER / "log.csv").read_text() == "epoch\n"
    assert (model / "notes.txt").read_text() == "mine\n"
    assert [path.name for path in model.parent.iterdir()] == [model.name]
    weights = load_checkpoint(model).model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in other.model.state_dict().items())


def test_a_file_in_the_way_is_not_replaced(tmp_path, other):
    path = tmp_path / "sales.csv"
    path.write_text("date,load\n")
    with pytest.raises(CheckpointError, match=r"sales\.csv.*not a directory"):
        save_checkpoint(path, other, package_version="0.1.0")
    assert snapshot(tmp_path) == {"sales.csv": b"date,load\n"}


def test_parents_are_made(tmp_path, other):
    save_checkpoint(tmp_path / "a" / "b", other, package_version="0.1.0")
    load_checkpoint(tmp_path / "a" / "b")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_permissions_follow_the_umask(tmp_path, other, umask):
    before = os.umask(umask)
    try:
        path = save_checkpoint(tmp_path / "model", other, package_version="0.1.0")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in NAMES} == {0o666 & ~umask}


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent(tmp_path, other):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="permission denied"):
            save_checkpoint(tmp_path / "model", other, package_version="0.1.0")
    finally:
        tmp_path.chmod(0o700)


def test_a_record_refuses_numbers_that_json_cannot_hold(checkpoint):
    series = replace(checkpoint.data.series[0], loc=(float("nan"), 0.0))
    with pytest.raises(ConfigError, match="series 's0'"):
        replace(checkpoint.data, series=(series, *checkpoint.data.series[1:]))
