"""What a run leaves to be reproduced by: versions, commit, hardware, and the folder it works in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from zoo.config import to_dict
from zoo.errors import ConfigError, ZooError
from zoo.train.checkpoint_io import write_atomic, write_text
from zoo.train.recipe import RecipeConfig, validate

PACKAGES = ("seqzoo", "torch", "pytorch-lightning", "torchmetrics", "numpy", "tokenizers", "hydra-core", "safetensors")
OURS = ("checkpoints", "artifact", "adapter", "recipe.json", "metrics.csv", "curves.png")
# what may differ between a run and its continuation: nothing that is computed changes but its rounding
FREE = {
    *(f"trainer.{key}" for key in ("log_every", "keep", "checkpoint_every", "loggers", "threads")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy")),
    "data.num_workers",
}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # not installed as a distribution (a bare checkout)
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from and whether it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        out = [
            subprocess.run(["git", "-C", str(here), *c], capture_output=True, text=True, timeout=20) for c in commands
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if any(item.returncode for item in out):
        return None
    return {"commit": out[0].stdout.strip(), "changed": bool(out[1].stdout.strip())}


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, in the words that matter for speed."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "gpu": gpu,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.platform(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is never half there."""
    text = json.dumps(to_dict(value), indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: write_text(file, text))


def claim_folder(out: Path, recipe: RecipeConfig, resume: bool) -> None:
    """Make *out* the folder of this run.

    Raises:
        ZooError: it holds another run (without resume), or a run of another recipe (with it); it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise ZooError(f"{out} is a file, not a folder for a run")
    held = [name for name in OURS if (out / name).exists()]
    if held and not resume:
        raise ZooError(
            f"{out} already holds a run ({', '.join(held)}): continue it with --resume or choose another folder"
        )
    saved = out / "recipe.json"
    if resume and saved.is_file():
        before, after = _filled(_stored(saved)), to_dict(recipe)
        difference = _difference(_over_all(before), _over_all(after))
        if difference:
            raise ZooError(f"{out} was started with another recipe and cannot be resumed with this one: {difference}")
        return
    if resume and held:
        raise ZooError(f"{out} has no recipe.json, so it cannot be told whether this recipe is the one to resume")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(saved, recipe)
    except OSError as error:
        raise ZooError(f"cannot write into the run's folder {out}: {error.strerror}") from None


def _stored(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("trainer"), dict) or "data" not in found:
        raise ZooError(f"{file} is damaged, so it cannot be told whether this recipe is the one to resume")
    return found


def _filled(recipe: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the defaults of fields that did not exist when it was written."""
    try:
        return to_dict(validate(recipe))
    except ConfigError:  # a field that no longer exists: the comparison will name it
        return recipe


def _over_all(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with the batch of all processes together, where their number is written in it."""
    trainer, data = recipe["trainer"], dict(recipe["data"])
    if isinstance(trainer["devices"], int) and isinstance(data.get("batch_size"), int):
        data["batch_size"] *= trainer["devices"] * trainer["num_nodes"]
    return {**recipe, "data": data}


def _difference(old: Any, new: Any, path: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            place = f"{path}.{key}".lstrip(".")
            found = None if place in FREE else _difference(old.get(key), new.get(key), place)
            if found:
                return found
        return None
    return None if old == new else f"{path} was {old!r} and is {new!r}"


def is_first() -> bool:
    """True in the process that writes files and speaks: the only one, or rank 0 of several."""
    return int(getattr(rank_zero_only, "rank", None) or 0) == 0


def say(text: str) -> None:
    """One line for the person watching; results go to stdout, this does not."""
    if is_first():
        print(text, file=sys.stderr, flush=True)
