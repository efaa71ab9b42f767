"""Official repositories by their names: whose weights a pulled folder holds, whether all fit, and loading them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import catalogue
from zoo._resources import folder
from zoo.config import from_dict, resolve, to_dict
from zoo.convert.official import convert_state, find_weights, open_official
from zoo.errors import ZooError
from zoo.hub.headers import read_header
from zoo.hub.names import PICKLES, check_name

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Recognised:
    """What a folder of official weights proved to be.

    Attributes:
        family: of the catalogue.
        config: ours, read from the official one or off the weights.
        tensors: official tensors, each of which has its place in the model.
        params: parameters of the model.
        entry: the catalogue's name for this repository; empty where it has none.
        difference: the first field in which the config differs from the catalogue's; empty where none does.
    """

    family: str
    config: Any
    tensors: int
    params: int
    entry: str = ""
    difference: str = ""


def entry_of(repo: str, file: str = "") -> str:
    """The catalogue's name for a repository (and a file of it); a `-hf` twin stands for the same model."""
    hubs = (repo, repo.removesuffix("-hf"))
    found = [name for name, entry in catalogue.ENTRIES.items() if entry.hub in hubs and file in ("", entry.file)]
    return found[0] if len(found) == 1 else ""


def recognise(place: Path, repo: str = "", file: str = "") -> Recognised:
    """Prove that the weights in *place* are a model of ours: every official name and shape has its place.

    Of safetensors only the headers are read, so that this takes a moment at any size. *repo* is where they came from,
    for the comparison with the catalogue; *file* names the weights where there are several.

    Raises:
        ZooError: no family has such weights, a name or shape does not fit, or the files are damaged.
    """
    weights = find_weights(place / file if file else place)
    entry = entry_of(repo, file)
    wanted = catalogue.ENTRIES[entry].model if entry else None
    if weights.name.endswith(PICKLES) or weights.name.endswith(".bin.index.json"):
        state, config, _ = open_official(weights)
    else:
        state, config = _headers(weights), _config(weights)
    family, ours, _ = convert_state(state, config, str(weights), wanted if wanted in catalogue.CONVERTERS else None)
    with torch.device("meta"):
        model: nn.Module = resolve(catalogue.MODELS[family])(ours)
    params = sum(value.numel() for value in model.parameters())
    twin = bool(entry) and catalogue.ENTRIES[entry].hub != repo
    return Recognised(family, ours, len(state), params, entry, _difference(entry, ours, twin))


def load(place: Path, repo: str = "", file: str = "") -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model (evaluation mode), tokenizer or None, and facts, of the official weights in *place*.

    Raises:
        ZooError: as `recognise`.
    """
    weights = find_weights(place / file if file else place)
    entry = entry_of(repo, file)
    state, config, _ = open_official(weights)
    family = catalogue.ENTRIES[entry].model if entry else None
    family, ours, converted = convert_state(
        state, config, str(weights), family if family in catalogue.CONVERTERS else None
    )
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = resolve(catalogue.MODELS[family])(ours)
    dtypes = {value.dtype for value in converted.values() if value.is_floating_point()}
    if len(dtypes) == 1:  # weights published in half precision stay so
        model = model.to(dtypes.pop())
    model.load_state_dict(converted)
    known = catalogue.ENTRIES.get(entry)
    name = known.tokenizer if known else usual_tokenizer(family)
    tokenizer = find_tokenizer(name, place) if name else None
    facts = {"model": family, "outputs": {}, "ref": repo or str(place), "catalogue": entry, "official": repo}
    return model.eval(), tokenizer, facts


def find_tokenizer(name: str, place: Path) -> Any:
    """The catalogue's tokenizer *name*; a byte-pair vocabulary is the one published with the weights.

    Returns None where that is not in *place*: such a model is used with token ids.
    """
    import yaml

    from zoo import tokenizers

    section = yaml.safe_load((folder("tokenizers") / name / "tokenizer.yaml").read_text(encoding="utf-8"))
    if section["name"] != "bpe":
        return tokenizers.from_catalogue(name)
    file = place / "tokenizer.json"
    return tokenizers.from_catalogue(name, file=str(file)) if file.is_file() else None


def usual_tokenizer(family: str) -> str:
    """The tokenizer of a family's published models; empty where they read no text or differ in it."""
    found = {entry.tokenizer for entry in catalogue.ENTRIES.values() if entry.model == family}
    return found.pop() if len(found) == 1 else ""


def _headers(weights: Path) -> dict[str, Tensor]:
    """Tensors without values in the names, shapes and dtypes of a safetensors file or of its shards."""
    files = [weights]
    if weights.name.endswith(".index.json"):
        from zoo.hub.files import read_json

        listed = read_json(weights).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ZooError(f"{weights} names no shards (weight_map)")
        files = [weights.parent / name for name in sorted({check_name(name, str(weights)) for name in listed.values()})]
    state: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise ZooError(f"the shard {file} named in {weights.name} is missing")
        for name, (dtype, shape) in read_header(file).items():
            state[name] = torch.empty(shape, dtype=DTYPES.get(dtype, torch.int64), device="meta")
    if weights.name.endswith(".index.json") and set(listed) - set(state):
        raise ZooError(f"the shards of {weights} lack '{min(set(listed) - set(state))}', which the index promises")
    return state


def _config(weights: Path) -> dict[str, Any] | None:
    from zoo.hub.files import read_json

    beside = weights.parent / "config.json"
    return read_json(beside) if beside.is_file() else None


def _difference(entry: str, ours: Any, twin: bool) -> str:
    """`d_model is 16, the catalogue has 256`, for the first field that differs; of a *twin*, sizes alone count."""
    if not entry:
        return ""
    known = catalogue.ENTRIES[entry]
    wanted = from_dict(resolve(catalogue.schema_target(catalogue.MODELS[known.model])), known.config, entry)
    theirs, listed = to_dict(ours), to_dict(wanted)
    for key, value in listed.items():
        if key == "official" or (twin and key not in known.config):  # `official`: fields that change nothing
            continue
        if theirs.get(key) != value:
            return f"{key} is {theirs.get(key)!r}, the catalogue has {value!r}"
    return ""
