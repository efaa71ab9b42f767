"""Checkpoints verify, fall back, stay whole when the writer dies or the disk is full, and never run code."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo.errors import ZooError
from zoo.train import checkpoint_io as io


def payload(value: float) -> dict[str, object]:
    return {"weights": torch.full((1000,), value), "step": 3, "nested": [{"a": (1, 2.5, "x", None)}]}


def test_round_trip_and_side_file(tmp_path: Path) -> None:
    path = io.step_path(tmp_path, 7)
    io.save(payload(1.0), path)
    assert torch.equal(io.load(path)["weights"], torch.ones(1000))
    digest, name = io.side_file(path).read_text().split()
    assert (digest, name) == (io.sha256_file(path), path.name)
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name, path.name + ".sha256"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no_digest", "empty_digest", "gone"])
def test_newest_that_verifies(tmp_path: Path, damage: str) -> None:
    for step in (9, 10, 100):
        io.save(payload(step), io.step_path(tmp_path, step))
    newest = io.step_path(tmp_path, 100)
    data = newest.read_bytes()
    if damage == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        newest.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "no_digest":
        io.side_file(newest).unlink()
    elif damage == "empty_digest":
        io.side_file(newest).write_text("")
    else:
        newest.unlink()
    said: list[str] = []
    assert io.newest_valid(tmp_path, said.append) == io.step_path(tmp_path, 10)
    assert len(said) == (0 if damage == "gone" else 1)
    assert all("step-000000100.ckpt" in line for line in said)
    with pytest.raises(ZooError, match="step-000000100"):
        io.load(newest)


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert io.newest_valid(tmp_path) is None
    assert io.newest_valid(tmp_path / "absent") is None


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (5, 20, 100, 1000):
        io.save(payload(step), io.step_path(tmp_path, step))
    io.save(payload(0), tmp_path / "best.ckpt")
    (tmp_path / ".step-000000007.ckpt.1.tmp").write_bytes(b"left by a killed writer")
    io.prune(tmp_path, 2)
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".ckpt")
    assert left == ["best.ckpt", "step-000000100.ckpt", "step-000001000.ckpt"]
    assert not list(tmp_path.glob(".*"))
    assert len(list(tmp_path.glob("*.sha256"))) == 3


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    path = tmp_path / "step-000000001.ckpt"
    torch.save({"x": Evil()}, path)
    io.side_file(path).write_text(f"{io.sha256_file(path)}  {path.name}\n")
    with pytest.raises(ZooError, match="not a training checkpoint"):
        io.load(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ZooError, match="does not match its sha256"):
        io.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001.ckpt"
    io.save(payload(1.0), path)
    before = path.read_bytes()

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        io.write_atomic(path, fail)
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == [path.name, path.name + ".sha256"]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-000000001.ckpt"
    io.save(payload(1.0), path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ZooError, match=r"cannot write .*step-000000001\.ckpt: No space left on device"):
        io.save(payload(2.0), path)
    assert io.problem(path) is None
    assert torch.equal(io.load(path)["weights"], torch.ones(1000))


def test_killed_while_overwriting_keeps_a_valid_file(tmp_path: Path) -> None:
    """The process dies between writing the new bytes and the rename; the checkpoint before it still verifies."""
    io.save(payload(1.0), io.step_path(tmp_path, 1))
    script = (
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from zoo.train import checkpoint_io as io\n"
        "os.replace = lambda *a: os._exit(9)\n"
        "io.save({'weights': torch.zeros(1000)}, io.step_path(Path(sys.argv[1]), 2))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120)
    assert done.returncode == 9
    assert io.newest_valid(tmp_path) == io.step_path(tmp_path, 1)
    io.save(payload(3.0), io.step_path(tmp_path, 3))
    io.prune(tmp_path, 5)
    assert not list(tmp_path.glob(".*.tmp"))
