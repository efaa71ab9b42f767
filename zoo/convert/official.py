"""Opening official weight files without running anything they hold, and finding out whose they are.

safetensors (one file, or shards with an index) and PyTorch pickles (Lightning checkpoints among them) are read; a
pickle only by the loader that builds tensors and plain containers. `config.json` is looked for beside the weights.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zoo import catalogue
from zoo.config import resolve, to_dict
from zoo.convert import load_strict
from zoo.convert.restricted import load_restricted
from zoo.errors import ZooError

# fields of configs that say how many times something with weights of its own is built
_COUNT = re.compile(r"n_layer|n_layers|layers|depth|\w*_?blocks|num_inner_mlps|\w*_layers")
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
    file = find_weights(path)
    state, extra = (_sharded(file), {}) if file.name.endswith(".index.json") else _read(file)
    config = _config_beside(file)
    if config is None:
        inside = extra.get("hyper_parameters", extra.get("config"))
        config = dict(inside) if isinstance(inside, Mapping) else None
        if config is not None and isinstance(config.get("args"), Mapping):  # a script's arguments, kept whole
            config = dict(config["args"])
    kind = "safetensors" if ".safetensors" in file.name else "pickle"
    return state, config, {"file": str(file), "format": kind, **extra}


def detect_family(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> str:
    """The catalogue family whose converter recognises these weights (`recognises(state, config)` of its module).

    Raises:
        ZooError: none does.
    """
    for family, target in catalogue.CONVERTERS.items():
        recognises = getattr(converter_module(target), "recognises", None)
        try:
            if recognises is not None and recognises(state, config):
                return family
        except (TypeError, ValueError, AttributeError, KeyError):  # a config of a stranger: not of this family
            continue
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
    return convert_state(state, config, meta["file"], family)


def convert_state(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, file: str, family: str | None = None
) -> tuple[str, Any, dict[str, Tensor]]:
    """As `convert_file` for what `open_official` gave; the tensors may be on the meta device.

    Raises:
        ZooError: as `convert_file`; a config with values of the wrong kind is answered with the first of them.
    """
    family = family or detect_family(state, config)
    module = converter_module(catalogue.lookup(catalogue.CONVERTERS, family, "family"))
    try:
        if config is not None and _usable(module, config):
            ours = module.config_from_official(config)
        else:
            infer = getattr(module, "config_from_state", None)
            if infer is None:
                raise ZooError(f"no config.json beside {file}: a {family} model needs it, name it with --config")
            ours = infer(state)
    except ZooError:
        raise
    except Exception as error:
        # converters trust their input; that of a stranger's file may break them in any way
        raise ZooError(f"the config beside {file} is no {family} config ({_first_line(error)})") from error
    check_counts(ours, len(state), f"the config beside {file}")
    try:
        weights = module.to_zoo(state, ours)
        family = getattr(module, "MODEL", family)  # several publications may be one family of ours
        with torch.device("meta"):
            model = resolve(catalogue.lookup(catalogue.MODELS, family, "model"))(ours)
    except ZooError:
        raise
    except Exception as error:
        raise ZooError(f"{file} and its config do not fit a {family} model ({_first_line(error)})") from error
    load_strict(model, weights, Path(file).name)
    return family, ours, weights


def check_counts(config: Any, tensors: int, where: str) -> None:
    """Refuse more layers than there are tensors: such a config is not of this file, and would be built for hours.

    Raises:
        ZooError: names the field.
    """
    for name, count in _counts(to_dict(config), ""):
        if count > max(tensors, 64):
            raise ZooError(f"{where} has {name}={count:,} for weights of {tensors} tensors, which cannot be")


def _counts(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _counts(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _counts(item, name if isinstance(item, dict) else "")
    elif type(value) is int and _COUNT.fullmatch(name):
        yield name, value


def _usable(module: Any, config: Mapping[str, Any]) -> bool:
    """Whether *config* is one the family's converter can read; hyper-parameters of a trainer often are not."""
    accepts = getattr(module, "accepts_config", None)
    return True if accepts is None else bool(accepts(config))


def converter_module(target: str) -> Any:
    """The module that a value of CONVERTERS names."""
    from importlib import import_module

    return import_module(target)  # a string of the literal table CONVERTERS


def find_weights(path: Path) -> Path:
    """The file of weights at *path* (it, or the one in that folder): an index of shards before a single file.

    Raises:
        ZooError: nothing there, no weights, or several of which none stands out.
    """
    if path.is_file():
        if path.name == "config.json":
            return find_weights(path.parent)
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
    data = load_restricted(file)
    if isinstance(data, argparse.Namespace) or not isinstance(data, Mapping):
        raise ZooError(f"{file} holds a {type(data).__name__} where a state dict was expected")
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(data.get(key), Mapping):
            extra = {name: _plain(value) for name, value in data.items() if name != key}
            return _tensors(data[key], file), {name: value for name, value in extra.items() if _is_plain(value)}
    return _tensors(data, file), {}


def _plain(value: Any) -> Any:
    """A trainer's Namespace as the mapping it is, also within mappings."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return {name: _plain(item) for name, item in value.items()} if isinstance(value, Mapping) else value


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
    for name in listed.values():
        if not isinstance(name, str) or name != Path(name).name or "\\" in name:
            raise ZooError(f"{index} names the shard {name!r}, which is not the plain name of a file beside it")
    for name in sorted(set(listed.values())):
        shard = index.parent / name
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


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
