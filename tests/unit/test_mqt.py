"""The elastic vision-language model: prefixes, splicing, training laws, decoding, and the released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.config import from_dict, to_dict
from zoo.convert import mqt as convert
from zoo.convert.official import detect_family
from zoo.errors import ConfigError, ZooError
from zoo.models.mqt import MQT, MQTConfig
from zoo.nn.query_transformer import QueryTransformer, QueryTransformerConfig

RELEASED = Path(__file__).parent.parent / "parity" / "cases" / "mqt" / "released"
TINY: dict[str, Any] = {
    "tower": {
        "vit": {"width": 16, "layers": 2, "heads": 2, "mlp": {"kind": "quick_gelu", "width": 32}},
        "size": 28,
        "patch": 7,
    },
    "queries": {"grid": 3, "width": 16, "out_width": 24, "heads": 2, "source": [4, 4]},
    "lm": {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 20, "max_len": 64},
}


@pytest.fixture
def model() -> MQT:
    torch.manual_seed(0)
    return MQT(from_dict(MQTConfig, TINY)).eval()


def queries(**changes: Any) -> QueryTransformer:
    torch.manual_seed(1)
    config = {"grid": 3, "width": 16, "out_width": 8, "heads": 2, "source": [4, 5], **changes}
    return QueryTransformer(from_dict(QueryTransformerConfig, config)).eval()


@pytest.mark.parametrize("keys", ["position", "position+content"])
def test_fewer_tokens_are_a_prefix_of_more(keys: str) -> None:
    resampler, features = queries(keys=keys), torch.randn(2, 20, 16)
    whole = resampler(features)
    assert whole.shape == (2, 9, 8)
    for m in (1, 4, 8):
        torch.testing.assert_close(resampler(features, m), whole[:, :m])


def test_only_content_keys_look_at_the_picture() -> None:
    features = torch.randn(2, 20, 16)
    for keys, same in (("position", True), ("position+content", False)):
        resampler = queries(keys=keys)
        weights = resampler.attention(3, resampler.keys(features))
        assert (len(weights) == 1) == same
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


def test_draws_follow_the_law() -> None:
    even = queries()
    assert {even.draw() for _ in range(200)} == {2, 4, 6, 8}
    uniform, pairs, whole = queries(law="uniform"), queries(law="pow2"), queries(law="all")
    assert {uniform.draw() for _ in range(300)} == set(range(1, 10))
    assert {pairs.draw() for _ in range(200)} == {1, 2, 4, 8, 9}
    assert whole.draw() == 9


def test_impossible_numbers_of_tokens_are_refused(model: MQT) -> None:
    with pytest.raises(ZooError, match="makes 1 to 9 visual tokens, asked for 10"):
        model.visual_tokens(torch.rand(1, 3, 28, 28), 10)
    with pytest.raises(ZooError, match=r"takes pixels \[B, 3, 28, 28\]"):
        model.visual_tokens(torch.rand(1, 3, 32, 32))


def test_pictures_and_placeholders_are_counted(model: MQT) -> None:
    with pytest.raises(ZooError, match="2 image placeholders but 1 pictures"):
        model(torch.tensor([[1, -200, -200]]), torch.rand(1, 3, 28, 28))


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises((ConfigError, ValueError), match="out_width 24"):
        from_dict(MQTConfig, {**TINY, "queries": {**TINY["queries"], "out_width": 12}})


def test_rows_of_a_batch_do_not_touch_each_other(model: MQT) -> None:
    ids = torch.tensor([[1, -200, 4, 5, -200, 6], [1, -200, 7, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    pixels = torch.rand(3, 3, 28, 28)
    both = model(ids, pixels, valid, m=2)
    assert both.shape == (2, 8, 20)
    torch.testing.assert_close(both[:1], model(ids[:1], pixels[:2], m=2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1:, :4], model(ids[1:, :3], pixels[2:], m=2), atol=1e-5, rtol=1e-4)


def test_a_step_trains_projector_and_decoder_but_not_the_tower(model: MQT) -> None:
    model.train()
    ids = torch.tensor([[1, -200, 4, 5]])
    loss = model.loss(ids, torch.rand(1, 3, 28, 28), torch.tensor([[-100, -100, 4, 5]]))
    loss.backward()
    assert all(p.grad is None for p in model.tower.parameters())
    assert isinstance(model.projector, QueryTransformer)
    assert model.projector.query.grad is not None
    assert model.projector.pos_embed.grad is None
    assert float(model.lm.embed.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("mixer", ["attention", "mamba2"])
def test_cached_answers_equal_recomputed_ones(mixer: str) -> None:
    torch.manual_seed(2)
    options = {"mixer": mixer} | ({"mixer_options": {"d_state": 8, "head_dim": 8}} if mixer == "mamba2" else {})
    model = MQT(from_dict(MQTConfig, {**TINY, "lm": {**TINY["lm"], "init_std": 0.3, **options}})).eval()
    ids, pixels = torch.tensor([1, -200, 4]), torch.rand(1, 3, 28, 28)
    answer = model.answer(ids, pixels, m=3, new=5)
    for i in range(5):
        logits = model(torch.cat([ids, answer[:i]])[None], pixels, m=3)
        assert int(logits[0, -1].argmax()) == int(answer[i])


def test_llava_layout_goes_both_ways() -> None:
    config = from_dict(MQTConfig, {**TINY, "projector": "mlp"})
    state = MQT(config).state_dict()
    official = convert.to_official(state, config)
    assert "model.mm_projector.2.weight" in official
    back = convert.to_zoo(official, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def meta(manifest: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in manifest.items()
    }


def shapes(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def released(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    data = json.loads((RELEASED / f"{name}.json").read_text())
    return data["config"], meta(data["manifest"])


def test_the_released_7b_loads_strictly() -> None:
    official_config, official = released("gordonhu__MQT-LLaVA-7b")
    assert detect_family(official) == "mqt"
    config = convert.config_from_official(official_config)
    assert config == MQTConfig()
    assert from_dict(MQTConfig, to_dict(config)) == config
    with torch.device("meta"):
        model = MQT(config)
    model.load_state_dict(convert.to_zoo(official, config), assign=True)
    assert shapes(convert.to_official(model.state_dict(), config)) == shapes(official)


@pytest.mark.parametrize(("m", "tera"), [(8, 1.24), (16, 1.34), (36, 1.57), (64, 2.0), (144, 2.8), (256, 4.5)])
def test_flops_of_the_released_7b_are_those_of_the_papers_figure(m: int, tera: float) -> None:
    from zoo.train.budget import decoder_flops

    with torch.device("meta"):
        model = MQT(MQTConfig())
    # read off the figure, whose questions have about 86 tokens of text
    assert decoder_flops(model, m, 86) / 1e12 == pytest.approx(tera, rel=0.1)


def test_the_released_projectors_load_strictly() -> None:
    official_config, official = released("gordonhu__MQT-LLaVA-7b__query_abstractor")
    with torch.device("meta"):
        resampler = QueryTransformer(convert.queries_from_official(official_config))
        mlp = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096))
    # the file's embed_dim is the decoder's width
    resampler.load_state_dict(convert.abstractor_to_zoo(official), assign=True)
    assert shapes(convert.abstractor_to_official(resampler.state_dict())) == shapes(official)
    _, official = released("liuhaotian__llava-v1.5-7b__mm_projector")
    mlp.load_state_dict(convert.projector_to_zoo(official), assign=True)
    assert shapes(convert.projector_to_official(mlp.state_dict())) == shapes(official)
