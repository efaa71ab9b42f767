"""FlexTok: ordered tokens, any number of them decodes; flow matching and guidance against closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import ZooError
from zoo.models.flextok import FlexTok, FlexTokConfig, flextok_vit, from_patches, sincos_positions, to_patches
from zoo.models.flextok_vae import FlexTokVAEConfig
from zoo.nn.conv2d import ConvStackConfig
from zoo.nn.flow import Guidance, Guide, NoiseConfig, add_noise, euler, noise_levels, sample_levels
from zoo.nn.fsq import FSQConfig
from zoo.nn.preprocess import PreprocessConfig

CASE = Path(__file__).parent.parent / "parity" / "cases" / "flextok" / "dev-tiny"


def tiny(**changes: object) -> FlexTokConfig:
    stack = ConvStackConfig(widths=(16, 32), blocks=1, decoder_blocks=2, z_channels=4, groups=8, mid_attention=True)
    base = FlexTokConfig(
        vae=FlexTokVAEConfig(stack=stack, preprocess=PreprocessConfig(size=16, mean=(0.5,) * 3, std=(0.5,) * 3)),
        channels=4, latent_size=8, registers=6, fsq=FSQConfig(levels=(8, 5)),
        encoder=flextok_vit(32, 2, 16), decoder=flextok_vit(32, 2, 16, adaln=True),
        preprocess=PreprocessConfig(size=16, mean=(0.5,) * 3, std=(0.5,) * 3),
    )  # fmt: skip
    return replace(base, **changes)


def lively(model: FlexTok) -> FlexTok:
    """Give the zero-initialised layers values, so that the output depends on the input."""
    for parameter in model.decoder.parameters():
        if not parameter.abs().sum() > 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_any_prefix_decodes() -> None:
    model = lively(FlexTok(tiny())).eval()
    pixels = torch.rand(2, 3, 16, 16)
    ids = model.encode(pixels)
    assert ids.shape == (2, 6)
    noise = torch.randn(2, 4, 8, 8)
    outputs = [model.decode_latents(ids[:, :k], steps=2, start=noise) for k in (1, 3, 6)]
    assert all(x.shape == (2, 4, 8, 8) for x in outputs)
    assert not torch.allclose(outputs[0], outputs[2])
    fewer = model.decode_latents(ids, steps=2, start=noise, keep=torch.tensor([3, 1]))
    assert torch.allclose(fewer[0], outputs[1][0], atol=1e-5)
    assert torch.allclose(fewer[1], outputs[0][1], atol=1e-5)
    assert model.decode(ids, steps=1).shape == (2, 3, 16, 16)


def test_tokens_behind_the_prefix_do_not_matter() -> None:
    model = lively(FlexTok(tiny())).eval()
    codes = model.quantizer.lookup(torch.randint(0, 40, (1, 6)))
    other = codes.clone()
    other[:, 4:] = model.quantizer.lookup(torch.tensor([[1, 2]]))
    x, t, keep = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([4])
    assert torch.equal(model.decoder(x, t, codes, keep), model.decoder(x, t, other, keep))
    assert not torch.equal(model.decoder(x, t, codes), model.decoder(x, t, other))


def test_an_early_register_does_not_see_a_later_one() -> None:
    model = FlexTok(tiny()).eval()
    latents = torch.randn(1, 4, 8, 8)
    before = model.encoder(latents)
    with torch.no_grad():
        model.encoder.registers[4] += torch.randn(32)
    after = model.encoder(latents)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("positions", ["sincos", "learnable_sum", "learnable_prod"])
def test_every_parameter_learns(positions: str) -> None:
    model = lively(
        FlexTok(tiny(encoder_positions=positions, decoder_positions=positions, null_probability=0.5))
    ).train()
    assert not model.vae.training
    loss = sum(model(latents=torch.randn(16, 4, 8, 8)).loss for _ in range(4))
    loss.backward()
    still = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert still == []
    assert all(not p.requires_grad for p in model.vae.parameters())


def test_a_perfect_velocity_has_no_loss_and_integrates_to_the_picture() -> None:
    x, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for steps in (1, 7):
        assert torch.allclose(euler(lambda y, t, u: noise - x, noise, steps), x, atol=1e-5)
    t = torch.tensor([0.0, 0.5, 1.0])
    noised = add_noise(x, noise, t)
    assert torch.equal(noised[0], x[0])
    assert torch.equal(noised[2], noise[2])


def test_guidance() -> None:
    cond, uncond = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.allclose(Guide(Guidance(3.0))(cond, uncond), uncond + 3 * (cond - uncond))
    update = Guide(Guidance(3.0, projected=True, threshold=2.5))(cond, uncond) - cond
    assert (update.flatten(1).norm(dim=1) <= 2 * 2.5 + 1e-4).all()
    cosine = torch.cosine_similarity(update.flatten(1), cond.flatten(1))
    assert cosine.abs().max() < 1e-5


def test_noise_levels_follow_their_distributions() -> None:
    device = torch.device("cpu")
    for kind in ("uniform", "lognorm", "mode"):
        t = sample_levels(NoiseConfig(kind=kind, mode_scale=0.25), 20000, device)
        assert t.min() >= 0
        assert t.max() <= 1
        assert abs(t.mean().item() - 0.5) < 0.02
    strata = noise_levels(NoiseConfig(kind="lognorm", stratified=True), torch.full((4,), 0.5))
    uniform = torch.special.ndtr(torch.logit(strata))
    assert torch.allclose(uniform, torch.tensor([0.125, 0.375, 0.625, 0.875]), atol=1e-5)


def test_patches_round_trip_and_sines_are_the_stored_ones() -> None:
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(from_patches(to_patches(x, 2), 2), x)
    kept = load_file(CASE / "kept.safetensors")
    for name, table in kept.items():
        ours = sincos_positions(tuple(table.shape[2:]), table.shape[1])
        assert torch.allclose(ours, table, atol=1e-6), name


def test_words_for_wrong_input() -> None:
    model = FlexTok(tiny()).eval()
    with pytest.raises(ZooError, match="1 to 6 ids, got 7"):
        model.decode(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ZooError, match="from 0 to 39"):
        model.decode(torch.full((1, 2), 40))
    with pytest.raises(ZooError, match="no VAE"):
        FlexTok(tiny(vae=None)).encode(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(("init", "looks"), [("default", False), ("scaled", True)])
def test_scaled_init_reads_the_tokens_and_their_places_at_once(init: str, looks: bool) -> None:
    """With adaLN-zero the decoder's blocks pass everything through at first; then 0.02 of position is all there is."""
    torch.manual_seed(3)
    config = tiny(vae=None, pixel_space=True, channels=3, latent_size=16, patch=8, init=init, prediction="clean")
    decoder = FlexTok(config).eval().decoder
    hidden: list[torch.Tensor] = []
    decoder.norm_out.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    codes = torch.randn(1, 6, 2)
    for tokens in (codes, codes[:, [1, 0, 2, 3, 4, 5]]):
        decoder(torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(4)), torch.ones(1), tokens)
    change = float((hidden[1] - hidden[0]).abs().mean().detach())
    assert change > 0.05 if looks else change == 0


def test_scaled_init_on_the_meta_device() -> None:
    """Saved models are checked by building them without memory."""
    with torch.device("meta"):
        FlexTok(tiny(init="scaled"))
