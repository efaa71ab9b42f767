"""The only file that touches the network: repositories of the Hugging Face Hub, down and up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.hub.cache import cached_snapshot

# what an artifact or a published checkpoint consists of; code and pickled extras of a repository stay where they are
PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.yaml",
    "*.csv",
    "*.md",
    "*.txt",
    "weights.ckpt",
    "pytorch_model*.bin",
    "*.png",
]


def pull(repo: str, revision: str = "main", *, what: str | None = None, file: str = "") -> Path:
    """The folder of *repo* at *revision*: from the cache when it is there, else downloaded into it.

    Args:
        repo: `user/name`.
        revision: branch, tag or commit.
        what: how error messages call it.
        file: one more file that is wanted, of a repository that holds several models.

    Raises:
        ZooError: not in the cache and not to be had: offline, no such repository or revision, no access.
    """
    found = cached_snapshot(repo, revision)
    if found is not None:
        return found
    named = what or f"'{repo}'"
    command = f"hf download {repo}" + ("" if revision == "main" else f" --revision {revision}")
    advice = f"where there is a network, run `{command}` and copy the folder, or set HF_HOME to a cache that holds it"
    if offline():
        raise ZooError(f"{named} is not in the Hub cache of this machine and HF_HUB_OFFLINE is set: {advice}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*PATTERNS, *([file] if file else [])]))
    except Exception as error:
        raise ZooError(f"cannot get {named} from the Hub ({_reason(error)}): {advice}") from error


def push(
    directory: str | Path, repo: str, *, private: bool = False, message: str | None = None, token: str | None = None
) -> str:
    """Publish the artifact in *directory* as *repo* by one commit and return its address.

    The artifact is verified first. The commit names the revision it was made on, so that a change by someone else in
    between is refused rather than overwritten.

    Raises:
        ZooError: the artifact fails its own parity replay, or the Hub refuses.
    """
    from zoo.hub import artifact, files

    place = Path(directory).expanduser()
    failed = [check.name for check in artifact.verify(place) if not check.passed]
    if failed:
        raise ZooError(f"'{place}' does not reproduce its own outputs ({', '.join(failed)}), so it is not published")
    if offline():
        raise ZooError("HF_HUB_OFFLINE is set, so nothing can be published")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    listed = [*files.published_files(place)]
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in listed]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        parent = api.repo_info(repo).sha
        commit = api.create_commit(
            repo,
            operations,
            commit_message=message or f"Publish {place.name}",
            parent_commit=parent,
        )
    except Exception as error:
        raise ZooError(f"cannot publish '{place}' as '{repo}' ({_reason(error)})") from error
    return str(commit.commit_url)


def offline() -> bool:
    """HF_HUB_OFFLINE, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _reason(error: Any) -> str:
    """The first line of what the client said; its messages run over many."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = {
        401: "the Hub asks for a login: `hf auth login`",
        403: "no permission",
        404: "no such repository or revision",
        412: "the repository was changed in between: try again",
        429: "too many requests: try again later",
    }
    if status in known:
        return known[status]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}: {first}"
