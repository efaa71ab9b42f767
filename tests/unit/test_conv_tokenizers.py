"""Convolutional visual tokenizers and preprocessing: verbs, errors, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import ZooError
from zoo.models.flextok_vae import FlexTokVAE, FlexTokVAEConfig
from zoo.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig, maskgit_stack
from zoo.nn.conv2d import BlurPool, ConvStackConfig, pad_same
from zoo.nn.preprocess import CLIP_MEAN, CLIP_STD, PreprocessConfig, denormalize, fit_pixels, normalize
from zoo.nn.vq import VectorQuantizerConfig
from zoo.tokenizers.visual import VisualTokenizer


def tiny_vqgan() -> MaskGITVQGAN:
    return MaskGITVQGAN(
        MaskGITVQGANConfig(
            stack=maskgit_stack(32, (1, 2), 1, 8),
            quantizer=VectorQuantizerConfig(size=16, dim=8, commitment=1.0, codebook=0.25),
            preprocess=PreprocessConfig(size=16),
        )
    )


def test_vqgan_speaks_the_tokenizer_protocol() -> None:
    model = tiny_vqgan().eval()
    assert isinstance(model, VisualTokenizer)
    pixels = torch.rand(2, 3, 16, 16)
    ids = model.encode(pixels)
    assert ids.shape == (2, model.num_tokens) == (2, 64)
    assert ids.dtype == torch.int64
    result = model(pixels)
    assert torch.equal(result.ids, ids)
    assert torch.allclose(model.decode(ids), result.output, atol=1e-5)


def test_vqgan_trains_every_parameter() -> None:
    model = tiny_vqgan()
    pixels = torch.rand(2, 3, 16, 16)
    result = model(pixels)
    (F.mse_loss(result.output, pixels) + result.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert sum(len(g["params"]) for g in model.param_groups()) == len(list(model.parameters()))


def test_wrong_input_is_refused_in_words() -> None:
    model = tiny_vqgan()
    with pytest.raises(ZooError, match="multiples of 2, got 15 x 16"):
        model(torch.rand(1, 3, 15, 16))
    with pytest.raises(ZooError, match="from 0 to 15"):
        model.decode(torch.full((1, 64), 16))
    with pytest.raises(ZooError, match="grid"):
        model.decode(torch.zeros(1, 60, dtype=torch.long))


def tiny_vae() -> FlexTokVAE:
    stack = ConvStackConfig(widths=(16, 32), blocks=1, decoder_blocks=2, z_channels=4, groups=8, mid_attention=True)
    return FlexTokVAE(
        FlexTokVAEConfig(
            stack=stack, scaling_factor=0.5, preprocess=PreprocessConfig(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)
        )
    )


def test_vae_latents_round_trip_their_scale() -> None:
    model = tiny_vae().eval()
    pixels = torch.rand(2, 3, 16, 16)
    latents = model.encode_latents(pixels)
    assert latents.shape == (2, 4, 8, 8)
    assert torch.allclose(latents, 0.5 * model.posterior(pixels * 2 - 1).mode())
    assert torch.allclose(model.decode_latents(latents), model(pixels).output, atol=1e-5)
    with pytest.raises(ZooError, match="continuous"):
        model.encode(pixels)


def test_vae_trains_every_parameter() -> None:
    model = tiny_vae().train()
    pixels = torch.rand(2, 3, 16, 16)
    result = model(pixels)
    (F.mse_loss(result.output, pixels) + result.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_same_padding_gives_the_ceiling() -> None:
    for n in (7, 8, 9):
        assert F.conv2d(pad_same(torch.zeros(1, 1, n, n), 4, 2), torch.zeros(1, 1, 4, 4), stride=2).shape[-1] == -(
            -n // 2
        )
    flat = BlurPool()(torch.ones(1, 3, 8, 8))
    assert torch.allclose(flat[..., 1:-1, 1:-1], torch.ones(1, 3, 2, 2))


def test_preprocessing_crops_the_centre_and_inverts_its_normalisation() -> None:
    pixels = torch.rand(2, 3, 20, 40)
    fitted = fit_pixels(pixels, PreprocessConfig(size=20))
    assert torch.equal(fitted, pixels[..., 10:30])
    assert fit_pixels(pixels, PreprocessConfig(size=8)).shape == (2, 3, 8, 8)
    squeezed = fit_pixels(pixels, PreprocessConfig(size=10, resize="both"))
    assert torch.allclose(squeezed, F.interpolate(pixels, (10, 10), mode="bicubic", antialias=True).clamp(0, 1))
    clip = PreprocessConfig(mean=CLIP_MEAN, std=CLIP_STD)
    assert torch.allclose(denormalize(normalize(pixels, clip), clip), pixels, atol=1e-6)


def test_preprocessing_equals_torchvision() -> None:
    from torchvision.transforms.v2 import functional as tv

    pixels = torch.rand(3, 37, 53)
    want = tv.center_crop(tv.resize(pixels, 24, interpolation=tv.InterpolationMode.BICUBIC, antialias=True), 24).clamp(
        0, 1
    )
    assert torch.allclose(fit_pixels(pixels, PreprocessConfig(size=24)), want, atol=1e-5)
