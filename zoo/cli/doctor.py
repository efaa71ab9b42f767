"""`zoo doctor`: what a report of a problem should say, and what is worth mending before a long run."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from zoo import __version__
from zoo.cli.common import Parser, print_json

NEEDED = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "safetensors", "huggingface-hub", "tokenizers",
          "numpy", "timm", "pyfaidx", "biopython", "matplotlib")  # fmt: skip
EXTRAS = {
    "tensorboard": "trainer.loggers=[tensorboard]", "wandb": "trainer.loggers=[wandb]",
    "mlflow": "trainer.loggers=[mlflow]", "trackio": "trainer.loggers=[trackio]", "optuna": "zoo sweep --trials",
    "onnx": "zoo export --format onnx", "onnxruntime": "zoo export --format onnx",
    "transformers": "the comparison of zoo export --format transformers", "hf-xet": "faster transfer of large files",
}  # fmt: skip
BAD = {"pytorch-lightning": ("2.6.2", "2.6.3"), "lightning": ("2.6.2", "2.6.3")}  # malicious releases


def parser() -> Parser:
    command = Parser(
        "doctor",
        "Versions, devices, the Hub cache and whether the Hub answers. Exit status 1 when something needs mending.",
        ["zoo doctor", "zoo doctor --json", "zoo doctor --offline"],
    )
    command.add_argument("--offline", action="store_true", help="do not ask the Hub")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    found = examine(args.offline)
    if args.json:
        print_json(found)
        return 1 if found["problems"] else 0
    for title, part in found.items():
        if title == "problems":
            continue
        print(title)
        width = max(map(len, part))
        for name, value in part.items():
            print(f"  {name:<{width}}  {value}")
    print()
    for problem in found["problems"]:
        print(f"problem: {problem}")
    print(f"{len(found['problems'])} problems" if found["problems"] else "no problems")
    return 1 if found["problems"] else 0


def examine(offline: bool = False) -> dict[str, Any]:
    """All facts by title, and `problems`: one sentence for each thing that needs mending."""
    problems: list[str] = []
    versions = {"zoo": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in NEEDED:
        versions[package] = version(package) or "missing"
        if versions[package] == "missing":
            problems.append(f"{package} is not installed: pip install seqzoo")
    for package, releases in BAD.items():
        if version(package) in releases:
            problems.append(
                f"{package} {version(package)} was a malicious release: uninstall it, change your passwords"
            )
    extras = {name: version(name) or f"not installed ({use})" for name, use in EXTRAS.items()}
    return {
        "versions": versions,
        "extras": extras,
        "devices": _devices(problems),
        "cache": _cache(problems),
        "hub": _hub(offline, problems),
        "problems": problems,
    }


def version(package: str) -> str:
    """Of an installed package; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _devices(problems: list[str]) -> dict[str, str]:
    found = {"cpu": f"{os.cpu_count()} cores, {_memory()}"}
    if importlib.util.find_spec("torch") is None:
        return found
    import torch

    found["threads"] = f"{torch.get_num_threads()} of torch"
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found[f"cuda:{i}"] = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {bf16}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    if len(found) == 2:
        found["gpu"] = "none: training runs on the CPU"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        problems.append("this machine has an NVIDIA driver, but torch was built without CUDA or for another driver")
    return found


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB of memory"
    except (ValueError, OSError, AttributeError):
        return "memory unknown"


def _cache(problems: list[str]) -> dict[str, str]:
    from zoo.hub.cache import cache_root

    root = cache_root()
    place = root
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    repos = list(root.glob("models--*")) if root.is_dir() else []
    blobs = [blob for repo in repos for blob in (repo / "blobs").glob("*") if blob.is_file()]
    size = sum(blob.stat().st_size for blob in blobs)
    found = {"folder": str(root), "models": f"{len(repos)}, {size / 1e9:.1f} GB", "free": f"{free / 1e9:.1f} GB"}
    if not os.access(place, os.W_OK):
        problems.append(f"the Hub cache {root} cannot be written: set HF_HOME to a folder of yours")
    if free < 1e9:
        problems.append(f"the disk of the Hub cache {root} has less than 1 GB left")
    left = [blob for blob in blobs if blob.suffix == ".incomplete"]
    if left:
        found["unfinished"] = f"{len(left)} downloads, continued by the next pull"
    return found


def _hub(offline: bool, problems: list[str]) -> dict[str, str]:
    from zoo.hub import client

    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = os.environ.get("HF_TOKEN") or _token_file().is_file()
    found = {"address": address, "login": "yes" if token else "no (needed for zoo push and private models)"}
    if offline or client.offline():
        found["answers"] = "not asked (offline)"
        return found
    why = client.reachable()
    found["answers"] = "yes" if not why else f"no: {why}"
    if why:
        problems.append(f"the Hub at {address} does not answer ({why}); set HF_HUB_OFFLINE=1 to work from the cache")
    return found


def _token_file() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
