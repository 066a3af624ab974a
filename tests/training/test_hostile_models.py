"""A folder of models made to do harm: each is refused in one line, and none runs code, opens a connection or a file."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden" / "model"

# What no model may bring about while it is read. Files are opened for reading only, and only inside the model.
WATCHER = """
import builtins, os, sys
from pathlib import Path
sys.argv[1:] = [os.path.realpath(each) for each in sys.argv[1:]]
from trellis_ts.checkpoints import load_checkpoint
from trellis_ts.errors import TrellisError
import torch
load_checkpoint(sys.argv[1])  # a sound one first: what is imported on the way is imported now
FORBIDDEN = ("pickle.find_class", "marshal.load", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
             "socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "import", "os.remove", "os.rename", "os.mkdir")
watched = [None]
def watch(event, arguments):
    if watched[0] is None:
        return
    if event in FORBIDDEN and not (event == "import" and arguments[0] in sys.modules):
        builtins.print("FORBIDDEN", event, arguments, flush=True)
        os._exit(3)
    if event == "open" and not isinstance(arguments[0], int):
        path, mode = os.path.realpath(os.fspath(arguments[0])), arguments[1]
        writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        if writes or not path.startswith((watched[0], "/proc/", sys.prefix, sys.base_prefix)):
            builtins.print("FORBIDDEN open", path, mode, flush=True)
            os._exit(3)
sys.addaudithook(watch)
for directory in sys.argv[2:]:
    watched[0] = directory
    try:
        load_checkpoint(directory)
        said = "LOADED"
    except TrellisError as error:
        said = str(error)
    watched[0] = None
    builtins.print(Path(directory).name, len(said.splitlines()), said, sep="\\t", flush=True)
"""


class _Bomb:
    def __reduce__(self):
        return (print, ("executed",))


def _header(length: int, text: bytes = b"{}") -> bytes:
    """A safetensors file that claims a header of some length."""
    return struct.pack("<Q", length) + text


def _pickled_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))


def _pickled_checkpoint(model: Path) -> None:
    torch.save({"state_dict": {}, "bomb": _Bomb()}, model / "model.safetensors")


def _oversized_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(_header(1 << 62))


def _large_header(model: Path) -> None:
    (model / "model.safetensors").write_bytes(_header(99_000_000, b" " * 1000))


def _overlapping_tensors(model: Path) -> None:
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}
    text = json.dumps({"head.projection.weight": entry}).encode()
    (model / "model.safetensors").write_bytes(_header(len(text), text) + b"\0" * 4)


def _wrong_shape(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: value.reshape(1, -1) for name, value in weights.items()}, model / "model.safetensors")


def _nan_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights[next(iter(weights))].fill_(float("nan"))
    save_file(weights, model / "model.safetensors")


def _infinite_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights[next(iter(weights))].fill_(float("inf"))
    save_file(weights, model / "model.safetensors")


def _wrong_type(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: value.double() for name, value in weights.items()}, model / "model.safetensors")


def _tensor_too_many(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "__reduce__": torch.zeros(1)}, model / "model.safetensors")


def _config(**change: object):
    def edit(model: Path) -> None:
        content = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(content | change))

    return edit


def _traversal(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["sha256"]["../../secret"] = "0" * 64
    (model / "config.json").write_text(json.dumps(content))


def _absurd_sizes(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["experiment"]["model"] |= {"width": 1 << 20, "num_heads": 1, "num_layers": 1000}
    (model / "config.json").write_text(json.dumps(content))


def _class_path(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["experiment"]["model"]["mixer"] = "os.system"
    (model / "config.json").write_text(json.dumps(content))


def _data(**change: object):
    def edit(model: Path) -> None:
        content = json.loads((model / "data.json").read_text())
        (model / "data.json").write_text(json.dumps(content | change))

    return edit


def _nan_scaler(model: Path) -> None:
    text = (model / "data.json").read_text()
    content = json.loads(text)
    content["series"][0]["scale"] = [float("nan")]
    (model / "data.json").write_text(json.dumps(content))


def _number_without_end(model: Path) -> None:
    content = json.loads((model / "data.json").read_text())
    content["series"][0]["loc"] = [7.25]
    (model / "data.json").write_text(json.dumps(content).replace("7.25", "9" * 100_000))


def _weights_elsewhere(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content["sha256"]["/etc/passwd"] = content["sha256"].pop("model.safetensors")
    (model / "config.json").write_text(json.dumps(content))


def _deep_json(model: Path) -> None:
    (model / "data.json").write_text("[" * 100_000 + "]" * 100_000)


HOSTILE = {
    "pickle-as-weights": (_pickled_weights, "damaged"),
    "torch-checkpoint-as-weights": (_pickled_checkpoint, "damaged"),
    "oversized-header": (_oversized_header, "damaged"),
    "large-header": (_large_header, "damaged"),
    "overlapping-tensors": (_overlapping_tensors, "damaged"),
    "wrong-shapes": (_wrong_shape, "does not fit"),
    "nan-weights": (_nan_weights, "not finite"),
    "infinite-weights": (_infinite_weights, "not finite"),
    "future-version": (_config(format_version=99), "upgrade"),
    "other-format": (_config(format="something.else"), "damaged"),
    "unknown-key": (_config(on_load="os.system('true')"), "damaged"),
    "path-traversal": (_traversal, "damaged"),
    "absurd-sizes": (_absurd_sizes, "does not fit"),
    "class-path": (_class_path, "damaged"),
    "deep-json": (_deep_json, "damaged"),
    "wrong-type": (_wrong_type, "does not fit"),
    "tensor-too-many": (_tensor_too_many, "does not fit"),
    "past-version": (_config(format_version=-1), "damaged"),
    "version-as-text": (_config(format_version="2"), "damaged"),
    "nan-scaler": (_nan_scaler, "damaged"),
    "number-without-end": (_number_without_end, "damaged"),
    "weights-elsewhere": (_weights_elsewhere, "damaged"),
    "unknown-frequency": (_data(freq="__import__('os')"), "damaged"),
    "timezone-as-path": (_data(timezone="../../etc/passwd"), "damaged"),
    "timezone-as-file": (_data(timezone="dateutil//dev/zero"), "damaged"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process that watches itself says of each model."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fuzz_targets", Path(__file__).parent.parent / "fuzz" / "targets.py")
    targets = module_from_spec(spec)
    spec.loader.exec_module(targets)
    folder = tmp_path_factory.mktemp("hostile")
    for name, (spoil, _) in HOSTILE.items():
        model = shutil.copytree(GOLDEN, folder / name)
        forged = name not in ("path-traversal", "weights-elsewhere")
        spoil(model)
        if forged:
            targets.forge(model)
    models = [str(folder / name) for name in HOSTILE]
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, str(GOLDEN), *models], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (int(lines), text) for name, lines, text in (row.split("\t") for row in done.stdout.splitlines())}


@pytest.mark.parametrize("name", HOSTILE)
def test_each_is_refused_in_one_line(said, name):
    lines, text = said[name]
    assert text != "LOADED"
    assert lines == 1
    assert HOSTILE[name][1] in text
    assert name in text  # says where
