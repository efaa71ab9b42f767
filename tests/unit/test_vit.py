"""The image transformer: masks against their dense form, caches, modulation, a written-out attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from zoo.config import from_dict
from zoo.errors import ConfigError
from zoo.nn.mlp import MLPConfig
from zoo.nn.vit import CAUSAL, FULL, Attention, Mask, Modulation, ViT, ViTBlock, ViTConfig, attend

CONFIG = ViTConfig(width=24, layers=2, heads=3, mlp=MLPConfig(kind="gelu", width=48))


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("kind", ["full", "causal", "prefix"])
def test_masks_equal_their_dense_form(kind: str, length: int) -> None:
    q, k, v = torch.randn(3, 2, 3, length, 8)
    prefix = 5
    seen = torch.ones(length, length, dtype=torch.bool)
    if kind != "full":
        seen = seen.tril()
    if kind == "prefix":
        seen[:prefix, :prefix] = True
    fast = attend(q, k, v, Mask(kind, prefix=prefix), scale=0.3)
    assert torch.allclose(fast, attend(q, k, v, Mask("dense", dense=seen), scale=0.3), atol=1e-6)


def test_attention_is_multi_head_attention() -> None:
    ours, theirs = Attention(CONFIG), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data.normal_()
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 7, 24)
    assert torch.allclose(ours(x), theirs(x, x, x, need_weights=False)[0], atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": "qv"}, {"qk_norm": "plain", "scale": 0.5}, {"qk_norm": "affine"}])
def test_chunks_through_the_cache_equal_all_at_once(changes: dict) -> None:
    model = ViT(replace(CONFIG, **changes)).eval()
    x = torch.randn(2, 8, 24)
    caches = model.init_caches(2, 8, "cpu", torch.float32)
    parts = [model(x[:, a:b], CAUSAL, caches=caches) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert torch.allclose(torch.cat(parts, 1), model(x, CAUSAL), atol=1e-5)
    assert caches[0].nbytes() == 2 * 2 * 8 * 24 * 4


def test_a_new_modulation_leaves_the_input_alone() -> None:
    block = ViTBlock(replace(CONFIG, adaln=True))
    x = torch.randn(2, 5, 24)
    assert torch.equal(block(x, FULL, torch.randn(2, 24)), x)


def test_groups_are_modulated_apart() -> None:
    modulation = Modulation(4, 3, groups=2)
    nn.init.normal_(modulation.proj.weight)
    condition = torch.randn(2, 4)
    parts = modulation(condition, (2, 3))
    assert [p.shape for p in parts] == [(2, 5, 4)] * 3
    for p in parts:
        assert torch.equal(p[:, 0], p[:, 1])
        assert torch.equal(p[:, 2], p[:, 4])
        assert not torch.equal(p[:, 1], p[:, 2])


def test_widths_must_divide() -> None:
    with pytest.raises(ConfigError, match="not divisible into 5 heads"):
        from_dict(ViTConfig, {"width": 24, "heads": 5})
