"""Two processes with gloo make the same steps as one process with twice the batch."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path

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
train(validate(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    letters = random.Random(0)
    for split, rows in (("train", 40), ("val", 13)):
        with (tmp_path / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["sequence", "label"])
            writer.writerows(["".join(letters.choices("ACGT", k=16)), row % 2] for row in range(rows))
    head = {"kind": "sequence", "num_outputs": 2}
    recipe = {
        "name": "ranks",
        "model": {"name": "hyenadna", "d_model": 8, "n_layer": 1, "max_len": 20, "embed_dropout": 0.0, "head": head},
        "tokenizer": {"name": "char"},
        "data": {
            "name": "labelled",
            "root": str(tmp_path),
            "train": {"path": "train.csv"},
            "val": {"path": "val.csv"},
            "batch_size": 8,
        },
        "task": {"name": "classify", "optim": {"lr": 1e-3}},
        "trainer": {"max_epochs": 3, "accelerator": "cpu", "threads": 1, "log_every": 1, "monitor": "val/loss"},
    }
    one = train(validate(recipe), tmp_path / "one")
    recipe["data"]["batch_size"] = 4  # type: ignore[index]
    recipe["trainer"] |= {"devices": 2, "strategy": "ddp"}  # type: ignore[operator]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "recipe.json"), str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name = f"step-{one.steps:09d}.ckpt"
    ours, theirs = (checkpoint_io.load(tmp_path / run / "checkpoints" / name) for run in ("two", "one"))
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-3, atol=1e-5)
    assert len(ours["rng"]) == 2
    rows = list(csv.DictReader((tmp_path / "two" / "metrics.csv").open(newline="")))
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == 3
    assert min(losses) == pytest.approx(one.metrics["val/loss"], rel=1e-3)
    assert (tmp_path / "two" / "artifact" / "config.json").is_file()
