"""Released checkpoints of the image families, by name and shape: they load strictly, on the meta device, both ways."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo import catalogue
from zoo.config import from_dict, resolve, to_dict
from zoo.convert.official import detect_family

CASES = Path(__file__).parent / "cases"
FAMILIES = {
    "maskgit-vqgan": "maskgit_vqgan",
    "flextok": "flextok",
    "flextok-vae": "flextok_vae",
    "rar": "rar",
    "seed": "seed",
    "tatitok": "titok",
    "titok": "titok",
    "titok-generator": "maskgit",
}
MANIFESTS = [(system, path) for system in FAMILIES for path in sorted((CASES / system / "released").glob("*.json"))]


@pytest.mark.parametrize(("system", "path"), MANIFESTS, ids=[f"{s}/{p.stem}" for s, p in MANIFESTS])
def test_manifest_loads_strictly(system: str, path: Path) -> None:
    data = json.loads(path.read_text())
    family = FAMILIES[system]
    convert = resolve(catalogue.CONVERTERS[family] + ":to_zoo"), resolve(catalogue.CONVERTERS[family] + ":to_official")
    config = resolve(catalogue.CONVERTERS[family] + ":config_from_official")(data["config"])
    model_class = resolve(catalogue.MODELS[family])
    official = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in data["manifest"].items()
    }
    with torch.device("meta"):
        model = model_class(config)
    module = importlib.import_module(catalogue.CONVERTERS[family])
    assert module.recognises(official)
    assert module.accepts_config(data["config"])
    assert detect_family(official) == family
    if hasattr(module, "config_from_state"):  # files that come without a config
        unknown = {"kl_weight"}
        guessed, told = to_dict(module.config_from_state(official)), to_dict(config)
        assert {k: v for k, v in guessed.items() if k not in unknown} == {
            k: v for k, v in told.items() if k not in unknown
        }
    model.load_state_dict(convert[0](official, config), assign=True)
    back = convert[1](model.state_dict(), config)
    assert {name: list(value.shape) for name, value in back.items()} == {
        n: list(s) for n, (s, _) in data["manifest"].items()
    }
    assert sum(value.numel() for value in back.values()) == data["total_elements"]
    assert from_dict(type(config), to_dict(config)) == config


def test_every_family_has_manifests() -> None:
    assert {system for system, _ in MANIFESTS} == set(FAMILIES)


def test_catalogue_entries_are_the_released_configs() -> None:
    """Each entry's config, and the number of its parameters, come from one of the manifests."""
    released = []
    for system, path in MANIFESTS:
        family = FAMILIES[system]
        module = importlib.import_module(catalogue.CONVERTERS[family])
        config = module.config_from_official(json.loads(path.read_text())["config"])
        if family == "flextok_vae":  # what the official config says beyond the model is no part of an entry
            config = replace(config, official={})
        released.append((family, config))
    entries = {name: entry for name, entry in catalogue.ENTRIES.items() if entry.model in set(FAMILIES.values())}
    assert len(entries) == len(released) + 1  # two FlexTok checkpoints have one shape
    for name, entry in entries.items():
        config = from_dict(resolve(catalogue.schema_target(catalogue.MODELS[entry.model])), entry.config, name)
        assert (entry.model, config) in released, name
