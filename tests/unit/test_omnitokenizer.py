"""OmniTokenizer and Open-MAGVIT2: shapes, what depends on what, conversion, errors, and that they learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.convert import omnitokenizer as convert
from zoo.convert.open_magvit2 import averaged, to_official
from zoo.errors import ZooError
from zoo.models.omnitokenizer import OmniTokenizer, OmniTokenizerConfig, from_patches, to_patches
from zoo.models.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from zoo.nn.lfq import LFQConfig
from zoo.nn.vq import VectorQuantizerConfig

SMALL = {"width": 16, "heads": 2, "head_dim": 8, "encoder": "tw", "decoder": "t", "temporal": 1, "window": 2}
BOOK = VectorQuantizerConfig(size=32, dim=4, update="ema")


def omni(**changes: object) -> OmniTokenizer:
    torch.manual_seed(0)
    return OmniTokenizer(OmniTokenizerConfig(**{**SMALL, "quantizer": BOOK, **changes}))  # type: ignore[arg-type]


def magvit() -> OpenMAGVIT2:
    torch.manual_seed(0)
    return OpenMAGVIT2(OpenMAGVIT2Config(width=32, mults=(1, 1, 2, 2), blocks=1, quantizer=LFQConfig(dim=6)))


def clip(frames: int = 5, side: int = 16) -> Tensor:
    return torch.rand(2, 3, frames, side, side, generator=torch.Generator().manual_seed(1))


def test_patches_come_back() -> None:
    x = clip(8)
    patches = to_patches(x, (4, 8, 8))
    assert patches.shape == (2, 2, 2, 2, 3 * 4 * 64)
    assert torch.equal(from_patches(patches, (4, 8, 8)), x)


def test_ids_have_the_grid_that_factors_say() -> None:
    model = omni().eval()
    ids = model.encode(clip(9))
    assert ids.shape == (2, *model.grid(9, 16, 16)) == (2, 3, 2, 2)
    assert model.decode(ids).shape == (2, 3, 9, 16, 16)
    assert model.encode(clip(1)).shape == (2, 1, 2, 2)


def test_the_first_frames_tokens_depend_on_later_ones() -> None:
    """It is what the card says: this tokenizer is not causal."""
    model = omni().eval()
    x = clip(9)
    other = x.clone()
    other[:, :, 1:] = 0.5
    z, changed = model.encode_latents(x), model.encode_latents(other)
    assert not torch.allclose(z[:, 0], changed[:, 0], atol=1e-4)
    spatial = [model.encoder.first(to_patches(v[:, :, :1], (1, 8, 8))) for v in (x, other)]
    assert torch.equal(*spatial)


def test_vae_has_latents_and_no_ids() -> None:
    model = omni(vae=True).eval()
    latents = model.encode_latents(clip())
    assert latents.shape == (2, 2, 2, 2, 4)
    assert model.decode_latents(latents).shape == clip().shape
    with pytest.raises(ZooError, match="continuous here"):
        model.encode(clip())
    model.train()
    found = model(clip())
    assert found.ids is None
    assert float(found.parts["kl"].detach()) > 0


def test_wrong_clips_are_refused() -> None:
    model = omni()
    with pytest.raises(ZooError, match=r"1 \+ a multiple of 4 frames, got 4"):
        model.encode(clip(4))
    with pytest.raises(ZooError, match="no whole windows of 2"):
        model.encode(clip(5, 24))
    with pytest.raises(ZooError, match="square frames, got 16 x 32"):
        model.encode(torch.zeros(1, 3, 1, 16, 32))
    with pytest.raises(ValueError, match="row of 't' and 'w'"):
        OmniTokenizerConfig(encoder="tx")


@pytest.mark.parametrize("position", ["rotary", "stored"])
def test_conversion_round_trip_with_and_without_stored_bias(position: str) -> None:
    model = omni(position=position)
    state = convert.to_official(model.state_dict(), model.config)
    held = [key for key in state if "enc_spatial_transformer" in key and "spatial_rel_pos_bias" in key]
    assert bool(held) == (position == "stored")
    back = convert.to_zoo({**state, "image_discriminator.noise.weight": torch.zeros(3)}, model.config)
    assert all(torch.equal(back[key], value) for key, value in model.state_dict().items())
    assert set(back) == set(model.state_dict())
    table = next(key for key in state if key.endswith("relative_position_index"))
    with pytest.raises(ZooError, match="no table of the places"):
        convert.to_zoo({**state, table: state[table] + 1}, model.config)
    with pytest.raises(ZooError, match="no rule for the state-dict key"):
        convert.to_zoo({**state, "encoder.other": torch.zeros(1)}, model.config)


@pytest.mark.parametrize("build", [omni, magvit])
def test_a_few_steps_lower_the_loss(build) -> None:  # type: ignore[no-untyped-def]
    model, x = build().train(), clip()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(8):
        found = model(x)
        loss = (found.output - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_magvit_shapes_and_ids() -> None:
    model = magvit().eval()
    assert model.factor == (2, 8, 8)
    ids = model.encode(clip())
    assert ids.shape == (2, 3, 2, 2)
    assert int(ids.max()) < 64
    assert model.decode(ids).shape == clip().shape
    assert torch.equal(model.eval()(clip()).ids, ids)
    assert model.decode(model.encode(clip(1))).shape == (2, 3, 1, 16, 16)


def test_magvits_moving_average_is_what_is_loaded() -> None:
    model = magvit()
    state = to_official(model.state_dict(), model.config)
    average = {"model_ema." + key.replace(".", ""): value + 1 for key, value in state.items()}
    found = averaged({**state, **average, "model_ema.decay": torch.tensor(0.999)})
    assert set(found) == set(state)
    assert all(torch.equal(found[key], value + 1) for key, value in state.items())
