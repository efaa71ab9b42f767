"""The released checkpoints of DNABERT-2, GENERator and METAGENE-1 load strictly on the meta device, and come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import catalogue
from zoo.config import from_dict, resolve
from zoo.convert import dnabert2, generator, llama, load_strict, metagene
from zoo.convert.official import convert_file, detect_family
from zoo.errors import ZooError

CASES = Path(__file__).parent / "cases"
FAMILIES = {"dnabert2": dnabert2, "generator": generator, "metagene": metagene}
MANIFESTS = [(family, path) for family in FAMILIES for path in sorted((CASES / family / "released").glob("*.json"))]
every = pytest.mark.parametrize(("family", "path"), MANIFESTS, ids=[path.stem for _, path in MANIFESTS])


def meta_state(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, (shape, _) in manifest.items()}


def build(family: str, config: Any) -> torch.nn.Module:
    with torch.device("meta"):
        return resolve(catalogue.MODELS[family])(config)


def test_all_are_here() -> None:
    assert len(MANIFESTS) == 8


@every
def test_a_released_manifest_loads_strictly_and_comes_back(family: str, path: Path) -> None:
    released, convert = json.loads(path.read_text()), FAMILIES[family]
    state = meta_state(released["manifest"])
    assert detect_family(state, released["config"]) == family
    config = convert.config_from_official(released["config"])
    model = build(family, config)
    load_strict(model, convert.to_zoo(state, config), path.stem)
    assert sum(p.numel() for p in model.parameters()) == released["n_params"]
    back = convert.to_official(model.state_dict(), config)
    assert {name: list(tensor.shape) for name, tensor in back.items()} == {
        name: shape for name, (shape, _) in released["manifest"].items()
    }


@every
def test_a_missing_or_a_further_weight_is_an_error(family: str, path: Path) -> None:
    released, convert = json.loads(path.read_text()), FAMILIES[family]
    state, config = meta_state(released["manifest"]), convert.config_from_official(released["config"])
    name = list(state)[5]
    with pytest.raises(ZooError, match=name):
        convert.to_zoo({key: value for key, value in state.items() if key != name}, config)
    with pytest.raises(ZooError, match="extra"):
        convert.to_zoo({**state, "extra.weight": state[name]}, config)
    ours = convert.to_zoo(state, config)
    with pytest.raises(ZooError, match="extra"):
        convert.to_official({**ours, "extra.weight": state[name]}, config)


@every
def test_configs_go_both_ways(family: str, path: Path) -> None:
    official, convert = json.loads(path.read_text())["config"], FAMILIES[family]
    config = convert.config_from_official(official)
    back = convert.config_to_official(config)
    assert convert.config_from_official(back) == config
    bookkeeping = {"_name_or_path", "architectures", "auto_map", "gradient_checkpointing", "torch_dtype", "use_cache"}
    bookkeeping |= {"transformers_version", "attention_dropout", "pretraining_tp"}
    for key in set(official) - bookkeeping:
        assert back[key] == official[key], key


@pytest.mark.parametrize("name", [name for name, entry in catalogue.ENTRIES.items() if entry.model in FAMILIES])
def test_catalogue_entries_are_the_released_models(name: str) -> None:
    entry = catalogue.ENTRIES[name]
    model_class = resolve(catalogue.MODELS[entry.model])
    config = from_dict(model_class.Config, entry.config)
    model = build(entry.model, config)
    assert sum(p.numel() for p in model.parameters()) == entry.params
    assert config.vocab_size == entry.vocab
    assert model.max_len in (entry.context, None)
    path = CASES / entry.model / "released" / (entry.hub.replace("/", "__") + ".json")
    assert FAMILIES[entry.model].config_from_official(json.loads(path.read_text())["config"]) == config


def test_every_manifest_is_in_the_catalogue() -> None:
    hubs = {entry.hub.replace("/", "__") for entry in catalogue.ENTRIES.values() if entry.model in FAMILIES}
    assert hubs == {path.stem for _, path in MANIFESTS}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_litgpt_rows_are_interleaved_by_query_group(groups: int) -> None:
    official = {
        "n_layer": 1, "n_head": 4, "n_embd": 8, "n_query_groups": groups, "intermediate_size": 6,
        "padded_vocab_size": 16, "block_size": 32, "rotary_percentage": 1.0,
    }  # fmt: skip
    config = metagene.config_from_official(official)
    per, width = 4 // groups, 2
    rows = torch.arange((4 + 2 * groups) * width, dtype=torch.float32)
    state = {
        "transformer.wte.weight": torch.randn(16, 8),
        "transformer.h.0.attn.attn.weight": rows[:, None].expand(-1, 8).contiguous(),
        "transformer.h.0.attn.proj.weight": torch.randn(8, 8),
        "transformer.h.0.mlp.fc_1.weight": torch.randn(6, 8),
        "transformer.h.0.mlp.fc_2.weight": torch.randn(6, 8),
        "transformer.h.0.mlp.proj.weight": torch.randn(8, 6),
        "transformer.h.0.norm_1.weight": torch.randn(8),
        "transformer.h.0.norm_2.weight": torch.randn(8),
        "transformer.ln_f.weight": torch.randn(8),
        "lm_head.weight": torch.randn(16, 8),
    }
    ours = metagene.to_zoo(state, config)
    grouped = rows.view(groups, per + 2, width)
    want = torch.cat([grouped[:, :per].flatten(), grouped[:, per].flatten(), grouped[:, per + 1].flatten()])
    assert torch.equal(ours["backbone.layers.0.mixer.qkv.weight"][:, 0], want)
    back = metagene.to_official(ours, config, "litgpt")
    assert set(back) == set(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    hf = metagene.to_official(ours, config)
    again = metagene.to_zoo(hf, config)
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def test_sharded_files_are_read_as_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    case = CASES / "generator/dev-lm"
    manifest = json.loads((case / "manifest.json").read_text())
    state = {name: torch.randn(shape) for name, (shape, _) in manifest.items()}
    names = list(state)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(json.loads((case / "case.json").read_text())["config"]))
    family, config, weights = convert_file(tmp_path)
    assert family == "generator"
    back = generator.to_official(weights, config)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_yarn_and_windows_of_official_configs() -> None:
    official = json.loads((CASES / "generator/released/GenerTeam__GENERator-eukaryote-1.2b-base.json").read_text())
    longer = official["config"] | {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384},
        "max_position_embeddings": 65536,
        "sliding_window": 16384,
    }
    config = generator.config_from_official(longer)
    assert config.rope is not None
    assert (config.rope.scaling, config.rope.factor, config.rope.original_len) == ("yarn", 4.0, 16384)
    assert (config.max_len, config.window) == (65536, 16383)
    assert generator.config_from_official(generator.config_to_official(config)) == config
    with pytest.raises(ZooError, match="llama3"):
        generator.config_from_official(official["config"] | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(ZooError, match="parallel"):
        llama.config_fields({"n_embd": 8, "parallel_residual": True})
