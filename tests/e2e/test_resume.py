"""A run killed with SIGKILL at random steps and resumed ends with the weights of the unbroken run, bit for bit."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from zoo.train import checkpoint_io
from zoo.train.recipe import validate
from zoo.train.run import train

SCRIPT = """
import json, sys
from pathlib import Path
from zoo.train.recipe import validate
from zoo.train.run import train
train(validate(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), resume=True)
"""


def write_table(path: Path, rows: int, seed: int) -> None:
    letters = random.Random(seed)
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sequence", "label"])
        for _ in range(rows):
            writer.writerow(["".join(letters.choices("ACGT", k=24)), letters.randrange(3)])


def make_recipe(folder: Path, accumulate: int, workers: int) -> dict[str, Any]:
    write_table(folder / "train.csv", 101, 0)
    write_table(folder / "val.csv", 20, 1)
    data = {"name": "labelled", "root": str(folder), "train": {"path": "train.csv"}, "val": {"path": "val.csv"}}
    head = {"kind": "sequence", "num_outputs": 3, "dropout": 0.2}
    return {
        "name": "resumed",
        "seed": 3,
        "model": {"name": "hyenadna", "d_model": 16, "n_layer": 1, "max_len": 32, "resid_dropout": 0.2, "head": head},
        "tokenizer": {"name": "char"},
        "data": {**data, "batch_size": 8, "rc_augment": True, "num_workers": workers},
        "task": {"name": "classify", "optim": {"lr": 3e-3}},
        "trainer": {
            "max_steps": 60,
            "accumulate": accumulate,
            "checkpoint_every": 4,
            "val_every": 6,  # falls on a checkpoint at 12, 24, ...
            "monitor": "val/loss",
            "ema": 0.9 if accumulate > 1 else 0.0,
            "log_every": 1,
            "accelerator": "cpu",
            "threads": 1,
        },
    }


def logged_step(folder: Path) -> int:
    try:
        lines = (folder / "metrics.csv").read_text().splitlines()
        return int(lines[-1].split(",")[0])
    except (OSError, IndexError, ValueError):
        return 0


def run_and_kill(recipe: Path, folder: Path, at: int) -> bool:
    """Start or resume the run and SIGKILL it once step *at* is logged; True if it was killed before its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(recipe), str(folder)], env=environment, stderr=log
        )
        while process.poll() is None and logged_step(folder) < at:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "workers", "kills"), [(1, 0, 1), (2, 0, 1)])
def test_killed_run_ends_as_the_unbroken_one(tmp_path: Path, accumulate: int, workers: int, kills: int) -> None:
    recipe = make_recipe(tmp_path, accumulate, workers)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    straight = train(validate(recipe), tmp_path / "straight")

    folder = tmp_path / "killed"
    steps = sorted(random.SystemRandom().sample(range(5, 52), kills))
    for at in steps:
        assert run_and_kill(tmp_path / "recipe.json", folder, at), f"the run ended before step {at}"
    reached = logged_step(folder)
    resumed = train(validate(recipe), folder, resume=True)

    assert resumed.steps == straight.steps == 60
    assert resumed.metrics == straight.metrics
    assert resumed.chosen == straight.chosen
    for name in ("step-000000060.ckpt", "best.ckpt"):
        ours, theirs = (checkpoint_io.load(r.dir / "checkpoints" / name) for r in (resumed, straight))
        assert_same(ours["state_dict"], theirs["state_dict"], f"{name}, killed at {steps} (reached {reached})")
        assert_same(ours.get("optimizer_states"), theirs.get("optimizer_states"), f"{name} optimizer")


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}: {key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    else:
        assert ours == theirs, where
