"""PoNet against loops over tokens, and the token model it stands in."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.convert.ponet import config_from_official, to_official, to_zoo
from zoo.errors import ConfigError, ZooError
from zoo.models.lm import LM, LMConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import CAUSAL, FULL, Layout
from zoo.nn.ponet import PoNet, PoNetConfig, separator_blocks


def definition(layer: PoNet, x: Tensor, block: list[int], single: list[bool]) -> Tensor:
    """One sequence x [L, D], token by token."""
    heads, length = layer.config.num_heads, len(x)
    q, k, o, seg, loc = (
        proj(x) for proj in (layer.q_proj, layer.k_proj, layer.o_proj, layer.segment_proj, layer.local_proj)
    )
    width = x.shape[1] // heads
    g = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        weight = (k[:, part] @ q[:, part].mean(0) / math.sqrt(width)).softmax(0)
        g.append(weight @ k[:, part])
    whole = torch.cat(g)
    rows = []
    for t in range(length):
        if single[t]:
            rows.append(whole * o[t])
            continue
        half = layer.config.window // 2
        near = [s for s in range(max(0, t - half), min(length, t + half + 1)) if not single[s]]
        local = torch.stack([loc[s] for s in near]).amax(0)
        segment = torch.stack([seg[s] for s in range(length) if block[s] == block[t]]).amax(0)
        rows.append((whole + segment) * o[t] + local)
    return layer.out_proj(torch.stack(rows))


@pytest.mark.parametrize("length", [1, 4, 5, 23])
def test_equal_segments(length: int) -> None:
    layer = PoNet(8, PoNetConfig(num_heads=2, segments=4)).double()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    size = length // 4 + 1
    y, _ = layer(x, FULL)
    for row in range(2):
        expected = definition(layer, x[row], [t // size for t in range(length)], [False] * length)
        torch.testing.assert_close(y[row], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("isolate", [True, False])
def test_named_segments_with_padding(isolate: bool) -> None:
    layer = PoNet(8, PoNetConfig(num_heads=2, isolate=isolate)).double()
    ids = torch.tensor([[101, 5, 6, 102, 7, 102, 102, 9, 0, 0], [0, 0, 0, 4, 3, 101, 8, 8, 102, 6]])
    valid = ids != 0
    block = separator_blocks(ids, (101, 102))
    assert block[0, :8].tolist() == [0, 1, 1, 2, 3, 4, 6, 7]
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    y, _ = layer(x, Layout("full", block=block, valid=valid))
    assert not y[~valid].any()
    for row in range(2):
        kept = valid[row]
        single = (ids[row, kept] > 100).logical_and(torch.tensor(isolate)).tolist()
        expected = definition(layer, x[row, kept], block[row, kept].tolist(), single)
        torch.testing.assert_close(y[row, kept], expected, rtol=1e-9, atol=1e-11)


def test_it_cannot_decode_nor_be_causal() -> None:
    layer = PoNet(8, PoNetConfig(num_heads=2))
    with pytest.raises(ConfigError, match="decode"):
        layer.init_state(1, 4)
    with pytest.raises(ConfigError, match="causal"):
        LM(LMConfig(mixer="ponet", layout="causal"))
    with pytest.raises(ConfigError, match="odd window"):
        PoNet(8, PoNetConfig(num_heads=2, window=4))


OFFICIAL = {
    "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 120, "intermediate_size": 16,
    "max_position_embeddings": 12, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def test_conversion_is_a_bijection_with_and_without_prefix() -> None:
    config = config_from_official(OFFICIAL)
    state = LM(config).state_dict()
    official = to_official(state, config)
    for spelled in (official, {f"ponet.{key}": value for key, value in official.items()}):
        back = to_zoo(spelled, config)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ConfigError, match="LRA"):
        config_from_official({"transformer_dim": 8, "num_head": 2, "head_dim": 4, "tied_weights": True})


def test_pooler_reads_the_first_valid_token() -> None:
    config = config_from_official(OFFICIAL)
    model = LM(config).eval()
    model.reset_head(3, pooling="first")
    ids = torch.tensor([[101, 5, 6, 102, 0], [0, 101, 5, 6, 102]])
    logits = model(ids, ids != 0)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-5)
    hidden, _ = model.forward_features(ids[:1, :4])
    torch.testing.assert_close(logits[0], model.head(torch.tanh(model.pooler(hidden[:, 0]))[:, None])[0])
    with pytest.raises(ZooError, match="12"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_learned_positions_go_on_from_what_was_consumed() -> None:
    config = LMConfig(
        d_model=8, vocab_size=9, mixer="based", options={"num_heads": 2, "feature_dim": 3}, positions="learned",
        max_len=14, head=HeadConfig(tied=False),
    )  # fmt: skip
    model = LM(config).eval()
    ids, valid = torch.randint(0, 9, (2, 14)), torch.ones(2, 14, dtype=torch.bool)
    valid[1, :4] = False
    with torch.no_grad():
        whole, _ = model.forward_features(ids, Layout("causal", valid=valid))
        state = model.init_state(2)
        first, state = model.forward_features(ids[:, :9], Layout("causal", valid=valid[:, :9]), state)
        second, state = model.forward_features(ids[:, 9:12], CAUSAL, state)
        last, state = model.forward_features(ids[:, 12:], CAUSAL, state)
    assert state.consumed.tolist() == [14, 10]
    torch.testing.assert_close(torch.cat([first, second, last], 1)[valid], whole[valid], rtol=1e-4, atol=1e-5)
