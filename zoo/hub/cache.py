"""The local Hub cache, looked at without importing anything: where it is, what it holds, and whether that is whole.

A pull leaves a record beside the repository's folders, `zoo/<commit>.json`: each file's size, its time and the hash
that the Hub announced. A snapshot with a record counts as complete; its files are hashed again where their time or
size changed. One without (copied here, or fetched by another program) is checked by the cache's own layout, in which
the name of a file in `blobs/` is the hash of what it holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from zoo.errors import ZooError

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


def cache_root() -> Path:
    """The folder of downloaded repositories: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    if "HF_HOME" in os.environ:
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return base / "huggingface" / "hub"


def repo_folder(repo: str) -> Path:
    """Where the cache keeps *repo*."""
    return cache_root() / ("models--" + repo.replace("/", "--"))


def cached_commit(repo: str, revision: str = "main") -> str | None:
    """The commit that *revision* (a branch, a tag or a commit) stood for when it was fetched, or None."""
    place = repo_folder(repo)
    pointer = place / "refs" / revision
    commit = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else revision
    plain = re.fullmatch(r"[\w.-]+", commit) and commit not in (".", "..")
    snapshot = place / "snapshots" / commit if plain else None
    return commit if snapshot is not None and snapshot.is_dir() and any(snapshot.iterdir()) else None


def cached_snapshot(repo: str, revision: str = "main") -> Path | None:
    """The folder of *repo* at *revision* in the cache, or None."""
    commit = cached_commit(repo, revision)
    return None if commit is None else repo_folder(repo) / "snapshots" / commit


def on_disk(repo: str) -> bool:
    """True when some revision of *repo* is in the cache."""
    snapshots = repo_folder(repo) / "snapshots"
    return snapshots.is_dir() and any(path.is_dir() and any(path.iterdir()) for path in snapshots.iterdir())


def read_record(repo: str, commit: str) -> dict[str, Any]:
    """What `write_record` left: path -> size, time and hash of each file; empty where there is none."""
    try:
        found = json.loads((repo_folder(repo) / "zoo" / f"{commit}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(item, dict) for item in found.values()) else {}


def write_record(repo: str, commit: str, revision: str, hashes: dict[str, str]) -> None:
    """Note that these files of *commit* hold what the Hub announced, then let *revision* point to the commit."""
    snapshot = repo_folder(repo) / "snapshots" / commit
    record = read_record(repo, commit)
    for path, announced in hashes.items():
        record[path] = {**_state(snapshot / path), "hash": announced}
    _write(repo_folder(repo) / "zoo" / f"{commit}.json", json.dumps(record, indent=1))
    if revision != commit:
        _write(repo_folder(repo) / "refs" / revision, commit)


def spoiled(repo: str, commit: str) -> str | None:
    """The first file of a snapshot that is missing or not what the Hub announced; None when all are whole."""
    snapshot, record = repo_folder(repo) / "snapshots" / commit, read_record(repo, commit)
    if record:
        for path, item in record.items():
            file = snapshot / path
            if not file.is_file():
                return path
            if _state(file) != {key: item.get(key) for key in ("size", "time")} and not holds(file, str(item["hash"])):
                return path
        return None
    for file in sorted(snapshot.rglob("*")):
        if file.is_symlink() and not file.exists():
            return str(file.relative_to(snapshot))
        announced = _named_by_hash(file)
        if announced and not holds(file, announced):
            return str(file.relative_to(snapshot))
    return None


def holds(file: Path, announced: str) -> bool:
    """Whether the file has this hash: sha256, or the sha1 that git gives a file of its content."""
    with file.open("rb") as stream:
        if len(announced) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest() == announced
        digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == announced


def discard(file: Path) -> None:
    """Remove a file of a snapshot with the blobs its link leads to, as far as they lie in the cache."""
    root, chain = cache_root().resolve(), [file]
    while chain[-1].is_symlink():
        target = chain[-1].readlink()
        chain.append(Path(os.path.normpath(chain[-1].parent / target)))
    for link in chain:
        if link.parent.resolve().is_relative_to(root):
            link.unlink(missing_ok=True)


def _named_by_hash(file: Path) -> str | None:
    """The hash that the cache's layout gives a file by the name of its blob."""
    if not file.is_symlink() or not file.is_file():
        return None
    blob = Path(os.path.normpath(file.parent / file.readlink()))
    known = _SHA1.fullmatch(blob.name) or _SHA256.fullmatch(blob.name)
    return blob.name if blob.parent.name == "blobs" and known else None


def _state(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "time": found.st_mtime_ns}


def _write(file: Path, text: str) -> None:
    """All of it or nothing, so that an interrupted pull leaves the older state."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".partial-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(file)
    except OSError as error:
        raise ZooError(f"cannot write to the Hub cache ({file.parent}: {error.strerror})") from None
