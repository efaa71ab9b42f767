"""TiTok: verbs, training in all its forms, the step from stage 1 to stage 2, words for wrong input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from zoo.config import from_dict, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig, maskgit_stack
from zoo.models.titok import TiTok, TiTokConfig, to_stage2
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.vit import ViTConfig
from zoo.nn.vq import VectorQuantizerConfig
from zoo.tokenizers.visual import VisualTokenizer

VIT = ViTConfig(width=32, layers=2, heads=4, mlp=MLPConfig(kind="gelu", width=64))


def tiny(**changes: object) -> TiTokConfig:
    base = TiTokConfig(
        encoder=VIT, decoder=VIT, encoder_patch=8, decoder_patch=4, latents=5,
        quantizer=VectorQuantizerConfig(size=16, dim=6), preprocess=PreprocessConfig(size=16),
    )  # fmt: skip
    return replace(base, **changes)


def vqgan() -> MaskGITVQGAN:
    quantizer = VectorQuantizerConfig(size=20, dim=8, commitment=1.0, codebook=0.25)
    stack = maskgit_stack(32, (1, 1, 1), 1, 8)
    return MaskGITVQGAN(MaskGITVQGANConfig(stack=stack, quantizer=quantizer, preprocess=PreprocessConfig(size=16)))


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_and_pixels(legacy: bool) -> None:
    model = TiTok(tiny(legacy_reshape=legacy)).eval()
    assert isinstance(model, VisualTokenizer)
    pixels = torch.rand(3, 3, 16, 16)
    ids = model.encode(pixels)
    assert ids.shape == (3, 5)
    result = model(pixels)
    assert torch.equal(result.ids, ids)
    assert result.output.shape == pixels.shape
    assert torch.allclose(model.decode(ids), result.output, atol=1e-5)
    assert torch.allclose(model.encode_latents(pixels), model.quantizer.lookup(ids))


@pytest.mark.parametrize(
    "changes", [{}, {"bottleneck": "vae"}, {"text_length": 4, "text_width": 7}, {"target": "proxy", "proxy_codes": 20}]
)
def test_every_parameter_learns(changes: dict) -> None:
    model = TiTok(tiny(**changes)).train()
    pixels = torch.rand(2, 3, 16, 16)
    text = torch.randn(2, 4, 7) if "text_length" in changes else None
    result = model(pixels, text)
    loss = vqgan().proxy_loss(result.output, pixels) if "target" in changes else F.mse_loss(result.output, pixels)
    (loss + result.loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = TiTok(tiny()).train()
    pixels = torch.rand(2, 3, 16, 16)
    model(pixels).output.square().sum().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(pixels).output.square().sum().backward()
    again = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], rtol=1e-4, atol=1e-4) for n in plain)


def test_stage_2_starts_from_stage_1_and_trains_decoders_only() -> None:
    first = TiTok(tiny(target="proxy", proxy_codes=20)).eval()
    with pytest.raises(ZooError, match="to_stage2"):
        first.decode(torch.zeros(1, 5, dtype=torch.long))
    pixels = torch.rand(1, 3, 16, 16)
    second = to_stage2(first, vqgan()).eval()
    assert torch.equal(second.encode(pixels), first.encode(pixels))
    assert second.decode(second.encode(pixels)).shape == (1, 3, 16, 16)
    second.freeze_encoder()
    trained = {n.split(".")[0] for n, p in second.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "pixel_codebook", "pixel_decoder"}
    with pytest.raises(ZooError, match="stage-1"):
        to_stage2(second, vqgan())


def test_confident_proxies_give_their_code() -> None:
    model = to_stage2(TiTok(tiny(target="proxy", proxy_codes=20)), vqgan())
    logits = 100.0 * F.one_hot(torch.tensor([[[3, 7], [0, 19]]]), 20).permute(0, 3, 1, 2).float()
    mixed = model.mix_proxies(logits)
    assert torch.allclose(mixed[0, :, 0, 1], model.pixel_codebook.weight[7], atol=1e-5)


def test_vae_has_latents_but_no_ids() -> None:
    model = TiTok(tiny(bottleneck="vae")).eval()
    pixels = torch.rand(2, 3, 16, 16)
    assert model.encode_latents(pixels).shape == (2, 5, 6)
    assert model.vocab_size is None
    assert not torch.equal(model.encode_latents(pixels, sample=True), model.encode_latents(pixels))
    with pytest.raises(ZooError, match="continuous"):
        model.encode(pixels)
    with pytest.raises(ZooError, match="continuous"):
        model.decode(torch.zeros(1, 5, dtype=torch.long))


def test_words_for_wrong_input() -> None:
    model = TiTok(tiny(text_length=4, text_width=7))
    with pytest.raises(ZooError, match="built for 16 x 16"):
        model(torch.rand(1, 3, 24, 24))
    with pytest.raises(ZooError, match="captions"):
        model(torch.rand(1, 3, 16, 16))
    with pytest.raises(ZooError, match=r"\[B, 4, 7\]"):
        model(torch.rand(1, 3, 16, 16), torch.rand(1, 5, 7))
    with pytest.raises(ConfigError, match="patches of 5"):
        from_dict(TiTokConfig, to_dict(tiny()) | {"encoder_patch": 5})
