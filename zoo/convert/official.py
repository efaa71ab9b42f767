"""Opening official weight files without running anything they hold, and finding out whose they are.

safetensors (one file, or shards with an index) and PyTorch pickles (Lightning checkpoints among them) are read; a
pickle only by the loader that builds tensors and plain containers. `config.json` is looked for beside the weights.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoo import catalogue
from zoo.config import resolve
from zoo.convert import load_strict
from zoo.errors import ZooError

# in this order: safetensors before pickles, an index before the single file of the same kind
_NAMES = (
    "model.safetensors.index.json", "model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "weights.ckpt", "*.safetensors", "*.ckpt", "*.pt", "*.bin",
)  # fmt: skip


def open_official(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any]]:
    """Read the weights at *path* (a file, or a folder as downloaded from a hub).

    Returns:
        The state dict, the config beside or inside the file (None where there is neither), and metadata: `file`,
        `format` (`safetensors` or `pickle`) and whatever plain entries a checkpoint has beside its state dict.

    Raises:
        ZooError: nothing to read, a damaged file, or a pickle that needs more than tensors.
    """
    file = _find(path)
    state, extra = (_sharded(file), {}) if file.name.endswith(".index.json") else _read(file)
    config = _config_beside(file)
    if config is None:
        inside = extra.get("hyper_parameters", extra.get("config"))
        config = dict(inside) if isinstance(inside, Mapping) else None
    kind = "safetensors" if ".safetensors" in file.name else "pickle"
    return state, config, {"file": str(file), "format": kind, **extra}


def detect_family(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> str:
    """The catalogue family whose converter recognises these weights (`recognises(state, config)` of its module).

    Raises:
        ZooError: none does.
    """
    for family, target in catalogue.CONVERTERS.items():
        recognises = getattr(_module(target), "recognises", None)
        if recognises is not None and recognises(state, config):
            return family
    first = next(iter(state), "none")
    known = ", ".join(sorted(catalogue.CONVERTERS))
    raise ZooError(f"these weights belong to no family with a converter (first key '{first}'; known families: {known})")


def convert_file(
    path: Path, config_path: Path | None = None, family: str | None = None
) -> tuple[str, Any, dict[str, Tensor]]:
    """Open, recognise and convert official weights; every key is used and every shape is checked.

    Returns:
        Family, its config, and our state dict.

    Raises:
        ZooError: see `open_official`, `detect_family` and the family's converter; or no config where one is needed.
    """
    state, config, meta = open_official(path)
    if config_path is not None:
        config = _read_json(config_path)
    family = family or detect_family(state, config)
    module = _module(catalogue.lookup(catalogue.CONVERTERS, family, "family"))
    if config is None or not _usable(module, config):
        infer = getattr(module, "config_from_state", None)
        if infer is None:
            raise ZooError(f"no config.json beside {meta['file']}: a {family} model needs it, name it with --config")
        ours = infer(state)
    else:
        ours = module.config_from_official(config)
    weights = module.to_zoo(state, ours)
    family = getattr(module, "MODEL", family)  # several publications may be one family of ours
    with torch.device("meta"):
        model = resolve(catalogue.lookup(catalogue.MODELS, family, "model"))(ours)
    load_strict(model, weights, Path(meta["file"]).name)
    return family, ours, weights


def _usable(module: Any, config: Mapping[str, Any]) -> bool:
    """Whether *config* is one the family's converter can read; hyper-parameters of a trainer often are not."""
    accepts = getattr(module, "accepts_config", None)
    return True if accepts is None else bool(accepts(config))


def _module(target: str) -> Any:
    from importlib import import_module

    return import_module(target)  # a string of the literal table CONVERTERS


def _find(path: Path) -> Path:
    if path.is_file():
        if path.name == "config.json":
            return _find(path.parent)
        return path
    if not path.is_dir():
        raise ZooError(f"no such file or folder: {path}")
    for pattern in _NAMES:
        found = sorted(path.glob(pattern))
        if len(found) == 1 or (found and "*" not in pattern):
            return found[0]
        if found:
            raise ZooError(f"{path} holds {len(found)} weight files ({found[0].name}, {found[1].name}, ...): name one")
    raise ZooError(f"{path} holds no weights (*.safetensors, *.ckpt, *.pt or *.bin)")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if file.stat().st_size == 0:
        raise ZooError(f"{file} is empty")
    if file.suffix == ".safetensors":
        try:
            return load_file(file), {}
        except (SafetensorError, OSError) as error:
            raise ZooError(f"{file} is damaged or no safetensors file ({error}): fetch it again") from None
    return _read_pickle(file)


def _read_pickle(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _is_whole_zip(file):
            raise ZooError(
                f"{file} holds Python objects beside its tensors and is not opened, since loading them could run any "
                f"code: save its state dict alone where you trust the file, or take the safetensors version"
            ) from error
        raise ZooError(f"{file} is damaged or no PyTorch file: fetch it again") from None
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ZooError(f"{file} is damaged or no PyTorch file ({_first_line(error)}): fetch it again") from None
    if not isinstance(data, Mapping):
        raise ZooError(f"{file} holds a {type(data).__name__} where a state dict was expected")
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(data.get(key), Mapping) and not isinstance(data.get(key), Tensor):
            extra = {name: value for name, value in data.items() if name != key and _is_plain(value)}
            return _tensors(data[key], file), extra
    return _tensors(data, file), {}


def _tensors(state: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ZooError(f"{file} holds no tensors")
    return tensors


def _sharded(index: Path) -> dict[str, Tensor]:
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ZooError(f"{index} names no shards (weight_map)")
    state: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        shard = index.parent / Path(name).name
        if not shard.is_file():
            raise ZooError(f"the shard {shard} named in {index.name} is missing")
        state |= _read(shard)[0]
    lost = sorted(set(listed) - set(state))
    if lost:
        raise ZooError(f"the shards of {index} lack '{lost[0]}', which the index promises")
    return state


def _config_beside(file: Path) -> dict[str, Any] | None:
    beside = file.parent / "config.json"
    return _read_json(beside) if beside.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ZooError(f"{path} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ZooError(f"{path} holds a {type(value).__name__} where an object was expected")
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _is_whole_zip(file: Path) -> bool:
    """A zip whose directory is readable, or a legacy pickle that starts like one."""
    return zipfile.is_zipfile(file) or file.read_bytes()[:1] == b"\x80"


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
