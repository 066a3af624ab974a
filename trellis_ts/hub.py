"""Model directories on the Hugging Face Hub. Only the files of a model are fetched, and nothing in them is executed.

Needs ``pip install "trellis-ts[hub]"``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trellis_ts.checkpoints import MODEL_FILES, load_checkpoint
from trellis_ts.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from trellis_ts.checkpoints import Checkpoint


def fetch_checkpoint(
    repo_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Checkpoint:
    """A model of a directory on this machine, or else of a repository of the Hub.

    Args:
        repo_or_path: a directory, or a repository such as ``"someone/sales"``.
        revision: branch, tag or commit of the repository. Only a commit's contents can never change.
        token: for repositories that are not public; the one of ``hf auth login`` unless given.

    Raises:
        CheckpointError: it does not exist or cannot be reached, is no model, or is damaged.
        ConfigError: the extra ``hub`` is not installed, or a revision of a directory is asked for.
    """
    if Path(repo_or_path).is_dir():
        if revision is not None:
            raise ConfigError(f"{repo_or_path} is a directory, which has no revision; leave it out")
        return load_checkpoint(repo_or_path)
    name = str(repo_or_path)
    folder = _asked(
        f"cannot fetch the model {name}",
        lambda hub: hub.snapshot_download(name, revision=revision, token=token, allow_patterns=list(MODEL_FILES)),
    )
    return load_checkpoint(folder)


def upload_checkpoint(
    write: Callable[[Path], object],
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a Trellis model",
    token: str | None = None,
) -> str:
    """Uploads what ``write`` writes into a directory; returns the address of the commit.

    Args:
        write: writes the model's files into a directory.
        repo: the repository, made if it does not exist.
        private: whether a new repository is private.
        revision: branch to write to.
        commit_message: of the commit.
        token: as for ``fetch_checkpoint``.

    Raises:
        CheckpointError: the Hub refuses, or cannot be reached.
        ConfigError: the extra ``hub`` is not installed.
    """

    def upload(hub: Any) -> str:
        client = hub.HfApi(token=token)
        client.create_repo(repo, private=private, exist_ok=True)
        with TemporaryDirectory(prefix="trellis-") as directory:
            folder = Path(directory) / "model"
            write(folder)
            commit = client.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=list(MODEL_FILES),
            )
        return str(commit.commit_url)

    return _asked(f"cannot upload the model to {repo}", upload)


def _asked(what: str, request: Callable[[Any], str]) -> str:
    """The client's answer, its refusals as one line."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise ConfigError("huggingface-hub is not installed; pip install 'trellis-ts[hub]'") from None
    try:
        return request(hub)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{what}: {lines[0]}") from error
