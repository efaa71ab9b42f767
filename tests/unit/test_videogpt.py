"""VideoGPT's tokenizer: shapes, agreement of its verbs, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.config import from_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.videogpt import LineAttention, VideoGPT, VideoGPTConfig


def build(**changes: Any) -> VideoGPT:
    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "width": 8,
        "layers": 1,
        "downsample": [2, 4, 4],
        "quantizer": {"size": 16, "dim": 4, "update": "ema"},
        **changes,
    }
    return VideoGPT(from_dict(VideoGPTConfig, fields)).eval()


@pytest.mark.parametrize("factors", [(2, 4, 4), (4, 2, 2), (1, 8, 2)])
def test_shapes(factors: tuple[int, int, int]) -> None:
    model = build(downsample=list(factors))
    t, h, w = (2 * f for f in factors)
    clip = torch.rand(2, 3, t, h, w)
    ids = model.encode(clip)
    assert ids.shape == (2, 2, 2, 2)
    assert model.decode(ids).shape == clip.shape
    result = model(clip)
    assert result.ids is not None
    assert torch.equal(result.ids, ids)
    assert torch.allclose(result.output, model.decode(ids), atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_attention_stays_on_its_axis(axis: int) -> None:
    torch.manual_seed(0)
    attention = LineAttention(8, 2, axis)
    x = torch.randn(1, 3, 4, 5, 8)
    changed = x.clone()
    changed[0, 1, 2, 3] += 1
    moved = (attention(x) != attention(changed)).any(-1)[0]
    line: list[Any] = [1, 2, 3]
    line[axis - 1] = slice(None)
    expected = torch.zeros(3, 4, 5, dtype=torch.bool)
    expected[tuple(line)] = True
    assert torch.equal(moved, expected)


def test_training_reaches_every_parameter_and_moves_the_codebook() -> None:
    model = build().train()
    before = model.quantizer.embedding.weight.clone()
    result = model(torch.rand(2, 3, 4, 8, 8))
    (result.output.square().mean() + result.loss).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert not torch.equal(before, model.quantizer.embedding.weight)


def test_wrong_sizes() -> None:
    with pytest.raises(ConfigError, match="powers of 2"):
        from_dict(VideoGPTConfig, {"downsample": [3, 2, 2]})
    with pytest.raises(ZooError, match="takes a multiple of 2 frames, got 3"):
        build().encode(torch.rand(1, 3, 3, 8, 8))
