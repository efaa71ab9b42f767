"""Released checkpoints of H3, BASED and PoNet, by name and shape: they load strictly, on the meta device, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import catalogue
from zoo.config import from_dict, resolve, to_dict
from zoo.convert import load_strict
from zoo.convert.h3 import current_names
from zoo.convert.official import detect_family

CASES = Path(__file__).parent / "cases"
MANIFESTS = [(s, path) for s in ("h3", "based", "ponet") for path in sorted((CASES / s / "released").glob("*.json"))]


@pytest.mark.parametrize(("system", "path"), MANIFESTS, ids=[f"{s}/{p.stem}" for s, p in MANIFESTS])
def test_manifest_loads_strictly(system: str, path: Path) -> None:
    data = json.loads(path.read_text())
    official = {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in data["manifest"].items()
    }
    assert detect_family(official) == system
    get = lambda name: resolve(f"{catalogue.CONVERTERS[system]}:{name}")
    config = get("config_from_state")(official) if system == "ponet" else get("config_from_official")(data["config"])
    with torch.device("meta"):
        model = resolve(catalogue.MODELS[get("MODEL")])(config)
    load_strict(model, get("to_zoo")(official, config), system)
    back = get("to_official")(model.state_dict(), config)
    assert {name: list(value.shape) for name, value in back.items()} == {n: s for n, (s, _) in data["manifest"].items()}
    assert from_dict(type(config), to_dict(config)) == config


def test_older_h3_files_have_their_norms_after_the_sub_layers() -> None:
    names = ["s4seq.encoder.ln_0.weight"]
    names += [f"s4seq.encoder.layers.{i}.norm{j}.weight" for i in range(3) for j in (1, 2)]
    state = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    order = [f"backbone.layers.{i}.norm{j}.weight" for i in range(3) for j in (1, 2)] + ["backbone.ln_f.weight"]
    moved = current_names(state)
    assert [int(moved[name]) for name in order] == list(range(7))
    assert current_names(moved).keys() == moved.keys()
