"""NBP's video tokenizer: causal in time, pictures are clips of one frame, and it trains."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ZooError
from zoo.models.nbp_tokenizer import NBPTokenizer, NBPTokenizerConfig
from zoo.nn.conv3d import DepthToSpace


def build(embed: int = 6) -> NBPTokenizer:
    torch.manual_seed(5)
    return NBPTokenizer(NBPTokenizerConfig(widths=(4, 4, 8), blocks=1, groups=2, embed=embed)).eval()


def clip(frames: int = 9) -> torch.Tensor:
    return torch.rand(2, 3, frames, 16, 16, generator=torch.Generator().manual_seed(2))


def test_tokens_never_depend_on_later_frames() -> None:
    model = build()
    video = clip()
    changed = video.clone()
    changed[:, :, 5:] = 1 - changed[:, :, 5:]
    a, b = (model.encoder(v) for v in (video, changed))
    assert torch.allclose(a[:, :, :2], b[:, :, :2], atol=1e-6)
    assert not torch.allclose(a[:, :, 2], b[:, :, 2], atol=1e-3)
    assert torch.equal(model.encode(video)[:, :1], model.encode(video[:, :, :1])), "a picture is a clip of one frame"


def test_pixels_never_depend_on_later_tokens() -> None:
    model = build()
    ids = torch.randint(64000, (1, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    whole = model.decode(ids)
    assert whole.shape == (1, 3, 9, 16, 16)
    assert torch.allclose(whole[:, :, :5], model.decode(ids[:, :2]), atol=1e-5)


def test_depth_to_space_keeps_every_value() -> None:
    x = torch.arange(2 * 16 * 3 * 2 * 2.0).reshape(2, 16, 3, 2, 2)
    y = DepthToSpace((2, 2, 2), causal=False)(x)
    assert y.shape == (2, 2, 6, 4, 4)
    assert torch.equal(y.flatten().sort().values, x.flatten())
    assert torch.equal(DepthToSpace((2, 2, 2))(x), y[:, :, 1:])


@pytest.mark.parametrize("embed", [6, 5])
def test_training_reaches_every_parameter(embed: int) -> None:
    model = build(embed).train()
    result = model(clip(5))
    assert result.output.shape == (2, 3, 5, 16, 16)
    assert result.ids is not None
    (result.output.square().mean() + result.loss).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_wrong_inputs() -> None:
    model = build()
    with pytest.raises(ZooError, match=r"takes 1 \+ a multiple of 4 frames, got 4"):
        model.encode(clip(4))
    with pytest.raises(ZooError, match="multiples of 8 and 8"):
        model.encode(torch.rand(1, 3, 5, 12, 16))
    with pytest.raises(ZooError, match=r"takes clips \[B, 3, T, H, W\]"):
        model.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(ZooError, match="ids from 0 to 63999"):
        model.decode(torch.full((1, 1, 2, 2), 64000))
