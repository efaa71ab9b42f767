"""Checkpoints that survive a kill at any moment: written beside, flushed, renamed, and only read back when they verify.

Lightning's own writer goes through the system's temporary folder, without fsync; a process killed while the file is
moved across file systems loses the previous checkpoint too. Here the file is complete under a temporary name in the
same folder before it takes its place, and a side file holds the sha256 of what was written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from zoo.errors import ZooError

_STEP = re.compile(r"step-(\d+)\.ckpt")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def side_file(path: Path) -> Path:
    """Where the sha256 of checkpoint *path* stands."""
    return path.with_name(path.name + ".sha256")


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let *write* fill a temporary file in *path*'s folder, flush it to the disk, and rename it to *path*.

    A reader sees the old file or the whole new one, also after a power cut. On any error the temporary file goes and
    *path* stays what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries: without it a renamed file may be gone after a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(payload: dict[str, Any], path: Path) -> None:
    """Write *payload* (tensors, numbers, strings, plain containers) to *path*, with its sha256 beside it.

    The digest lands first: a file that is there without a matching digest was never announced as complete.

    Raises:
        ZooError: the disk is full or not writable; the checkpoints that were there before are as they were.
    """
    digest = ""

    def write(temporary: Path) -> None:
        nonlocal digest
        torch.save(payload, temporary)
        digest = sha256_file(temporary)
        side = side_file(path)
        write_atomic(side, lambda file: write_text(file, f"{digest}  {path.name}\n"))

    try:
        write_atomic(path, write)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or f"is the disk full? ({error})"
        raise ZooError(f"cannot write {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """UTF-8, as a function that `write_atomic` can be given."""
    path.write_text(text, encoding="utf-8")


def problem(path: Path) -> str | None:
    """Why checkpoint *path* cannot be trusted, or None when its bytes are those that were written."""
    side = side_file(path)
    if not path.is_file():
        return f"{path} does not exist"
    if not side.is_file():
        return f"{path} has no sha256 beside it ({side.name})"
    expected = side.read_text(encoding="utf-8").split()
    if not expected or sha256_file(path) != expected[0]:
        return f"{path} does not match its sha256 (truncated or changed after it was written)"
    return None


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint that verifies. Only tensors and plain values are unpickled (`weights_only=True`).

    Raises:
        ZooError: the file is missing, does not match its sha256, or holds anything but plain values.
    """
    reason = problem(path)
    if reason:
        raise ZooError(reason)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ZooError(f"{path} is not a training checkpoint of this zoo: {str(error).splitlines()[0]}") from error


def step_path(folder: Path, step: int) -> Path:
    """Name of the checkpoint written after optimiser step *step*."""
    return folder / f"step-{step:09d}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """The step checkpoints in *folder*, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_valid(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint in *folder* that verifies; *say* is told of each newer one that was passed over."""
    for path in reversed(checkpoints(folder)):
        reason = problem(path)
        if reason is None:
            return path
        say(f"passing over {path.name}: {reason}")
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the *keep* newest step checkpoints, and what a killed writer left behind."""
    for path in checkpoints(folder)[: -max(keep, 1)]:
        path.unlink(missing_ok=True)
        side_file(path).unlink(missing_ok=True)
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


class SafeCheckpointIO(CheckpointIO):
    """Lightning plugin that reads and writes through this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        side_file(Path(path)).unlink(missing_ok=True)
