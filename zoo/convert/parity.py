"""Parity cases: what an official implementation computed, replayed by our model and compared number for number.

The format is described in tests/parity/README.md. A case stores no weights: they are filled by the rule
`splitmix-v1`, a function of each state-dict name, and the family's converter turns them into ours.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo import catalogue
from zoo.config import resolve
from zoo.errors import ZooError, nearest

_DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


class Skip(Exception):
    """A case that needs outside weights which are not on this machine; the message names them."""


def splitmix(name: str, shape: list[int]) -> Tensor:
    """Float32 tensor of *shape*, a pure function of *name* (scheme splitmix-v1)."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        z = (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)) + np.arange(count, dtype=np.uint64)
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    u = (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    if len(shape) >= 2:
        u = u * np.sqrt(3 / np.prod(shape[1:], dtype=np.float64))
    elif name.endswith(("weight", "gamma")):
        u = 1 + 0.1 * u
    else:
        u = 0.1 * u
    return torch.from_numpy(u.astype(np.float32)).reshape(shape)


@dataclass
class Case:
    """One folder with case.json, manifest.json, inputs and outputs."""

    path: Path

    @cached_property
    def meta(self) -> dict[str, Any]:
        return _read_json(self.path / "case.json")

    @property
    def system(self) -> str:
        return str(self.meta["system"])

    @property
    def config(self) -> dict[str, Any]:
        """The official constructor's arguments."""
        return dict(self.meta.get("config") or {})

    @property
    def run(self) -> dict[str, Any]:
        """Arguments of the run that are no constructor arguments (steps, guidance)."""
        return dict(self.meta.get("run") or {})

    @property
    def class_name(self) -> str:
        """The official class: config's `class`, else what stands in source.file."""
        if "class" in self.config:
            return str(self.config["class"])
        file = self.meta["source"].get("file", "")
        return file if isinstance(file, str) else " ".join(file)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The official state dict in official order: kept values where stored, the rest filled by rule."""
        kept = self._tensors("kept")
        names = set((self.meta.get("fill") or {}).get("kept") or ())
        state: dict[str, Tensor] = {}
        for name, (shape, dtype) in _read_json(self.path / "manifest.json").items():
            kind = _DTYPES[dtype.removeprefix("torch.")]
            if name in kept:
                state[name] = kept[name]
            elif name in names or not kind.is_floating_point:
                state[name] = torch.zeros(shape, dtype=kind)
            else:
                state[name] = splitmix(name, shape).to(kind)
        return state

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._tensors("inputs")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._tensors("outputs")

    @property
    def tolerance(self) -> tuple[float, float]:
        """(atol, rtol)"""
        value = self.meta.get("tolerance") or {}
        return float(value.get("atol", 1e-5)), float(value.get("rtol", 1e-4))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}


@dataclass
class OutputCheck:
    """One output of a case: its largest error in units of its tolerance (a ratio of 1 is the limit)."""

    name: str
    error: float
    ratio: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.ratio <= 1


@dataclass
class CaseResult:
    """The outcome of one case."""

    path: str
    system: str
    checks: list[OutputCheck]
    problem: str = ""
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and bool(self.skipped or (self.checks and all(check.passed for check in self.checks)))

    @property
    def worst(self) -> OutputCheck | None:
        return max(self.checks, key=lambda c: (bool(c.problem), c.ratio), default=None)


def find_cases(paths: list[Path]) -> list[Path]:
    """Case folders at or below *paths*, sorted.

    Raises:
        ZooError: a path does not exist or holds no case.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ZooError(f"no such folder: {path}")
        here = sorted(file.parent for file in path.rglob("case.json"))
        if not here:
            raise ZooError(f"no parity case (case.json) in {path}")
        found += here
    return found


def replay_all(paths: list[Path]) -> Iterator[CaseResult]:
    """Replay the cases one after the other."""
    for path in paths:
        yield replay_case(path)


def replay_case(path: Path) -> CaseResult:
    """Run one case and compare every stored output; any exception of ours is a failure of the case, named in it."""
    case = Case(path)
    try:
        system = case.system
    except (OSError, ValueError, KeyError, TypeError) as error:
        return CaseResult(str(path), "?", [], problem=f"case.json cannot be read: {error}")
    target = catalogue.REPLAYS.get(system)
    if target is None:
        hint = nearest(system, catalogue.REPLAYS)
        return CaseResult(str(path), system, [], problem=f"no replay for system '{system}'{hint}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            produced = resolve(target)(case)
    except Skip as reason:
        return CaseResult(str(path), system, [], skipped=str(reason))
    except Exception as error:  # a broken replay must not hide the other cases
        return CaseResult(str(path), system, [], problem=f"{type(error).__name__}: {error}")
    return CaseResult(
        str(path),
        system,
        [compare(name, want, produced.get(name), case.tolerance) for name, want in case.outputs.items()],
    )


def compare(name: str, expected: Tensor, actual: Tensor | None, tolerance: tuple[float, float]) -> OutputCheck:
    """Compare one output within atol + rtol·|expected|; integers and booleans must be equal."""
    if actual is None:
        return OutputCheck(name, float("inf"), float("inf"), "not produced")
    actual = actual.detach().cpu()
    if actual.shape != expected.shape:
        return OutputCheck(
            name, float("inf"), float("inf"), f"shape {list(actual.shape)}, expected {list(expected.shape)}"
        )
    if expected.numel() == 0:
        return OutputCheck(name, 0.0, 0.0)
    if not expected.dtype.is_floating_point and not expected.dtype.is_complex:
        wrong = int((actual.to(expected.dtype) != expected).sum())
        return OutputCheck(
            name, float(wrong), float(wrong), f"{wrong} of {expected.numel()} integers differ" if wrong else ""
        )
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    a, e = actual.to(wide), expected.to(wide)
    equal = (a == e) | (torch.isnan(a) & torch.isnan(e))  # infinities of one sign are equal
    difference = torch.where(equal, torch.zeros_like(a), a - e).abs()
    ratio = difference / (tolerance[0] + tolerance[1] * e.abs())
    ratio = torch.where(equal, torch.zeros_like(ratio), ratio).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return OutputCheck(name, float(difference.nan_to_num(nan=float("inf")).max()), float(ratio.max()))


class Capture:
    """Records outputs of submodules in a forward pass: `with Capture({"stage": module}) as seen: ...; seen["stage"]`.

    A module called several times gives its last output under the name and all of them under `seen.calls[name]`.
    Of a tuple output the first tensor is taken.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = dict(modules)
        self.calls: dict[str, list[Tensor]] = {name: [] for name in modules}

    def __enter__(self) -> Capture:
        def hook(name: str) -> Any:
            def record(_module: nn.Module, _args: Any, output: Any) -> None:
                self.calls[name].append(output[0] if isinstance(output, tuple) else output)

            return record

        self._handles = [module.register_forward_hook(hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def __getitem__(self, name: str) -> Tensor:
        return self.calls[name][-1]

    def all(self) -> dict[str, Tensor]:
        """Every recorded stage by name."""
        return {name: outputs[-1] for name, outputs in self.calls.items() if outputs}


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
