"""Official HyenaDNA files: every layout, both directions, and what happens to bad ones."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo.convert import hyenadna as convert
from zoo.convert.official import convert_file, detect_family, open_official
from zoo.errors import ConfigError, ZooError
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.hyena import HyenaConfig
from zoo.nn.layout import CAUSAL

SMALL = HyenaDNAConfig(d_model=16, n_layer=2, d_inner=32, max_len=40, hyena=HyenaConfig(filter_width=8))
OFFICIAL = convert.config_to_official(SMALL)


def official_state(config: HyenaDNAConfig = SMALL, **names: Any) -> dict[str, Tensor]:
    return convert.to_official(HyenaDNA(config).state_dict(), config, convert.Names(**names))


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"prefix": "model."},
    {"prefix": "model.", "mixer_layer": True, "mlp_layer": True},
    {"prefix": "model.", "mixer_layer": True},
    {"prefix": "hyena."},
    {"prefix": "hyena.", "aliases": False},
]


@pytest.mark.parametrize("names", SPELLINGS, ids=str)
def test_each_spelling_goes_both_ways(names: dict[str, Any]) -> None:
    state = official_state(**names)
    assert convert.names_of(state) == convert.Names(**names)
    ours = convert.to_zoo(state, SMALL)
    assert ours.keys() == HyenaDNA(SMALL).state_dict().keys()
    back = convert.to_official(ours, SMALL, convert.names_of(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


LABELS = {"kind": "sequence", "num_outputs": 3}
CLASSIFIERS = [
    ({"pooling": "before_pad", "bias": False}, {"prefix": "hyena.", "head": "score"}),
    ({"pooling": "mean_all"}, {"head": "head.output_transform"}),
    ({"pooling": "mean_all"}, {"prefix": "model.", "head": "decoder.0.output_transform"}),
]


@pytest.mark.parametrize(("options", "names"), CLASSIFIERS)
def test_classifiers_of_all_three_codes(options: dict[str, Any], names: dict[str, Any]) -> None:
    head = HeadConfig(**LABELS, **options)
    config = dataclasses.replace(SMALL, head=head, mask_padding=False)
    state = official_state(config, **names)
    assert f"{names['head']}.weight" in state
    assert convert.names_of(state) == convert.Names(**names)
    inferred = convert.config_from_state(state)
    assert inferred.head == head
    ours = convert.to_zoo(state, inferred)
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), convert.to_zoo(state, config).values(), strict=True))


def test_torchmetrics_entries_are_left_out() -> None:
    state = {**official_state(prefix="model."), "val_torchmetrics.ppl.count": torch.zeros(())}
    assert convert.to_zoo(state, SMALL).keys() == HyenaDNA(SMALL).state_dict().keys()


def test_a_missing_an_unknown_and_an_untied_weight_are_named() -> None:
    state = official_state()
    gone = dict(state)
    gone.pop("backbone.ln_f.bias")
    with pytest.raises(ZooError, match=r"backbone\.ln_f\.bias.*missing"):
        convert.to_zoo(gone, SMALL)
    with pytest.raises(ZooError, match=r"unknown weight 'backbone\.ln_f\.bia'.*ln_f\.bias"):
        convert.to_zoo({**state, "backbone.ln_f.bia": torch.zeros(1)}, SMALL)
    with pytest.raises(ZooError, match="tied"):
        convert.to_zoo({**state, "lm_head.weight": state["lm_head.weight"] + 1}, SMALL)
    wrong = {**state, "backbone.layers.0.mixer.filter_fn.pos_emb.t": torch.zeros(1, 40, 1)}
    with pytest.raises(ZooError, match=r"pos_emb\.t.*config implies"):
        convert.to_zoo(wrong, SMALL)


def test_options_that_change_the_operator_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads=4"):
        convert.config_from_official({**OFFICIAL, "layer": {**OFFICIAL["layer"], "num_heads": 4}})
    with pytest.raises(ConfigError, match="hyena_order"):
        convert.config_from_official({**convert.config_to_official(SMALL, hf=True), "hyena_order": 3})


def test_the_window_floor_follows_the_code_the_weights_came_with() -> None:
    layer = {key: value for key, value in OFFICIAL["layer"].items() if key != "shift"}
    assert convert.config_from_official({**OFFICIAL, "layer": layer}).hyena.shift == 0.05
    training = {**OFFICIAL, "layer": layer, "class": "ConvLMHeadModel"}
    assert convert.config_from_official(training).hyena.shift == 0.0
    assert convert.config_from_official({**training, "layer": {**layer, "shift": 0.03}}).hyena.shift == 0.03


def write_hf(folder: Path) -> Path:
    folder.mkdir()
    untied = dataclasses.replace(SMALL, head=HeadConfig(tied=False))
    (folder / "config.json").write_text(json.dumps(convert.config_to_official(untied, hf=True)))
    save_file(official_state(untied, prefix="hyena.", aliases=False), folder / "model.safetensors")
    return folder


def test_a_hub_folder_is_converted(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hub")
    for path in (folder, folder / "model.safetensors", folder / "config.json"):
        family, config, weights = convert_file(path)
        assert family == "hyenadna"
        assert config.hyena.phase == "split"
        HyenaDNA(config).load_state_dict(weights)


def test_shards_with_an_index_are_joined(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hub")
    state, _, _ = open_official(folder)
    (folder / "model.safetensors").unlink()
    half = len(state) // 2
    for i, names in enumerate((list(state)[:half], list(state)[half:])):
        save_file({name: state[name] for name in names}, folder / f"model-{i}.safetensors")
    index = {name: f"model-{int(i >= half)}.safetensors" for i, name in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert convert_file(folder)[0] == "hyenadna"
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ZooError, match=r"model-1\.safetensors.*missing"):
        convert_file(folder)


def test_a_lightning_checkpoint_of_plain_values_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    state = official_state(prefix="model.", mixer_layer=True)
    torch.save({"state_dict": state, "epoch": 3, "hyper_parameters": {"train": {"seed": 1}}}, file)
    family, config, weights = convert_file(file)
    assert (family, config) == ("hyenadna", SMALL)
    assert torch.equal(weights["embed.weight"], state["model.lm_head.weight"])
    assert open_official(file)[2]["epoch"] == 3
    (tmp_path / "mine.json").write_text(json.dumps({**OFFICIAL, "layer": {**OFFICIAL["layer"], "shift": 0.0}}))
    assert convert_file(file, tmp_path / "mine.json")[1].hyena.shift == 0.0


def test_a_pickle_that_needs_more_than_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.ckpt"
    torch.save({"state_dict": official_state(), "when": datetime.timedelta(1)}, file)
    with pytest.raises(ZooError, match=r"Python objects.*not opened.*safetensors"):
        open_official(file)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.ckpt"])
@pytest.mark.parametrize("damage", ["half", "empty", "noise"])
def test_a_damaged_file_is_said_to_be_one(tmp_path: Path, name: str, damage: str) -> None:
    file = tmp_path / name
    if name.endswith("safetensors"):
        save_file({"a": torch.ones(999)}, file)
    else:
        torch.save({"a": torch.ones(9999)}, file)
    data = file.read_bytes()
    file.write_bytes({"half": data[: len(data) // 2], "empty": b"", "noise": b"hello, world" * 99}[damage])
    with pytest.raises(ZooError, match=r"damaged|empty") as caught:
        open_official(file)
    assert "\n" not in str(caught.value)


def test_absent_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no such file"):
        open_official(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="holds no weights"):
        open_official(tmp_path)
    save_file({"transformer.h.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ZooError, match=r"no family.*hyenadna"):
        convert_file(tmp_path)
    with pytest.raises(ZooError, match="no family"):
        detect_family({})


def test_weights_of_another_size_than_the_config_are_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_inner": 48}))
    with pytest.raises(ZooError, match=r"mlp\.fc1\.weight.*\[32, 16\].*\[48, 16\]"):
        convert_file(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ZooError, match="no JSON"):
        convert_file(folder)


def test_hybrids_with_attention_go_both_ways_and_mix_as_flash_attn_does() -> None:
    layer = {"_name_": "hyena", "l_max": 40, "emb_dim": 5, "filter_order": 8, "order": 3, "lr_pos_emb": 1e-3, "w": 10}
    official = {
        "class": "ConvLMHeadModel", "d_model": 16, "n_layer": 3, "d_inner": 32, "vocab_size": 37, "layer": layer,
        "attn_layer_idx": [1], "attn_cfg": {"num_heads": 4},
    }  # fmt: skip
    config = convert.config_from_official(official)
    assert config.hyena.interleaved
    assert config.hyena.shift == 0.0
    model = HyenaDNA(config).eval()
    state = convert.to_official(model.state_dict(), config)
    mixer = "backbone.layers.1.mixer."
    assert [list(state[mixer + name].shape) for name in ("Wqkv.weight", "Wqkv.bias", "out_proj.bias")] == [
        [48, 16], [48], [16],
    ]  # fmt: skip
    assert "backbone.layers.0.mixer.filter_fn.implicit_filter.6.weight" in state
    again = convert.to_zoo(state, config)
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    x = torch.randn(2, 9, 16)
    q, k, v = (x @ state[mixer + "Wqkv.weight"].T + state[mixer + "Wqkv.bias"]).unflatten(-1, (3, 4, 4)).unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
    weights = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    y = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
    y = y @ state[mixer + "out_proj.weight"].T + state[mixer + "out_proj.bias"]
    torch.testing.assert_close(model.backbone.layers[1].mixer(x, CAUSAL)[0], y, rtol=1e-4, atol=1e-5)


def test_unknown_attention_options_are_refused() -> None:
    official = {**OFFICIAL, "attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "dwconv": True}}
    with pytest.raises(ConfigError, match="dwconv"):
        convert.config_from_official(official)


def test_attention_options_that_change_nothing_are_taken_and_others_refused() -> None:
    official = {**OFFICIAL, "attn_layer_idx": [1]}
    usual = {"num_heads": 2, "causal": True, "dwconv": False}
    assert convert.config_from_official({**official, "attn_cfg": usual}).hybrid[0].options["heads"] == 2
    for wrong in ({"causal": False}, {"dwconv": True}):
        with pytest.raises(ConfigError, match="is not supported"):
            convert.config_from_official({**official, "attn_cfg": {**usual, **wrong}})
