"""Everything the catalogue lists: it exists, it can be built, its numbers are true, its card is the generated one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from zoo import catalogue, datamodules, tokenizers
from zoo._resources import folder
from zoo.config import from_dict, resolve, to_dict
from zoo.errors import ConfigError
from zoo.hub.artifact import Artifact
from zoo.hub.card import entry_card
from zoo.hub.families import FAMILIES
from zoo.hub.parity import outputs
from zoo.train.compose import compose, recipe_names
from zoo.train.recipe import validate

ENTRIES = sorted(catalogue.ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_say_the_truth(name: str) -> None:
    entry = catalogue.ENTRIES[name]
    target = catalogue.lookup(catalogue.MODELS, entry.model, "model")
    config = from_dict(resolve(catalogue.schema_target(target)), entry.config, name)
    with torch.device("meta"):
        model = resolve(target)(config)
    assert sum(p.numel() for p in model.parameters()) == entry.params
    if getattr(model, "max_len", None):
        assert model.max_len == entry.context
    if entry.tokenizer:
        assert entry.tokenizer in tokenizers.names()
    assert entry.model in catalogue.CONVERTERS, "published weights can be converted"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub)


@pytest.mark.parametrize("family", sorted(set(catalogue.CONVERTERS) & set(catalogue.MODELS)))
def test_converters_of_models_go_both_ways(family: str) -> None:
    target = catalogue.CONVERTERS[family]
    module = __import__(target, fromlist=["to_zoo"])
    assert callable(module.to_zoo)
    assert callable(module.to_official)
    assert callable(module.config_from_official)


@pytest.mark.parametrize("target", [*catalogue.REPLAYS.values()])
def test_replays_exist(target: str) -> None:
    assert callable(resolve(target))


def test_look_up_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'hyenadan' \(did you mean 'hyenadna'\?\)"):
        catalogue.lookup(catalogue.MODELS, "hyenadan", "model")


def test_list_models_searches_names_families_hub_and_tasks() -> None:
    assert catalogue.list_models() == list(catalogue.ENTRIES)
    assert catalogue.list_models("TINY-1K-D256") == ["hyenadna-tiny-1k-d256"]
    assert "hyenadna-tiny-1k" in catalogue.list_models("causal_lm")
    assert catalogue.list_models("nothing of the kind") == []


@pytest.mark.parametrize("name", ENTRIES)
def test_cards_are_the_generated_ones(name: str) -> None:
    file = folder("model_cards") / f"{name}.md"
    assert file.is_file(), "run `python -m zoo.hub.card`"
    assert file.read_text(encoding="utf-8") == entry_card(name), "run `python -m zoo.hub.card`"


def test_no_card_without_an_entry() -> None:
    files = {path.stem for path in folder("model_cards").glob("*.md")} - {"README"}
    assert files == set(catalogue.ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_cards_are_whole(name: str) -> None:
    text = entry_card(name)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "seqzoo"
    assert header["license"]
    assert header["base_model"] == catalogue.ENTRIES[name].hub
    assert not re.search(r"(?i)more information|todo|tbd|n/a|\{\}", text)
    assert not re.search(r"\bNone\b", text)
    assert "\n\n\n" not in text


def stand_in(name: str) -> Artifact:
    """A tiny model in place of a published one: its family, its kind of latents and conditions, a tokenizer."""
    entry = catalogue.ENTRIES[name]
    target = catalogue.MODELS[entry.model]
    fields = dict(FAMILIES[entry.model].tiny)
    fields |= {key: value for key, value in entry.config.items() if key in ("bottleneck", "hybrid") or value is True}
    if entry.config.get("cond_tokens"):
        fields |= {"cond_vocab": 5, "cond_tokens": entry.config["cond_tokens"]}
    tokenizer = None
    if entry.tokenizer:  # byte pairs need files that are not shipped
        tokenizer = tokenizers.build({"name": "char"} if entry.tokenizer == "dna-char" else {"name": "kmer", "k": 2})
        fields["vocab_size"] = tokenizer.vocab_size
    model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), fields)).eval()
    return Artifact(model, tokenizer, Path(name), {})


@pytest.mark.parametrize("name", ENTRIES)
def test_every_block_of_every_card_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks that load published weights get a tiny model of the family in their place."""
    asked = []
    monkeypatch.setattr("zoo.hub.artifact.load", lambda ref: asked.append(ref) or stand_in(ref))
    text = (folder("model_cards") / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [language for language, _ in blocks] == ["python needs-hub", "python"]
    for _, code in blocks:
        exec(compile(code, name, "exec"), {})
    assert asked == [name]
    assert len(capsys.readouterr().out.splitlines()) >= 2, "each block shows what came out"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_valid(name: str) -> None:
    recipe = validate(compose(name))
    assert recipe.description, "one line for `zoo recipes ls`"
    assert recipe.name == name
    assert validate(to_dict(recipe)) == recipe
    text = (folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    assert f" {name}" in text.split("defaults:")[0], "the head of the file says how to run it"


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_build_their_model(name: str) -> None:
    recipe = validate(compose(name))
    if recipe.init:
        pytest.skip("starts from an artifact")
    section: dict[str, Any] = dict(recipe.model)
    target = catalogue.MODELS[section.pop("name")]
    with torch.device("meta"):
        model = resolve(target)(from_dict(resolve(catalogue.schema_target(target)), section, "model"))
    assert sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", datamodules.names())
def test_data_sets_state_source_and_licence(name: str) -> None:
    section = datamodules.section(name)
    assert section.get("id")
    for key in ("title", "source", "licence"):
        assert section.get(key), key


def test_outputs_of_a_model_in_training_mode_leave_it_so() -> None:
    target = catalogue.MODELS["hyenadna"]
    config = from_dict(resolve(catalogue.schema_target(target)), {"d_model": 8, "n_layer": 1, "max_len": 16}, "model")
    model = resolve(target)(config).train()
    before = torch.get_rng_state()
    produced = outputs(model, {"ids": torch.randint(0, 12, (1, 8), generator=torch.Generator().manual_seed(0))})
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert produced["logits"].shape == (1, 8, 16)


def test_every_parity_case_has_a_replay() -> None:
    import json

    cases = Path(__file__).parent.parent / "parity" / "cases"
    systems = {json.loads(path.read_text(encoding="utf-8"))["system"] for path in cases.rglob("case.json")}
    assert systems
    assert systems <= set(catalogue.REPLAYS)
