"""The Hugging Face Hub, with a client that keeps repositories in a folder."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from trellis_ts import CheckpointError, ConfigError, Forecaster

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
FILES = {each.name for each in GOLDEN.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Repositories under a folder, in the place of the Hub; a file that no model has lies in each."""
    root = tmp_path / "hub"
    fetched: list[str] = []

    def copy(source, target, patterns):
        target.mkdir(parents=True, exist_ok=True)
        for each in source.iterdir():
            if any(fnmatch(each.name, pattern) for pattern in patterns):
                fetched.append(each.name)
                shutil.copy(each, target / each.name)

    def snapshot_download(repo_id, *, revision, token, allow_patterns):
        source = root / repo_id / (revision or "main")
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id} at {revision}\nmore")
        copy(source, tmp_path / "cache", allow_patterns)
        return str(tmp_path / "cache")

    class HfApi:
        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            if "/" not in repo_id:
                raise OSError("403 Forbidden")
            (root / repo_id / "main").mkdir(parents=True, exist_ok=exist_ok)
            (root / repo_id / "main" / "evil.py").write_text("raise SystemExit")

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns):
            copy(folder_path, root / repo_id / (revision or "main"), allow_patterns)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    return SimpleNamespace(root=root, fetched=fetched)


def test_a_model_goes_there_and_back(hub):
    forecaster = Forecaster.load(GOLDEN)
    assert forecaster.push_to_hub("someone/sales") == "https://hub/someone/sales"
    hub.fetched.clear()
    again = Forecaster.from_pretrained("someone/sales")
    assert set(hub.fetched) == FILES
    assert again.checkpoint.data == forecaster.checkpoint.data
    forecaster.push_to_hub("someone/sales", revision="v2")
    assert Forecaster.from_pretrained("someone/sales", revision="v2").prediction_length == again.prediction_length


def test_a_damaged_repository_is_refused(hub):
    Forecaster.load(GOLDEN).push_to_hub("someone/sales")
    weights = hub.root / "someone" / "sales" / "main" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        Forecaster.from_pretrained("someone/sales")


def test_refusals_are_one_line(hub):
    with pytest.raises(CheckpointError, match=r"^cannot fetch the model someone/other: no someone/other at main$"):
        Forecaster.from_pretrained("someone/other", revision="main")
    with pytest.raises(CheckpointError, match=r"cannot upload the model to sales: 403 Forbidden"):
        Forecaster.load(GOLDEN).push_to_hub("sales")


def test_a_directory_is_read_as_it_is():
    assert Forecaster.from_pretrained(GOLDEN).prediction_length == Forecaster.load(GOLDEN).prediction_length
    with pytest.raises(ConfigError, match="has no revision"):
        Forecaster.from_pretrained(GOLDEN, revision="main")


def test_the_real_client_has_these_arguments():
    import inspect

    wanted = {"repo_id", "revision", "token", "allow_patterns"}
    assert wanted <= set(inspect.signature(huggingface_hub.snapshot_download).parameters)
    wanted = {"repo_id", "folder_path", "revision", "commit_message", "allow_patterns"}
    assert wanted <= set(inspect.signature(huggingface_hub.HfApi.upload_folder).parameters)
    assert {"private", "exist_ok"} <= set(inspect.signature(huggingface_hub.HfApi.create_repo).parameters)
