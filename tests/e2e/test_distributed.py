"""Two processes with gloo make the steps of one process with twice the batch, and continue each other's runs."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import ZooError
from zoo.train import checkpoint_io
from zoo.train.recipe import validate
from zoo.train.run import train

SCRIPT = """
import json, sys
from pathlib import Path
from zoo.train.recipe import validate
from zoo.train.run import train
train(validate(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), resume=sys.argv[3] == "resume")
"""
STEPS, HALF = 15, 6


def recipe_in(folder: Path, strategy: str = "auto") -> dict[str, Any]:
    """15 steps of 8 samples a step, over one process or two."""
    ranks = 1 if strategy == "auto" else 2
    head = {"kind": "sequence", "num_outputs": 2}
    return {
        "name": "ranks",
        "model": {"name": "hyenadna", "d_model": 8, "n_layer": 2, "max_len": 20, "embed_dropout": 0.0, "head": head},
        "tokenizer": {"name": "char"},
        "data": {
            "name": "labelled",
            "root": str(folder),
            "train": {"path": "train.csv"},
            "val": {"path": "val.csv"},
            "batch_size": 8 // ranks,
        },
        "task": {"name": "classify", "optim": {"lr": 1e-3}},
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "threads": 1,
            "log_every": 1,
            "checkpoint_every": HALF,
            "keep": 9,
            "monitor": "val/loss",
            "ema": 0.5,
            "devices": ranks,
            "strategy": strategy,
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    letters = random.Random(0)
    for split, rows in (("train", 40), ("val", 13)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["sequence", "label"])
            writer.writerows(["".join(letters.choices("ACGT", k=16)), row % 2] for row in range(rows))
    return folder


@pytest.fixture(scope="module")
def one(data: Path) -> Path:
    train(validate(recipe_in(data)), data / "one")
    return data / "one"


def two(data: Path, recipe: dict[str, Any], out: Path, mode: str = "new") -> None:
    """Train in two processes that a script starts, as a user's would."""
    (data / "script.py").write_text(SCRIPT)
    (data / "recipe.json").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, str(data / "script.py"), str(data / "recipe.json"), str(out), mode],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def half(run: Path, out: Path) -> Path:
    """The folder of *run* as a kill at step HALF would have left it."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "artifact")
    for path in checkpoint_io.checkpoints(out / "checkpoints"):
        if path != checkpoint_io.step_path(out / "checkpoints", HALF):
            path.unlink()
    return out


def final(run: Path) -> dict[str, Any]:
    return checkpoint_io.load(checkpoint_io.step_path(run / "checkpoints", STEPS))


def column(run: Path, name: str) -> list[float]:
    rows = csv.DictReader((run / "metrics.csv").open(newline=""))
    return [float(row[name]) for row in rows if row[name]]


def assert_same_run(ours: Path, theirs: Path) -> None:
    for name in ("train/loss", "val/loss"):
        torch.testing.assert_close(
            torch.tensor(column(ours, name)), torch.tensor(column(theirs, name)), rtol=1e-5, atol=1e-6
        )
    a, b = final(ours), final(theirs)
    torch.testing.assert_close(a["state_dict"], b["state_dict"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a["callbacks"], b["callbacks"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_equal_one_and_each_resumes_the_other(data: Path, one: Path, strategy: str) -> None:
    recipe = recipe_in(data, strategy)
    out = data / strategy
    two(data, recipe, out)
    assert_same_run(out, one)
    assert len(final(out)["rng"]) == 2
    assert len(column(out, "val/loss")) == 3
    artifact = zoo.load(out / "artifact")
    torch.testing.assert_close(
        dict(artifact.model.state_dict()), dict(zoo.load(one / "artifact").model.state_dict()), rtol=1e-4, atol=1e-5
    )

    again = half(out, data / f"{strategy}-again")
    two(data, recipe, again, "resume")
    for key, value in final(out)["state_dict"].items():
        assert torch.equal(final(again)["state_dict"][key], value), f"{key}: the same two ranks resume bit for bit"

    alone = half(out, data / f"{strategy}-alone")
    train(validate(recipe_in(data)), alone, resume=True)
    assert_same_run(alone, one)

    joined = half(one, data / f"{strategy}-joined")
    two(data, recipe, joined, "resume")
    assert_same_run(joined, one)


@pytest.mark.slow
def test_adapters_over_two_ranks_equal_one(data: Path, one: Path) -> None:
    """LoRA from an artifact: losses, adapters and head of two ranks are those of one, and nothing else has moved."""

    def adapted(strategy: str = "auto") -> dict[str, Any]:
        recipe = {**recipe_in(data, strategy), "init": str(one / "artifact")}
        recipe["finetune"] = {"mode": "lora", "lora": {"rank": 2, "alpha": 4.0}}
        recipe["task"]["optim"]["lr"] = 1e-2
        return recipe

    train(validate(adapted()), data / "lora-one")
    two(data, adapted("ddp"), data / "lora-two")
    assert_same_run(data / "lora-two", data / "lora-one")
    before = zoo.load(one / "artifact").model.state_dict()
    after = {key.removeprefix("model."): value for key, value in final(data / "lora-two")["state_dict"].items()}
    grown = [value for key, value in after.items() if "lora_B" in key]
    assert grown
    assert all(value.abs().max() > 1e-4 for value in grown), "adapters start at zero"
    frozen = [key for key in before if key in after and not key.startswith("head.")]
    assert frozen
    for key in frozen:
        assert torch.equal(after[key], before[key]), f"{key} is not to be trained"
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_another_batch_over_all_ranks_is_refused(data: Path, one: Path) -> None:
    recipe = copy.deepcopy(recipe_in(data))
    recipe["data"]["batch_size"] = 4
    with pytest.raises(ZooError, match=r"data.batch_size was 8 and is 4"):
        train(validate(recipe), half(one, data / "other"), resume=True)
