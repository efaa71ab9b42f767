"""FVD's parts against their definitions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo.errors import ZooError
from zoo.nn.i3d import InceptionI3d
from zoo.nn.video_metrics import frechet, preprocess, psnr

MANIFEST = Path(__file__).parent.parent / "parity" / "cases" / "fvd" / "released" / "i3d_pretrained_400.json"


def features(seed: int, count: int = 40) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def test_both_forms_of_the_distance_agree_and_know_shifts() -> None:
    a, b = features(0), features(1) * 2 + 1
    assert frechet(a, b) == pytest.approx(frechet(a, b, "videogpt"), rel=1e-6)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + 3) == pytest.approx(5 * 9, rel=1e-6)
    with pytest.raises(ZooError, match="at least 2 clips a side"):
        frechet(a[:1], b)


def test_preprocessing_crops_the_centre() -> None:
    clip = torch.zeros(1, 3, 2, 8, 16)
    clip[..., 4:12] = 1.0
    assert torch.equal(preprocess(clip, size=8), torch.ones(1, 3, 2, 8, 8))
    assert preprocess(torch.rand(1, 3, 2, 17, 11), size=9).shape == (1, 3, 2, 9, 9)
    grey = torch.full((1, 3, 1, 4, 4), 0.5)
    assert float(preprocess(grey, "videogpt", 4)[0, 0, 0, 0, 0]) == pytest.approx(2 * 127 / 255 - 1)
    with pytest.raises(ZooError, match="unknown FVD preprocessing"):
        preprocess(grey, "other")  # type: ignore[arg-type]


def test_psnr_of_a_known_error() -> None:
    real = torch.zeros(2, 3, 4, 4)
    assert psnr(real, real + 0.1).tolist() == pytest.approx([20.0, 20.0], rel=1e-5)


def test_the_published_network_loads_strictly() -> None:
    manifest = json.loads(MANIFEST.read_text())
    with torch.device("meta"):
        model = InceptionI3d()
    assert {name: list(v.shape) for name, v in model.state_dict().items()} == {
        name: shape for name, (shape, _) in manifest["manifest"].items()
    }


def test_short_clips_have_logits_and_differ_by_eps() -> None:
    torch.manual_seed(0)
    one, two = InceptionI3d(7).eval(), InceptionI3d(7, eps=1e-3).eval()
    two.load_state_dict(one.state_dict())
    clip = torch.rand(1, 3, 9, 224, 224)
    with torch.no_grad():
        a, b = one(clip), two(clip)
    assert a.shape == (1, 7)
    assert not torch.equal(a, b)
