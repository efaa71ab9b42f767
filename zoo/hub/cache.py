"""The local Hub cache, looked at without importing anything: where it is and what it holds."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of downloaded repositories: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return base / "huggingface" / "hub"


def cached_snapshot(repo: str, revision: str = "main") -> Path | None:
    """The folder of *repo* at *revision* (a branch, a tag or a commit) in the cache, or None."""
    place = cache_root() / ("models--" + repo.replace("/", "--"))
    pointer = place / "refs" / revision
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
    snapshot = place / "snapshots" / commit
    return snapshot if snapshot.is_dir() and any(snapshot.iterdir()) else None


def on_disk(repo: str) -> bool:
    """True when some revision of *repo* is in the cache."""
    snapshots = cache_root() / ("models--" + repo.replace("/", "--")) / "snapshots"
    return snapshots.is_dir() and any(path.is_dir() and any(path.iterdir()) for path in snapshots.iterdir())
