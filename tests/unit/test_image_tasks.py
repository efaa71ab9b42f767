"""Tasks on pictures: their losses by hand, what they refuse, and the model options that small data needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zoo import datamodules, tasks
from zoo.config import from_dict
from zoo.errors import ConfigError, ZooError
from zoo.models.flextok import FlexTok, FlexTokConfig
from zoo.models.maskgit import MaskGIT, MaskGITConfig, mask_tokens
from zoo.models.rar import RAR, RARConfig
from zoo.models.titok import TiTok, TiTokConfig
from zoo.nn.codebook import codebook_usage
from zoo.nn.flow import Guidance, NoiseConfig, sample_levels
from zoo.nn.image_metrics import psnr
from zoo.nn.preprocess import normalize
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig
from zoo.train.assemble import assemble
from zoo.train.recipe import validate

VIT = {"width": 16, "layers": 1, "heads": 2, "mlp": {"kind": "gelu", "width": 32}}
TITOK: dict[str, Any] = {
    "encoder": VIT, "decoder": VIT, "encoder_patch": 8, "decoder_patch": 8, "latents": 4,
    "quantizer": {"size": 16, "dim": 4}, "preprocess": {"size": 16},
}  # fmt: skip
FLEX: dict[str, Any] = {
    "pixel_space": True, "channels": 3, "latent_size": 16, "patch": 8, "registers": 4, "fsq": {"levels": [4, 4]},
    "encoder": VIT, "decoder": {**VIT, "adaln": True, "adaln_groups": 2}, "preprocess": {"size": 16},
}  # fmt: skip


def titok(**changes: Any) -> TiTok:
    return TiTok(from_dict(TiTokConfig, {**TITOK, **changes}))


def flextok(**changes: Any) -> FlexTok:
    return FlexTok(from_dict(FlexTokConfig, {**FLEX, **changes}))


def evaluate(task: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    logged: dict[str, Any] = {}
    task.eval()
    task.log_dict = logged.update
    with torch.no_grad():
        for batch in batches:
            task._evaluate(batch, "val")
    task._finish("val")
    return {key.removeprefix("val/"): float(value) for key, value in logged.items()}


def pictures(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    return {"pixels": torch.rand(count, 3, 16, 16), "index": torch.arange(start, start + count)}


def test_reconstruction_is_measured_by_hand() -> None:
    model = titok()
    options = {"perceptual_weight": 0.0, "reconstruction": "l1", "reconstruction_weight": 2.0, "bottleneck_weight": 0.5}
    task = tasks.build({"name": "image_reconstruction", **options}, model)
    batches = [pictures(3), pictures(2, 3)]
    got = evaluate(task, batches)
    results = [model(batch["pixels"]) for batch in batches]
    losses = [2 * F.l1_loss(r.output, b["pixels"]) + 0.5 * r.loss for r, b in zip(results, batches, strict=True)]
    assert got["loss"] == pytest.approx((3 * losses[0].item() + 2 * losses[1].item()) / 5, rel=1e-5)
    values = torch.cat([psnr(r.output.clamp(0, 1), b["pixels"]) for r, b in zip(results, batches, strict=True)])
    assert got["psnr"] == pytest.approx(values.mean().item(), rel=1e-5)
    ids = torch.cat([r.ids for r in results])
    for name, value in codebook_usage(ids, 16).items():
        assert got[f"code_{name}"] == pytest.approx(value)
    assert set(task.metric_names()) == {f"val/{name}" for name in got}


def test_perceptual_loss_without_weights_is_refused_unless_switched_off() -> None:
    for section in ({}, {"perceptual": {"convnext": 1.0}}):
        with pytest.raises(ZooError, match=r"perceptual_weight=0"):
            tasks.build({"name": "image_reconstruction", **section}, titok())
    with pytest.raises(ZooError, match="no term"):
        tasks.build({"name": "image_reconstruction", "perceptual": {}}, titok())
    assert tasks.build({"name": "image_reconstruction", "perceptual_weight": 0.0}, titok()).perceptual is None


def test_perceptual_loss_counts_with_its_weight(tmp_path: Path) -> None:
    from zoo.nn.perceptual import LPIPS

    file = tmp_path / "lpips.safetensors"
    save_file(LPIPS().state_dict(), file)
    perceptual = {"lpips": 1.0, "lpips_weights": str(file)}
    model = titok(preprocess={"size": 32})
    section = {"name": "image_reconstruction", "perceptual_weight": 0.7, "perceptual": perceptual}
    task = tasks.build(section, model)
    batch = {"pixels": torch.rand(2, 3, 32, 32), "index": torch.arange(2)}
    result = model(batch["pixels"])
    terms = task.losses(result, batch["pixels"])
    expected = 0.7 * task.perceptual.lpips(result.output, batch["pixels"]).mean()
    assert torch.allclose(terms["perceptual"], expected)
    assert torch.allclose(terms["loss"], terms["reconstruction"] + expected + result.loss)
    assert not any(p.requires_grad for p in task.perceptual.parameters())
    assert not any("perceptual" in name for name in task.state_dict()), "checkpoints stay small"


@pytest.mark.parametrize(
    ("section", "model", "message"),
    [
        ({"name": "image_reconstruction", "perceptual_weight": 0.0}, {"target": "proxy"}, "proxy_codes"),
        ({"name": "proxy_codes", "vqgan": "x"}, {}, "stage-1"),
        ({"name": "flow_matching"}, {}, "FlexTok"),
        ({"name": "token_generation"}, {}, "MaskGIT or a RAR"),
    ],
)
def test_tasks_refuse_the_wrong_model(section: dict[str, Any], model: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        tasks.build(section, titok(**model))


def test_flow_matching_validates_with_the_same_noise() -> None:
    model = flextok()
    torch.nn.init.normal_(model.decoder.proj_out.weight)
    task = tasks.build({"name": "flow_matching", "psnr_tokens": [1, 4]}, model)
    batches = [pictures(3), pictures(2, 3)]
    state = torch.get_rng_state()
    first = evaluate(task, batches)
    assert torch.equal(state, torch.get_rng_state()), "validation leaves the training's random numbers alone"
    assert evaluate(task, batches) == first
    assert {"loss", "psnr_1", "psnr_4", "code_usage"} <= set(first)
    with pytest.raises(ZooError, match="psnr_tokens"):
        tasks.build({"name": "flow_matching", "psnr_tokens": [5]}, model)


def test_one_step_of_a_clean_predictor_is_its_prediction() -> None:
    model = flextok(prediction="clean").eval()
    torch.nn.init.normal_(model.decoder.proj_out.weight, std=0.1)
    pixels, start = torch.rand(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    ids = model.encode(pixels)
    codes, t = model.quantizer.lookup(ids), torch.ones(2)
    keep, never = torch.full((2,), 4), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        velocity = model.decoder(start, t, codes, keep, never)
        out = model.decode_latents(ids, 1, Guidance(), start=start)
    assert torch.allclose(out, start - velocity, atol=1e-6)
    torch.manual_seed(4)
    result = model.train()(pixels)
    assert torch.allclose(result.loss, F.mse_loss(result.output, pixels), atol=1e-6)


def test_pixel_space_round_trips_the_normalisation() -> None:
    shift = {"size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}
    model = flextok(preprocess=shift)
    pixels = torch.rand(1, 3, 16, 16)
    latents = model.latents(pixels)
    assert torch.allclose(latents[0, 1], (pixels[0, 1] - 0.4) / 0.25)
    with pytest.raises(ConfigError, match="channels"):
        flextok(channels=4)
    with pytest.raises(ConfigError, match="latent_size"):
        flextok(latent_size=32)


def test_shifted_levels_lie_nearer_to_noise() -> None:
    draws = [
        sample_levels(NoiseConfig(kind="uniform", shift=s), 4, torch.device("cpu"), torch.Generator().manual_seed(0))
        for s in (1.0, 4.0)
    ]
    assert torch.allclose(draws[1], 4 * draws[0] / (1 + 3 * draws[0]))
    assert bool((draws[1] > draws[0]).all())


def test_titok_with_fsq_round_trips() -> None:
    model = titok(bottleneck="fsq", fsq={"levels": [4, 3]}, init="scaled").eval()
    assert model.vocab_size == 12
    pixels = torch.rand(2, 3, 16, 16)
    ids = model.encode(pixels)
    result = model(pixels)
    assert torch.equal(ids, result.ids)
    assert torch.allclose(model.decode(ids), result.output, atol=1e-6)
    assert torch.allclose(model.encode_latents(pixels), model.quantizer.lookup(ids))  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="fsq"):
        titok(bottleneck="fsq")
    with pytest.raises(ConfigError, match="fsq"):
        titok(fsq={"levels": [4]})


def test_scaled_initialisation_starts_from_the_mean_picture_and_small_latents() -> None:
    mean = [0.8, 0.7, 0.6]
    wide = {**VIT, "width": 64, "mlp": {"kind": "gelu", "width": 128}}
    settings = {"encoder": wide, "decoder": wide, "preprocess": {"size": 16, "mean": mean, "std": [0.3] * 3}}
    model = titok(bottleneck="fsq", fsq={"levels": [4, 4]}, init="scaled", **settings).eval()
    pixels = torch.rand(32, 3, 16, 16)
    assert (model(pixels).output - torch.tensor(mean)[:, None, None]).abs().max() < 0.1
    latents = model.encoder(normalize(pixels, model.config.preprocess))
    assert latents.abs().mean() < 0.7, "the quantizer's tanh is nowhere flat"
    assert latents.mean(0).std(0).min() > 0.05, "the latents read the picture differently"


def test_random_anchors_start_the_codebook_on_data() -> None:
    usage = {}
    for anchor in ("closest", "random"):
        torch.manual_seed(0)
        layer = VectorQuantizer(VectorQuantizerConfig(size=32, dim=4, update="cvq", anchor=anchor)).train()
        z = 3 + torch.randn(512, 4)
        layer(z)
        usage[anchor] = codebook_usage(layer.eval()(z).ids, 32)["usage"]
    assert usage["random"] > 0.9
    assert usage["random"] > usage["closest"]


def test_ordered_generation_is_raster_cross_entropy() -> None:
    vit = {**VIT, "qk_norm": "affine", "adaln": True}
    model = RAR(from_dict(RARConfig, {"codes": 8, "classes": 2, "length": 4, "vit": vit})).eval()
    task = tasks.build({"name": "token_generation"}, model)
    batch = {"ids": torch.randint(8, (3, 4)), "labels": torch.tensor([0, 1, 1]), "index": torch.arange(3)}
    logits = model(batch["ids"], batch["labels"])[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), batch["ids"])
    assert evaluate(task, [batch])["loss"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ConfigError, match="raster_from"):
        tasks.build({"name": "token_generation", "random_until": 5}, model)


def test_masked_generation_weighs_masked_tokens() -> None:
    vit = {**VIT, "prenorm": False}
    model = MaskGIT(from_dict(MaskGITConfig, {"codes": 8, "classes": 2, "length": 4, "vit": vit})).eval()
    task = tasks.build({"name": "token_generation", "seed": 2}, model)
    batch = {"ids": torch.randint(8, (3, 4)), "labels": torch.tensor([0, 1, 1]), "index": torch.arange(7, 10)}
    got = evaluate(task, [batch])
    torch.manual_seed(2 * 1_000_003 + 7)
    masked, mask = mask_tokens(batch["ids"], model.mask_id)
    logits = model(masked, batch["labels"])
    losses = F.cross_entropy(logits.transpose(1, 2), batch["ids"], reduction="none")
    weights = torch.where(mask, 1.0, 0.1)
    assert got["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)
    assert 0 <= got["accuracy"] <= 1


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    ids = torch.arange(24).reshape(6, 2, 2).int()
    labels = torch.arange(6) % 3
    save_file({"ids": ids, "labels": labels}, tmp_path / "a.safetensors", metadata={"vocab_size": "24"})
    return tmp_path


def test_token_caches_draw_views_and_prefixes(cache: Path) -> None:
    section = {"name": "tokens", "root": str(cache), "train": [{"path": "a.safetensors"}], "batch_size": 6}
    data: Any = datamodules.build(section, None, 1)
    data.setup()
    assert (data.max_tokens, data.num_outputs, data.classes) == (2, 3, ("0", "1", "2"))
    source = data.sources["train"]
    index = np.arange(6)
    assert source.batch(index, 0, 0)["ids"].tolist() == [[4 * i, 4 * i + 1] for i in range(6)]
    source.augment = True
    views = np.stack([source.batch(index, epoch, 0)["ids"][:, 0] for epoch in range(20)])
    assert all(set(views[:, i]) == {4 * i, 4 * i + 2} for i in range(6))
    assert np.array_equal(source.batch(index, 3, 9)["ids"], source.batch(index, 3, 0)["ids"])
    short: Any = datamodules.build({**section, "tokens": 1}, None, 1)
    short.setup()
    assert short.sources["train"].batch(index, 0, 0)["ids"].shape == (6, 1)
    with pytest.raises(ZooError, match=r"data\.tokens"):
        datamodules.build({**section, "tokens": 3}, None).setup()


def test_bad_token_files_are_one_sentence(cache: Path) -> None:
    section = {"name": "tokens", "root": str(cache), "train": [{"path": "b.safetensors"}]}
    for tensors, about, message in (
        ({"ids": torch.zeros(2, 2).int()}, {}, "no token file"),
        ({"ids": torch.full((2, 2), 9).int()}, {"vocab_size": "9"}, "9 codes"),
        ({"ids": torch.zeros(2, 2).int()}, {"vocab_size": "9"}, "without a class"),
        ({"ids": torch.zeros(2).int()}, {"vocab_size": "9"}, "shape"),
    ):
        save_file(tensors, cache / "b.safetensors", metadata=about)
        with pytest.raises(ZooError, match=message):
            datamodules.build(section, None).setup()


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"name": "maskgit", "codes": 8, "length": 2}, {}, r"model\.codes"),
        ({"name": "maskgit", "codes": 24, "length": 3}, {}, r"model\.length"),
        ({"name": "maskgit", "codes": 24, "length": 2, "classes": 2}, {}, r"model\.classes"),
        ({"name": "maskgit", "codes": 24, "length": 2}, {"name": "classify"}, "does not go with"),
        ({"name": "titok"}, {}, "MaskGIT or a RAR"),
    ],
)
def test_recipes_that_contradict_themselves(
    model: dict[str, Any], changes: dict[str, Any], message: str, cache: Path
) -> None:
    small = {"vit": {**VIT, "prenorm": False}} if model["name"] == "maskgit" else TITOK
    plan = {
        "name": "x", "model": {**model, **small}, "task": {"name": "token_generation", **changes},
        "data": {"name": "tokens", "root": str(cache), "train": [{"path": "a.safetensors"}]},
        "trainer": {"max_steps": 1},
    }  # fmt: skip
    with pytest.raises(ZooError, match=message):
        assemble(validate(plan))


def test_sizes_and_tasks_must_agree() -> None:
    pytest.importorskip("sklearn")
    plan: dict[str, Any] = {
        "name": "x", "model": {"name": "titok", **TITOK}, "trainer": {"max_steps": 1},
        "task": {"name": "image_reconstruction", "perceptual_weight": 0.0},
        "data": {"name": "images", "builtin": "digits", "preprocess": {"size": 24}},
    }  # fmt: skip
    with pytest.raises(ZooError, match="takes pictures of 16 pixels"):
        assemble(validate(plan))
    with pytest.raises(ZooError, match="does not go with"):
        assemble(validate({**plan, "task": {"name": "causal_lm"}}))
    vae = {"name": "flextok", "vae": {}, "preprocess": {"size": 24}}
    with pytest.raises(ZooError, match=r"task\.vae"):
        assemble(validate({**plan, "model": vae, "task": {"name": "flow_matching"}}))
