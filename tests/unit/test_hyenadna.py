"""HyenaDNA as a model: heads, pooling, padding, decoding, parameter groups, initialisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo.config import from_dict, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig, MixerAt
from zoo.nn.heads import HeadConfig, pool
from zoo.nn.hyena import Hyena, HyenaConfig
from zoo.nn.layout import Layout

TINY = {"d_model": 16, "n_layer": 2, "d_inner": 32, "max_len": 64, "hyena": {"filter_width": 8}, "embed_dropout": 0.0}


def tiny(**changes: object) -> HyenaDNA:
    return HyenaDNA(from_dict(HyenaDNAConfig, {**TINY, **changes})).eval()


def ids(length: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randint(7, 11, (batch, length))


def test_logits_have_the_padded_vocabulary_and_the_head_is_the_embedding() -> None:
    model = tiny()
    assert model(ids()).shape == (2, 30, 16)
    assert model.head.weight is None
    hidden, _ = model.forward_features(ids())
    torch.testing.assert_close(model.forward_head(hidden), hidden @ model.embed.weight.T)
    assert model.head_kind == "lm"


def test_decoding_by_state_equals_the_whole_sequence() -> None:
    model, x = tiny(), ids()
    with torch.no_grad():
        whole = model(x)
        hidden, state = model.forward_features(x[:, :17], state=model.init_state(2, 30))
        parts = [model.forward_head(hidden)]
        for t in range(17, 30):
            hidden, state = model.forward_features(x[:, t : t + 1], state=state)
            parts.append(model.forward_head(hidden))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logit(side: str) -> None:
    model, x, pads = tiny(), ids(), torch.full((2, 7), 4)
    padded = torch.cat([pads, x] if side == "left" else [x, pads], 1)
    valid = padded != 4
    with torch.no_grad():
        torch.testing.assert_close(model(padded, valid)[valid], model(x).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_pads_as_ordinary_tokens_is_an_option() -> None:
    model, x = tiny(mask_padding=False), ids()
    padded = torch.cat([torch.full((2, 7), 4), x], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, padded != 4), model(padded))


def test_longer_than_max_len_names_both_numbers() -> None:
    model = tiny()
    with pytest.raises(ZooError, match=r"65 tokens.*at most 64"):
        model(ids(65))
    with pytest.raises(ZooError, match=r"65.*64"):
        model.init_state(1, 65)


def test_reset_head_changes_the_config_so_that_it_rebuilds_the_model() -> None:
    model = tiny()
    model.reset_head(3, pooling="mean")
    assert model(ids()).shape == (2, 3)
    again = HyenaDNA(from_dict(HyenaDNAConfig, json.loads(json.dumps(to_dict(model.config)))))
    again.load_state_dict(model.state_dict())
    model.reset_head(5, kind="token", dropout=0.1)
    assert model.eval()(ids()).shape == (2, 30, 5)
    model.reset_head(0, kind="lm")
    assert model.head.weight is not None
    assert model(ids()).shape == (2, 30, 16)


def test_another_causal_mixer_by_one_override() -> None:
    model = tiny(mixer="s4d")
    assert model.max_len is None
    assert model(ids(100)).shape == (2, 100, 16)
    assert not any(isinstance(m, Hyena) for m in model.modules())


def test_a_hybrid_names_its_layers() -> None:
    model = tiny(n_layer=3, hybrid=[{"layers": [1], "mixer": "s4d"}])
    assert [isinstance(layer.mixer, Hyena) for layer in model.backbone.layers] == [True, False, True]
    with pytest.raises(ConfigError, match="layer 7"):
        tiny(hybrid=[{"layers": [7], "mixer": "s4d"}])
    with pytest.raises(ConfigError, match=r"unknown mixer 'hyenna'.*hyena"):
        HyenaDNA(HyenaDNAConfig(hybrid=(MixerAt(layers=(0,), mixer="hyenna"),)))


def test_unknown_options_get_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"hyena\.shft.*'shift'"):
        from_dict(HyenaDNAConfig, {"hyena": {"shft": 0.0}})


def test_max_len_is_one_number() -> None:
    assert HyenaDNAConfig(max_len=99).hyena.max_len == 99
    assert HyenaDNAConfig(max_len=99, hyena=HyenaConfig(max_len=7)).hyena.max_len == 99


def test_parameter_groups_cover_all_once_and_spare_the_filters() -> None:
    model = tiny(hyena={"filter_width": 8, "learn_positions": True, "positions_lr": 1e-5})
    groups = model.param_groups()
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    undecayed = {id(p) for group in groups if group.get("weight_decay") == 0.0 for p in group["params"]}
    for name, p in model.named_parameters():
        in_filter = ".filter." in name and not name.endswith("skip")
        assert (id(p) in undecayed) == in_filter, name
    assert [group.get("lr") for group in groups].count(1e-5) == 2


def test_initialisation_is_the_official_one() -> None:
    model = HyenaDNA(HyenaDNAConfig(d_model=128, n_layer=8))
    std = {name: float(p.std()) for name, p in model.named_parameters() if p.ndim == 2}
    for name, value in std.items():
        scaled = name.endswith(("out_proj.weight", "fc2.weight"))
        wanted = 0.02 / 4 if scaled else 0.02
        assert value == pytest.approx(wanted, rel=0.2), name
    skip = torch.cat([layer.mixer.filter.skip for layer in model.backbone.layers])
    assert float(skip.std()) == pytest.approx(1, rel=0.15)
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("in_proj.bias"))
    assert all((p == 10).all() for n, p in model.named_parameters() if n.endswith("freq"))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, x = tiny().train(), ids()
    grads = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        model.zero_grad()
        model(x).logsumexp(-1).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_autocast_stays_near() -> None:
    model, x = tiny(), ids()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(x)
    assert (mixed.float() - exact).abs().max() < 0.05 * exact.abs().max() + 0.02


def test_it_learns_a_repeat() -> None:
    model = tiny().train()
    optimiser = torch.optim.AdamW(model.param_groups(), lr=3e-3)
    pattern = torch.tensor([7, 8, 9, 10, 7, 7, 10]).repeat(5)
    for _ in range(80):
        x = pattern[torch.randint(0, 7, ()) :][:28][None]
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1])[0], x[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss) < 0.5


@pytest.mark.parametrize("mode", ["last", "first", "pool", "sum"])
def test_pooling_is_the_official_one(mode: str, shared: Path) -> None:
    data = json.loads((shared / "goldens/hyenadna/data/intervals_and_pooling.json").read_text())
    hidden = torch.tensor(data["pool_input"])
    for case in data["pool"]:
        if case["mode"] != mode:
            continue
        valid = torch.tensor(case["mask_values"], dtype=torch.bool) if case["mask"] else None
        ours = {"pool": "mean_prefix" if valid is not None else "mean_all", "sum": "sum_all"}.get(mode, mode)
        torch.testing.assert_close(pool(hidden, valid, ours), torch.tensor(case["out"]), rtol=1e-5, atol=1e-5)


def test_pooling_reads_valid_positions() -> None:
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    valid = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]).bool()
    assert pool(hidden, valid, "last").flatten().tolist() == [4, 11]
    assert pool(hidden, valid, "first").flatten().tolist() == [2, 6]
    assert pool(hidden, valid, "mean").flatten().tolist() == [3, 8.5]
    assert pool(hidden, valid, "mean_all").flatten().tolist() == [2.5, 8.5]
    assert pool(hidden, valid, "before_pad").flatten().tolist() == [5, 11]
    right = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    assert pool(hidden, right, "before_pad").flatten().tolist() == [2, 10]


def test_a_head_without_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="num_outputs"):
        HeadConfig(kind="sequence")


def test_packed_documents_do_not_see_each_other() -> None:
    model, x = tiny(), ids()
    segment = (torch.arange(30) >= 11).long().expand(2, 30)
    with torch.no_grad():
        packed, _ = model.forward_features(x, Layout("causal", segment=segment))
        parts = [model.forward_features(part)[0] for part in (x[:, :11], x[:, 11:])]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", ["two_sided", "ring"])
def test_a_model_that_looks_both_ways(sides: str) -> None:
    model = tiny(hyena={"filter_width": 8, "bidirectional": sides}).eval()
    assert model.layout_kind == "full"
    x = ids()
    before = model(x)
    x[:, -1] = (x[:, -1] + 1) % 12
    assert not torch.equal(model(x)[:, 0], before[:, 0])
    assert tiny().layout_kind == "causal"
