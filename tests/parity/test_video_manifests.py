"""Released checkpoints of the video families, by name and shape: they load strictly, on the meta device, both ways."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import catalogue
from zoo.config import from_dict, resolve, to_dict
from zoo.convert.nbp import FIRST_STAGE, tokenizer_state
from zoo.convert.official import detect_family

CASES = Path(__file__).parent / "cases"
FAMILIES = {
    "nbp": "nbp",
    "nbp_tokenizer": "nbp_tokenizer",
    "videogpt": "videogpt",
    "omnitokenizer": "omnitokenizer",
    "open_magvit2_video": "open_magvit2",
}
MANIFESTS = [(system, path) for system in FAMILIES for path in sorted((CASES / system / "released").glob("*.json"))]


def tensors(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in manifest.items()
    }


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


@pytest.mark.parametrize(("system", "path"), MANIFESTS, ids=[f"{s}/{p.stem}" for s, p in MANIFESTS])
def test_manifest_loads_strictly(system: str, path: Path) -> None:
    data = json.loads(path.read_text())
    family = FAMILIES[system]
    module = importlib.import_module(catalogue.CONVERTERS[family])
    official = tensors(data["manifest"])
    assert detect_family(official) == family
    config = module.config_from_official(data["config"])
    if hasattr(module, "config_from_state"):
        assert module.config_from_state(official) == config
    with torch.device("meta"):
        model = resolve(catalogue.MODELS[family])(config)
    model.load_state_dict(module.to_zoo(official, config), assign=True)
    back = shapes(module.to_official(model.state_dict(), config))
    frozen = {name: shape for name, shape in shapes(official).items() if name.startswith(FIRST_STAGE)}
    if hasattr(module, "training_state"):  # discriminators and the perceptual network stay behind
        frozen |= shapes(module.training_state(official))
    assert back | frozen == shapes(official)
    frozen = {name: shape for name, shape in frozen.items() if name.startswith(FIRST_STAGE)}
    if frozen:  # a transformer's file may hold the frozen tokenizer too
        inner = tokenizer_state(official)
        tokenizer = resolve(catalogue.CONVERTERS["nbp_tokenizer"] + ":config_from_state")(inner)
        with torch.device("meta"):
            first = resolve(catalogue.MODELS["nbp_tokenizer"])(tokenizer)
        first.load_state_dict(resolve(catalogue.CONVERTERS["nbp_tokenizer"] + ":to_zoo")(inner, tokenizer), assign=True)
    assert from_dict(type(config), to_dict(config)) == config


def test_every_family_has_manifests() -> None:
    assert {system for system, _ in MANIFESTS} == set(FAMILIES)


def test_catalogue_entries_are_the_released_configs() -> None:
    released = []
    for system, path in MANIFESTS:
        module = importlib.import_module(catalogue.CONVERTERS[FAMILIES[system]])
        released.append((FAMILIES[system], module.config_from_official(json.loads(path.read_text())["config"])))
    entries = {name: entry for name, entry in catalogue.ENTRIES.items() if entry.model in FAMILIES.values()}
    assert len(entries) == 9
    for name, entry in entries.items():
        config = from_dict(resolve(catalogue.schema_target(catalogue.MODELS[entry.model])), entry.config, name)
        assert (entry.model, config) in released, name
