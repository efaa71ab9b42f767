"""Attention beyond the laws all mixers share: rows of different length, drafts, rings, odd head shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.config import from_dict
from zoo.errors import ConfigError, ZooError
from zoo.nn.attention import Attention, AttentionConfig
from zoo.nn.backbone import Backbone, BackboneConfig, LayerSpec
from zoo.nn.kv import KVState, RingState
from zoo.nn.layout import Layout
from zoo.nn.softplus_attention import SoftplusAttention, SoftplusAttentionConfig

B, L, D = 3, 20, 16
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {"heads": 4, "kv_heads": 2, "rope": {}},
    "alibi": {"heads": 4, "alibi": True, "bias": True, "out_bias": True},
    "ring": {"heads": 4, "kv_heads": 1, "rope": {}, "window": 6},
    "ring-alibi": {"heads": 4, "alibi": True, "window": 6},
    "ring-sinks": {"heads": 4, "rope": {}, "window": 4, "sinks": 3},
    "diffqkv": {"heads": 4, "kv_heads": 1, "v_heads": 2, "head_dim": 6, "k_dim": 4, "v_dim": 8, "rope": {}},
    "diffqkv-ring": {"heads": 4, "kv_heads": 2, "v_heads": 1, "k_dim": 2, "window": 5, "qk_norm": True, "rope": {}},
}
every = pytest.mark.parametrize("name", VARIANTS)


def build(name: str) -> Attention:
    return Attention(D, from_dict(AttentionConfig, VARIANTS[name])).double().eval()


def x(length: int = L, batch: int = B) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompts_of_different_length_decode_as_if_alone(name: str, side: str) -> None:
    mixer, lengths, more = build(name), [9, 3, 12], 8
    rows = [x(n, 1) for n in lengths]
    later = x(more)
    width = max(lengths)
    prompt, valid = 9 * x(width), torch.zeros(B, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - lengths[i], width) if side == "left" else slice(0, lengths[i])
        prompt[i, at], valid[i, at] = row[0], True
    y, state = mixer(prompt, Layout("causal", valid=valid), mixer.init_state(B, width + more, dtype=torch.float64))
    assert not y[~valid].any()
    steps = []
    for t in range(0, more, 2):  # one token, then a chunk of one with a second in padding
        one, state = mixer(later[:, t : t + 1], Layout("causal"), state)
        two, state = mixer(
            torch.cat([9 * x(1), later[:, t + 1 : t + 2]], 1),
            Layout("causal", valid=torch.tensor([[False, True]] * B)),
            state,
        )
        steps += [one, two[:, 1:]]
    decoded = torch.cat(steps, 1)
    for i, row in enumerate(rows):
        alone, _ = mixer(torch.cat([row, later[i : i + 1]], 1), Layout("causal"))
        close(y[i][valid[i]], alone[0, : lengths[i]])
        close(decoded[i], alone[0, lengths[i] :])


@every
@torch.no_grad()
def test_a_draft_tree_equals_its_paths_and_commit_keeps_one(name: str) -> None:
    mixer, past = build(name), 7
    parent = torch.tensor([-1, 0, 0, 1, -1, 4])  # paths 0 1 3 | 0 2 | 4 5
    paths = [[0, 1, 3], [0, 2], [4, 5]]
    before, draft, after = x(past), x(len(parent)), x(4)
    for ragged in (False, True):
        for keep in paths:
            layout = Layout("causal", valid=torch.ones(B, past, dtype=torch.bool)) if ragged else Layout("causal")
            _, state = mixer(before, layout, mixer.init_state(B, 40, dtype=torch.float64))
            tree, state = mixer(draft, Layout("causal", parent=parent), state)
            for path in paths:
                line, _ = mixer(torch.cat([before, draft[:, path]], 1), Layout("causal"))
                close(tree[:, path], line[:, past:])
            state = state.commit(torch.tensor([keep] * B))
            follow, state = mixer(after, Layout("causal"), state)
            line, _ = mixer(torch.cat([before, draft[:, keep], after], 1), Layout("causal"))
            close(follow, line[:, past + len(keep) :])


@every
@torch.no_grad()
def test_one_layout_may_serve_many_calls(name: str) -> None:
    mixer, tokens = build(name), x(20)
    tree, draft = Layout("causal", parent=torch.tensor([-1, 0, 0])), x(3)
    padded = Layout("causal", valid=torch.ones(B, 4, dtype=torch.bool))
    for length in (6, 9, 9, 2):  # what the layout keeps for the other layers must not outlive the lengths
        _, state = mixer(tokens[:, :length], Layout("causal"), mixer.init_state(B, 40, dtype=torch.float64))
        both, state = mixer(draft, tree, state)
        for path in ([0, 1], [0, 2]):
            line, _ = mixer(torch.cat([tokens[:, :length], draft[:, path]], 1), Layout("causal"))
            close(both[:, path], line[:, length:])
        _, state = mixer(tokens[:, :length], Layout("causal"), mixer.init_state(B, 40, dtype=torch.float64))
        more, state = mixer(tokens[:, length : length + 4], padded, state)
        last, _ = mixer(tokens[:, length + 4 : length + 5], Layout("causal"), state)
        line, _ = mixer(tokens[:, : length + 5], Layout("causal"))
        close(torch.cat([more, last], 1), line[:, length:])


@every
@torch.no_grad()
def test_rows_may_accept_different_numbers_of_drafts(name: str) -> None:
    mixer = build(name)
    before, draft, after = x(8), x(3), x(5)
    _, state = mixer(before, Layout("causal"), mixer.init_state(B, 40, dtype=torch.float64))
    _, state = mixer(draft, Layout("causal", parent=torch.tensor([-1, 0, 1])), state)
    state = state.commit(torch.tensor([[0, 1, 2], [0, -1, -1], [0, 1, -1]]))
    follow, _ = mixer(after, Layout("causal"), state)
    for i, accepted in enumerate([3, 1, 2]):
        line, _ = mixer(torch.cat([before, draft[:, :accepted], after], 1)[i : i + 1], Layout("causal"))
        close(follow[i], line[0, 8 + accepted :])


@torch.no_grad()
def test_a_chain_can_be_rolled_back() -> None:
    mixer = build("gqa")
    before, draft, after = x(8), x(4), x(3)
    _, state = mixer(before, Layout("causal"), mixer.init_state(B, 40, dtype=torch.float64))
    _, state = mixer(draft, Layout("causal"), state)
    state = state.commit(torch.arange(2).expand(B, 2))
    follow, _ = mixer(after, Layout("causal"), state)
    line, _ = mixer(torch.cat([before, draft[:, :2], after], 1), Layout("causal"))
    close(follow, line[:, 10:])
    ring = build("ring")
    _, held = ring(before, Layout("causal"), ring.init_state(B, 40, dtype=torch.float64))
    with pytest.raises(ZooError, match="parent"):
        held.commit(torch.zeros(B, 1, dtype=torch.long))


@torch.no_grad()
def test_block_decoding_sees_its_whole_block() -> None:
    mixer = build("gqa")
    tokens = x(12)
    whole, _ = mixer(tokens, Layout("block_causal", block=torch.arange(12) // 4))
    state, parts = mixer.init_state(B, 12, dtype=torch.float64), []
    for start in range(0, 12, 4):
        y, state = mixer(tokens[:, start : start + 4], Layout("full"), state)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    first, state = mixer(tokens[:, :4], Layout("full"), mixer.init_state(B, 12, dtype=torch.float64))
    rest, _ = mixer(tokens[:, 4:], Layout("block_causal", block=torch.arange(8) // 4), state)
    close(torch.cat([first, rest], 1), whole)
    prefix, _ = mixer(tokens, Layout("prefix", prefix=4))
    causal, _ = mixer(tokens[:, 4:], Layout("prefix", prefix=4), mixer(tokens[:, :4], Layout("full"), mixer.init_state(
        B, 12, dtype=torch.float64))[1])  # fmt: skip
    close(causal, prefix[:, 4:])


@torch.no_grad()
def test_given_positions_may_be_fractions_and_have_axes() -> None:
    mixer = build("gqa")
    tokens = x(10)
    half = torch.arange(10).expand(B, 10) / 2
    shifted, _ = mixer(tokens, Layout("full", position=half + 7))
    plain, _ = mixer(tokens, Layout("full", position=half))
    torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-5)  # rotary angles are float32
    assert not torch.allclose(plain, mixer(tokens, Layout("full"))[0], atol=1e-3)
    state, parts = mixer.init_state(B, 10, dtype=torch.float64), []
    causal, _ = mixer(tokens, Layout("causal", position=half))
    for t in range(10):
        y, state = mixer(tokens[:, t : t + 1], Layout("causal", position=half[:, t : t + 1]), state)
        parts.append(y)
    close(torch.cat(parts, 1), causal)
    flat = Attention(D, from_dict(AttentionConfig, {"heads": 2, "rope": {"axes": [4, 4]}})).eval()
    grid = torch.stack([torch.arange(12) // 4, torch.arange(12) % 4], -1).expand(B, 12, 2)
    line = x(12).float()
    moved, _ = flat(line, Layout("full", position=grid + 5))
    torch.testing.assert_close(moved, flat(line, Layout("full", position=grid))[0], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_a_carried_state() -> None:
    mixer = build("gqa").train()
    tokens = x(12).requires_grad_()
    whole, _ = mixer(tokens, Layout("causal"))
    (want,) = torch.autograd.grad(whole.square().sum(), tokens)
    for name_state in (mixer.init_state(B, 12, dtype=torch.float64),):
        state, parts = name_state, []
        for part in tokens.split(5, 1):
            y, state = mixer(part, Layout("causal"), state)
            parts.append(y)
        (got,) = torch.autograd.grad(torch.cat(parts, 1).square().sum(), tokens)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_states_hold_what_they_say() -> None:
    full = build("gqa").init_state(2, 50)
    assert isinstance(full, KVState)
    assert full.k.shape == (2, 2, 50, 4)
    ring = build("ring-sinks").init_state(2, 50)
    assert isinstance(ring, RingState)
    assert ring.k.shape == (2, 4, 4 + 1 + 3, 4)
    assert isinstance(build("ring").init_state(2, 5), KVState)  # shorter than the window
    mixer = build("gqa")
    with pytest.raises(ZooError, match="at most 4 tokens"):
        mixer(x(5), Layout("causal"), mixer.init_state(B, 4, dtype=torch.float64))


def test_mixed_spans_are_a_list_of_layers() -> None:
    spans = [None, 4, 4, None]
    layers = tuple(LayerSpec(mixer="attention", options={"heads": 2, "rope": {}, "window": w}, mlp=None) for w in spans)
    stack = Backbone(BackboneConfig(d_model=D, layers=layers)).double().eval()
    tokens = x(15)
    whole, _ = stack(tokens)
    state, parts = stack.init_state(B, 15, dtype=torch.float64), []
    for part in tokens.split([6, 1, 1, 7], 1):
        y, state = stack(part, Layout("causal"), state)
        parts.append(y)
    close(torch.cat(parts, 1), whole)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="divide one another"):
        from_dict(AttentionConfig, {"heads": 4, "kv_heads": 3})
    with pytest.raises(ConfigError, match="not divisible into 3 heads"):
        Attention(D, AttentionConfig(heads=3))
    with pytest.raises(ConfigError, match="sinks need a window"):
        from_dict(AttentionConfig, {"sinks": 2})
    mixer = build("gqa")
    with pytest.raises(ZooError, match="carried state"):
        mixer(x(4), Layout("causal", segment=torch.zeros(B, 4)), mixer.init_state(B, 9, dtype=torch.float64))


def test_a_long_window_in_bfloat16_is_finite() -> None:
    mixer = Attention(D, AttentionConfig(heads=2, window=128, alibi=True)).bfloat16()
    y, _ = mixer(torch.randn(1, 16384, D, dtype=torch.bfloat16), Layout("causal"))
    assert torch.isfinite(y).all()


@torch.no_grad()
def test_softplus_weights_are_those_of_the_equations() -> None:
    mixer = SoftplusAttention(D, SoftplusAttentionConfig(heads=2)).double().eval()
    tokens = x(9, 1)
    q, k, v = mixer.qkv(tokens)[0].view(9, 3, 2, 8).permute(1, 2, 0, 3)
    rows = []
    for n in range(1, 10):  # the n-th query sees n keys
        score = torch.einsum("hd,hjd->hj", q[:, n - 1], k[:, :n]) * math.log(n) / math.sqrt(8)
        first = torch.nn.functional.softplus(score)
        first = first / first.sum(-1, keepdim=True)
        second = (n * first - (1 if n > 3 else 0)).clamp_min(0) ** 15
        rows.append(torch.einsum("hj,hjd->hd", second / second.sum(-1, keepdim=True), v[:, :n]).flatten())
    want = torch.stack(rows)[None] @ mixer.out_proj.weight.T
    close(mixer(tokens, Layout("causal"))[0], want)
    with pytest.raises(ConfigError, match="alibi"):
        SoftplusAttention(D, SoftplusAttentionConfig(heads=2, alibi=True))
