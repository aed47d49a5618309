"""Uploads exported checkpoints to the Hub."""

from __future__ import annotations

from pathlib import Path

from longalign.checkpoints.checkpoint import read_config
from longalign.checkpoints.publish import exported_files
from longalign.hub import CHECKPOINT


def push_to_hub(
    folder: str | Path,
    repository: str,
    private: bool = False,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a longalign checkpoint",
) -> str:
    """Uploads an exported folder to a Hub repository, created if needed; returns the URL of the repository.

    Only files that `longalign.checkpoints.publish.export` writes are uploaded; other files in the folder are skipped.

    Args:
        folder: a folder written by `longalign.checkpoints.publish.export`.
        repository: name of the repository, ``owner/name``.
        private: whether a newly created repository is private. No effect on an existing repository.
        token: Hub token; None: the token saved by ``hf auth login``.
        revision: branch to upload to, created if needed; None: the main branch.
        message: commit message.

    Raises:
        ValueError: if the folder is not an export, or the Hub rejects the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not (Path(folder) / CHECKPOINT).is_file():
        raise ValueError(f"{folder} has no {CHECKPOINT}; export a checkpoint to it first")
    patterns = exported_files(read_config(Path(folder) / CHECKPOINT))
    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=str(folder),
            allow_patterns=list(patterns),
            commit_message=message,
            revision=revision,
        )
    except HfHubHTTPError as error:
        raise ValueError(
            f"upload to '{repository}' was rejected: {error}; log in with `hf auth login`, with write access to the "
            "repository"
        ) from error
    return f"https://huggingface.co/{repository}"
