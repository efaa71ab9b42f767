"""Adapters: against `peft` number for number, merged and unmerged, in its files both ways, through every mixer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import catalogue
from zoo.config import from_dict, resolve
from zoo.errors import ConfigError, ZooError
from zoo.hub import artifact, peft
from zoo.nn.lora import LoRAConfig, LoRALinear, add_lora, find_targets, lora_layers, merge, remove_lora, unmerge
from zoo.train.finetune import FinetuneConfig, default_targets, head_modules, prepare, trainable

HEAD = {"kind": "sequence", "num_outputs": 3, "pooling": "mean"}
FAMILIES: dict[str, dict[str, Any]] = {
    "dnabert2": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 32, "dropout": 0.0},
    "generator": {"d_model": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 24, "vocab_size": 64},
    "metagene": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 32},
    "hyenadna": {"d_model": 16, "n_layer": 2, "max_len": 32, "embed_dropout": 0.0},
    "lm": {"d_model": 64, "mixer": "mamba2", "n_layer": 1},
}


def build(family: str, **changes: Any) -> Any:
    target = catalogue.MODELS[family]
    config = from_dict(resolve(catalogue.schema_target(target)), {**FAMILIES[family], "head": HEAD, **changes})
    return resolve(target)(config)


def inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(6, 12, (3, 10))
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 7:] = False
    return ids, valid


def disturb(model: Any) -> None:
    """Adapters as after training: B is not zero."""
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("rslora", [False, True])
def test_logits_and_gradients_are_those_of_peft(family: str, rslora: bool) -> None:
    oracle = pytest.importorskip("peft")
    base = build(family)
    ours = copy.deepcopy(base)
    names = prepare_lora(ours, family, LoRAConfig(rank=3, alpha=5.0, rslora=rslora))
    disturb(ours)
    options = {"r": 3, "lora_alpha": 5.0, "use_rslora": rslora, "target_modules": names, "modules_to_save": ["head"]}
    theirs = oracle.get_peft_model(copy.deepcopy(base), oracle.LoraConfig(**options))
    inner = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            inner[name].lora_A["default"].weight.copy_(layer.lora_A.weight)
            inner[name].lora_B["default"].weight.copy_(layer.lora_B.weight)
    ids, valid = inputs()
    logits, expected = ours(ids, valid), theirs(ids, valid)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            grad = getattr(layer, part).weight.grad
            assert float(grad.abs().max()) > 0, f"{name}.{part} is not trained"
            assert torch.equal(grad, getattr(inner[name], part)["default"].weight.grad), f"{name}.{part}"
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.split(".")[0] in ("head", "pooler") for name in trained)


def prepare_lora(model: Any, family: str, config: LoRAConfig) -> list[str]:
    prepare(model, FinetuneConfig(mode="lora", lora=config), family)
    return list(lora_layers(model))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_merging_keeps_the_answers_and_unmerging_the_weights(family: str) -> None:
    model = build(family).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_lora(model, family, LoRAConfig(rank=2))
    disturb(model)
    ids, valid = inputs()
    with torch.no_grad():
        apart = model(ids, valid)
        assert torch.equal(merge(model)(ids, valid), merge(model)(ids, valid))  # a second merge does nothing
        torch.testing.assert_close(model(ids, valid), apart, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(unmerge(model)(ids, valid), apart, rtol=1e-4, atol=1e-5)
        for name, layer in lora_layers(model).items():
            torch.testing.assert_close(layer.base_layer.weight, before[f"{name}.weight"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(layer.weight, layer.base_layer.weight + layer.delta())
        plain = remove_lora(model)
        torch.testing.assert_close(plain(ids, valid), apart, rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() == before.keys()
    assert not lora_layers(plain)


def test_every_linear_layer_of_the_backbone_can_be_adapted_even_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.nn import pieces

    model = build("hyenadna")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = add_lora(model, LoRAConfig(rank=2), ("in_proj", "out_proj", "fc1", "fc2"))
    disturb(model)
    ids, valid = inputs()
    grads: list[list[Tensor]] = []
    for whole in (pieces.WHOLE, 1):
        monkeypatch.setattr(pieces, "WHOLE", whole)
        monkeypatch.setattr(pieces, "PIECE", whole)
        model.zero_grad()
        model(ids, valid).square().sum().backward()
        grads.append([layer.lora_A.weight.grad for layer in lora_layers(model).values()])
    assert len(names) == 8
    for one, other in zip(*grads, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    for layer in lora_layers(model).values():
        object.__setattr__(layer, "config", LoRAConfig(rank=2, dropout=0.5))
    with pytest.raises(ZooError, match=r"finetune\.lora\.dropout=0"):
        model(ids, valid).square().sum().backward()


def test_targets_are_found_by_their_ends_or_refused_with_the_nearest() -> None:
    model = build("dnabert2")
    assert find_targets(model, ("qkv",)) == [f"backbone.layers.{i}.mixer.qkv" for i in (0, 1)]
    assert len(find_targets(model, ("all-linear",))) == 8
    with pytest.raises(ConfigError, match=r"called 'qvk' \(did you mean 'qkv'\?\)"):
        find_targets(model, ("qvk",))
    assert default_targets(model, "dnabert2") == ("qkv", "out_proj")
    assert default_targets(build("lm"), "dnabert2") == ("all-linear",)
    with pytest.raises(ConfigError, match="rank"):
        from_dict(LoRAConfig, {"rank": 0}, "finetune.lora")


def test_probe_trains_the_head_alone() -> None:
    model = build("dnabert2", dropout=0.5)
    kept = prepare(model, FinetuneConfig(mode="probe"), "dnabert2")
    model.train()
    for part in kept:
        part.eval()
    ids, valid = inputs()
    assert torch.equal(model(ids, valid), model(ids, valid))  # no dropout in the backbone
    model(ids, valid).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    assert trainable(model) == (51, sum(p.numel() for p in model.parameters()))
    tied = build("hyenadna", head={"kind": "lm"})
    with pytest.raises(ConfigError, match="tied"):
        prepare(tied, FinetuneConfig(mode="probe"), "hyenadna")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_our_file_loads_in_peft_and_peft_s_in_ours(family: str, tmp_path: Path) -> None:
    oracle = pytest.importorskip("peft")
    base = build(family).eval()
    artifact.save(base, tmp_path / "base")
    ours = copy.deepcopy(base)
    prepare_lora(ours, family, LoRAConfig(rank=2, alpha=3.0, dropout=0.1))
    disturb(ours)
    with torch.no_grad():
        ours.head.weight += 0.1
    ours.eval()
    ids, valid = inputs()
    expected = ours(ids, valid)
    peft.save(ours, tmp_path / "ours", base=str(tmp_path / "base"), saved=head_modules(ours))
    keys = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert keys["peft_type"] == "LORA"

    theirs = oracle.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    assert torch.equal(theirs(ids, valid), expected)
    apart = peft.load(tmp_path / "ours", merged=False)
    assert torch.equal(apart.model(ids, valid), expected)
    for found in (artifact.load(tmp_path / "ours"), artifact.load(tmp_path / "base", adapter=tmp_path / "ours")):
        torch.testing.assert_close(found.model(ids, valid), expected, rtol=1e-4, atol=1e-5)
        assert not lora_layers(found.model)

    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.01)
    theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    back = peft.load(tmp_path / "theirs", tmp_path / "base", merged=False)
    assert torch.equal(back.model(ids, valid), theirs(ids, valid))


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = build("dnabert2")
    ours = copy.deepcopy(base)
    prepare_lora(ours, "dnabert2", LoRAConfig(rank=2))
    place = peft.save(ours, tmp_path / "ours", base=None, saved=["head"])
    with pytest.raises(ZooError, match="names no base"):
        peft.load(place)
    artifact.save(build("hyenadna"), tmp_path / "other")
    with pytest.raises(ZooError, match="adapter for a DNABERT2, but its base is a HyenaDNA"):
        peft.load(place, tmp_path / "other")
    artifact.save(build("dnabert2", d_model=32), tmp_path / "wide")
    with pytest.raises(ZooError, match="d_model=16, but its base has 32"):
        peft.load(place, tmp_path / "wide")
    content = json.loads((place / "adapter_config.json").read_text())
    for change, message in (
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"target_modules": ["query"]}, "no linear layer"),
        ({"r": 4}, r"is \[2, 16\], the model makes it \[4, 16\]"),
        ({"target_modules": ["qkv"]}, "holds"),
    ):
        (place / "adapter_config.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(ZooError, match=message):
            peft.apply(copy.deepcopy(base), place)


def test_dropout_acts_in_training_alone() -> None:
    layer = LoRALinear(torch.nn.Linear(4, 4), LoRAConfig(rank=2, dropout=0.5))
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 4)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
