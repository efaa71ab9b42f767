"""A tokenizer and its discriminator in two processes make the steps of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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
STEPS = 6


def recipe(folder: Path, ranks: int) -> dict[str, Any]:
    """Six steps of 4 pictures, the discriminator from the third on."""
    vit = {"width": 16, "layers": 1, "heads": 2, "mlp": {"kind": "gelu", "width": 32}}
    discriminator = {"hidden": 32, "stages": 1, "patches": 4}
    return {
        "name": "gan",
        "model": {
            "name": "titok", "encoder": vit, "decoder": vit, "encoder_patch": 8, "decoder_patch": 8, "latents": 2,
            "bottleneck": "fsq", "fsq": {"levels": [4, 4]}, "preprocess": {"size": 16}, "init": "scaled",
        },
        "data": {
            "name": "images", "root": str(folder), "train": {"path": "train"}, "val": {"path": "val"},
            "preprocess": {"size": 16}, "batch_size": 4 // ranks, "augment": {"flip": True, "shift": 2},
        },
        "task": {
            "name": "image_reconstruction", "perceptual_weight": 0.0, "optim": {"lr": 1e-3},
            # LeCam's averages are each process's own, as in the official code
            "adversarial": {"start_step": 2, "weight": 0.1, "lecam": 0.0, "optim": {"lr": 1e-3},
                            "discriminator": discriminator},
        },
        "trainer": {
            "max_steps": STEPS, "accelerator": "cpu", "threads": 1, "log_every": 1, "checkpoint_every": STEPS,
            "val_every": STEPS, "devices": ranks,
            "strategy": "auto" if ranks == 1 else "ddp_find_unused_parameters_true",
        },
    }  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        (tmp_path / split / "noise").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / split / "noise" / f"{i}.png"
            )
    return tmp_path


@pytest.mark.slow
def test_two_processes_with_a_discriminator_equal_one(pictures: Path) -> None:
    train(validate(recipe(pictures, 1)), pictures / "one")
    (pictures / "script.py").write_text(SCRIPT)
    (pictures / "recipe.json").write_text(json.dumps(recipe(pictures, 2)))
    done = subprocess.run(
        [sys.executable, str(pictures / "script.py"), str(pictures / "recipe.json"), str(pictures / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        checkpoint_io.load(checkpoint_io.step_path(pictures / run / "checkpoints", STEPS)) for run in ("one", "two")
    )
    assert one["global_step"] == two["global_step"] == STEPS
    started = [{int(s["step"]) for s in state["optimizer_states"][1]["state"].values()} for state in (one, two)]
    assert started == [{STEPS - 2}] * 2
    learned = [key for key in one["state_dict"] if "recent" not in key]
    assert any(key.startswith("discriminator.") for key in learned)
    for key in learned:
        torch.testing.assert_close(two["state_dict"][key], one["state_dict"][key], rtol=1e-3, atol=1e-4)
