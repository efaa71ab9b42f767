"""Caches that forget: identity while nothing is forgotten, bounds, steps equal to one pass, and set prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.draft import TokenTable
from zoo.generate.engine import GenerateConfig, generate
from zoo.generate.policies import H2O, H2OMasked, LMInfinite, StreamingLLM
from zoo.generate.target import ModelTarget
from zoo.models.decoder import Decoder, DecoderConfig
from zoo.models.lm import LM, LMConfig

VOCAB = 23
SMALL = {
    "streaming": StreamingLLM(2, 5),
    "lm_infinite": LMInfinite(2, 5),
    "h2o": H2O(3, 4),
    "h2o_masked": H2OMasked(3, 4),
}
LARGE = {
    "streaming": StreamingLLM(4, 60),
    "lm_infinite": LMInfinite(4, 60),
    "h2o": H2O(32, 32),
    "h2o_masked": H2OMasked(32, 32),
}


def model(**changes: Any) -> Decoder:
    torch.manual_seed(3)
    fields = {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_inner": 48, "vocab_size": VOCAB}
    return Decoder(DecoderConfig(**{**fields, "init_std": 0.3, **changes})).eval().double()


def alibi() -> LM:
    torch.manual_seed(3)
    options = {"heads": 4, "alibi": True}
    return LM(LMConfig(d_model=32, vocab_size=VOCAB, mixer="attention", options=options, init_std=0.3)).eval().double()


def ids(length: int = 30) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(net: Any, policy: Any, first: int, length: int = 30) -> Tensor:
    target = ModelTarget(net, 2, length, policy)
    parts = [target.append(ids(length)[:, :first])]
    parts += [target.append(ids(length)[:, i : i + 1]) for i in range(first, length)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("net", [model, alibi])
def test_a_rule_with_room_changes_nothing(name: str, net: Any) -> None:
    built = net()
    full = logits(built, None, 10)
    assert torch.allclose(logits(built, LARGE[name], 10), full, atol=1e-10)
    assert torch.allclose(logits(built, LARGE[name], 30), full, atol=1e-10)
    assert not torch.allclose(logits(built, SMALL[name], 10), full, atol=1e-3)


@pytest.mark.parametrize("name", ["streaming", "lm_infinite", "h2o"])
def test_caches_stay_within_their_bound(name: str) -> None:
    net, policy = model(), SMALL[name]
    with torch.inference_mode():
        target = ModelTarget(net, 2, 400, policy)
        target.append(ids(100))
        sizes = []
        for i in range(20):
            target.append(ids()[:, i : i + 1])
            sizes.append([layer.length for layer in target.state.layers])
            assert all(layer.k.shape[2] <= 2 * (policy.bound + 1) for layer in target.state.layers)
    assert all(size == policy.bound for line in sizes for size in line)
    out = generate(net, ids(100), config=GenerateConfig(max_new_tokens=150), policy=policy)
    full = generate(net, ids(100), config=GenerateConfig(max_new_tokens=150))
    assert out.stats.state_bytes < full.stats.state_bytes / 8


def test_lm_infinite_in_steps_is_its_mask_at_once() -> None:
    net = model()
    assert torch.allclose(logits(net, SMALL["lm_infinite"], 30), logits(net, SMALL["lm_infinite"], 12), atol=1e-10)


def test_h2o_keeps_what_was_looked_at() -> None:
    net, policy = model(n_layer=1), SMALL["h2o"]
    with torch.inference_mode():
        target = ModelTarget(net, 1, 30, policy)
        target.append(ids()[:1, :20])
        state = target.state.layers[0]
        assert state.position.shape[1] == 2  # each key head for itself
        kept = state.position[0, :, : state.length]
        assert (kept[:, 1:] > kept[:, :-1]).all()
        assert (kept[:, -4:] == torch.arange(16, 20)).all()
        scores = state.score[0, :, :3]
        everything = ModelTarget(net, 1, 30, H2O(20, 4))
        everything.append(ids()[:1, :20])
        whole = everything.state.layers[0].score[0, :, :16]
        assert torch.allclose(scores.sort(-1).values, whole.topk(3, -1).values.sort(-1).values)


def test_prompts_of_unlike_length_and_refusals() -> None:
    net, policy = model(), SMALL["streaming"]
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[0, :12] = False
    cfg = GenerateConfig(max_new_tokens=8)
    both = generate(net, ids(), valid, cfg, policy=policy)
    alone = generate(net, ids()[:1, 12:], config=cfg, policy=policy)
    assert torch.equal(both.ids[:1], alone.ids)
    with pytest.raises(ZooError, match="a draft and a cache policy"):
        generate(net, ids(), config=cfg, policy=policy, draft=TokenTable(VOCAB))
    torch.manual_seed(0)
    recurrent = LM(LMConfig(d_model=32, vocab_size=VOCAB, options={"d_state": 8, "head_dim": 8}))
    with pytest.raises(ZooError, match="attention layers"):
        generate(recurrent, ids(), config=cfg, policy=policy)


def test_the_order_of_a_set_changes_nothing() -> None:
    net = model()
    row = ids(20)[:1]
    prefix, a, b, c, suffix = row.split([4, 3, 6, 2, 5], dim=1)
    cfg = GenerateConfig(max_new_tokens=10)
    want = generate(net, torch.cat([prefix, a, b, c, suffix], 1), config=cfg, segments=[4, 3, 6, 2, 5])
    got = generate(net, torch.cat([prefix, c, a, b, suffix], 1), config=cfg, segments=[4, 2, 3, 6, 5])
    assert torch.equal(got.ids, want.ids)
    assert torch.allclose(got.logprobs, want.logprobs, atol=1e-6)
    plain = generate(net, torch.cat([prefix, a, suffix], 1), config=cfg)
    single = generate(net, torch.cat([prefix, a, suffix], 1), config=cfg, segments=[4, 3, 5])
    assert torch.equal(plain.ids, single.ids)
    with pytest.raises(ZooError, match="must sum"):
        generate(net, row, config=cfg, segments=[4, 3, 5])
