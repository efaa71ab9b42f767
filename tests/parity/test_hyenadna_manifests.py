"""Every released checkpoint's names and shapes load strictly into our model on the meta device, and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import catalogue
from zoo.config import from_dict
from zoo.convert import hyenadna as convert
from zoo.convert import load_strict
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

CASES = Path(__file__).parent / "cases"
MANIFESTS = sorted([*(CASES / "hyenadna/released").glob("*.json"), *(CASES / "hyena/released").glob("*.json")])


def meta_state(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for name, (shape, dtype) in manifest.items()
    }


def test_all_are_here() -> None:
    assert len(MANIFESTS) == 15


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_a_released_manifest_loads_strictly(path: Path) -> None:
    released = json.loads(path.read_text())
    state = meta_state(released["manifest"])
    config = convert.config_from_official(released["config"])
    assert convert.recognises(state)
    with torch.device("meta"):
        model = HyenaDNA(config)
    load_strict(model, convert.to_zoo(state, config), path.stem)
    if "n_params" in released:
        assert sum(p.numel() for p in model.parameters()) == released["n_params"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_the_way_back_gives_the_official_names_and_shapes(path: Path) -> None:
    released = json.loads(path.read_text())
    state = meta_state(released["manifest"])
    config = convert.config_from_official(released["config"])
    back = convert.to_official(convert.to_zoo(state, config), config, convert.names_of(state))
    assert list(back) == list(state) or set(back) == set(state)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == {
        name: shape for name, (shape, _) in released["manifest"].items()
    }


@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.stem.startswith("LongSafari")], ids=lambda p: p.stem)
def test_sizes_are_read_off_where_no_config_lies_beside(path: Path) -> None:
    released = json.loads(path.read_text())
    inferred = convert.config_from_state(meta_state(released["manifest"]))
    assert inferred == convert.config_from_official(released["config"])


@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.stem.startswith("LongSafari")], ids=lambda p: p.stem)
def test_configs_go_both_ways(path: Path) -> None:
    official = json.loads(path.read_text())["config"]
    config = convert.config_from_official(official)
    back = convert.config_to_official(config, hf="max_seq_len" in official)
    assert convert.config_from_official(back) == config
    for key, value in official.items():
        if key in ("layer", "fused_mlp", "fused_dropout_add_ln", "checkpoint_mixer", "checkpoint_mlp"):
            continue
        assert back[key] == value, key


@pytest.mark.parametrize("name", [name for name, entry in catalogue.ENTRIES.items() if entry.model == "hyenadna"])
def test_catalogue_entries_count_their_parameters(name: str) -> None:
    entry = catalogue.ENTRIES[name]
    config = from_dict(HyenaDNAConfig, entry.config)
    with torch.device("meta"):
        model = HyenaDNA(config)
    assert sum(p.numel() for p in model.parameters()) == entry.params
    assert model.max_len == entry.context
    assert config.vocab_size == entry.vocab
    manifest = CASES / "hyenadna/released" / (entry.hub.replace("/", "__") + ".json")
    official = convert.config_from_official(json.loads(manifest.read_text())["config"])
    assert official == config


def test_every_size_of_the_table_is_in_the_catalogue() -> None:
    hubs = {entry.hub.replace("/", "__") for entry in catalogue.ENTRIES.values() if entry.model == "hyenadna"}
    assert hubs == {path.stem for path in MANIFESTS if path.stem.startswith("Long") and not path.stem.endswith("-hf")}
