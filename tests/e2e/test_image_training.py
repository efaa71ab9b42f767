"""Every training of pictures, stopped and resumed, ends with the weights of the unbroken run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from zoo.hub import artifact
from zoo.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from zoo.nn.conv2d import ConvStackConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.vq import VectorQuantizerConfig
from zoo.train import checkpoint_io
from zoo.train.recipe import validate
from zoo.train.run import train

VIT = {"width": 16, "layers": 1, "heads": 2, "mlp": {"kind": "gelu", "width": 32}}
FLEX = {**VIT, "mlp": {"kind": "swiglu", "width": 24, "bias": False}, "qkv_bias": "none", "out_bias": False}
SHAPE = {"encoder": VIT, "decoder": VIT, "encoder_patch": 8, "decoder_patch": 8, "latents": 2}
TITOK = {"name": "titok", **SHAPE, "preprocess": {"size": 16}, "init": "scaled"}
CVQ = {"size": 16, "dim": 4, "update": "cvq", "anchor": "random"}
PLAIN = {"name": "image_reconstruction", "perceptual_weight": 0.0, "optim": {"lr": 1e-2}}
GAN = {
    "start_step": 3, "adaptive": True, "optim": {"lr": 1e-2},
    "discriminator": {"hidden": 32, "stages": 1, "patches": 4},
}  # fmt: skip
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "titok": ({**TITOK, "quantizer": CVQ}, PLAIN, {"ema": 0.9}),
    "titok_gan": ({**TITOK, "quantizer": CVQ}, {**PLAIN, "adversarial": GAN}, {"accumulate": 2, "grad_clip": 0.5}),
    "flextok": (
        {
            "name": "flextok", "pixel_space": True, "prediction": "clean", "channels": 3, "latent_size": 16, "patch": 8,
            "registers": 2, "fsq": {"levels": [4, 4]}, "encoder": FLEX,
            "decoder": {**FLEX, "adaln": True, "adaln_groups": 2}, "preprocess": {"size": 16},
        },
        {"name": "flow_matching", "psnr_tokens": [1, 2], "optim": {"lr": 1e-2}},
        {},
    ),
    "maskgit": (
        {"name": "maskgit", "codes": 8, "classes": 2, "length": 4, "vit": {**VIT, "prenorm": False}},
        {"name": "token_generation", "optim": {"lr": 1e-2}},
        {},
    ),
    "rar": (
        {"name": "rar", "codes": 8, "classes": 2, "length": 4, "vit": {**VIT, "qk_norm": "affine", "adaln": True}},
        {"name": "token_generation", "random_until": 2, "raster_from": 6, "optim": {"lr": 1e-2}},
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of pictures of two classes, and a token file."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 4)):
        for name in ("dark", "light"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                low = 0 if name == "dark" else 128
                pixels = draw.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
        ids = torch.from_numpy(draw.integers(0, 8, (18, 2, 4))).int()
        labels = torch.arange(18) % 2
        save_file({"ids": ids, "labels": labels}, root / f"{split}.safetensors", metadata={"vocab_size": "8"})
    return root


def recipe(place: Path, kind: str, model: Any, task: Any, trainer: Any, **more: Any) -> Any:
    data: dict[str, Any] = {"name": "images", "root": str(place), "preprocess": {"size": 16}, "batch_size": 4}
    data |= {"train": {"path": "train"}, "val": {"path": "val"}, "augment": {"flip": True, "shift": 2}}
    if task["name"] == "token_generation":
        files = {split: [{"path": f"{split}.safetensors"}] for split in ("train", "val")}
        data = {"name": "tokens", "root": str(place), "batch_size": 4, **files}
    loop = {"max_steps": 8, "checkpoint_every": 2, "val_every": 4, "log_every": 1, "accelerator": "cpu", "threads": 1}
    return validate(
        {"name": kind, "seed": 5, "model": model, "data": data, "task": task, "trainer": {**loop, **trainer}, **more}
    )


class Stopped(Exception):
    """Stands for the power cut."""


@pytest.mark.parametrize("kind", sorted(RUNS))
def test_stopped_and_resumed_is_unbroken(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(place, kind, *RUNS[kind])
    straight = train(plan, tmp_path / "straight")
    seen = 0
    guard = "zoo.train.callbacks.NonFiniteGuard.on_train_batch_start"

    def cut(*_: Any, **__: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 5 * plan.trainer.accumulate:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(guard, cut)
        with pytest.raises(Stopped):
            train(plan, tmp_path / "cut")
    resumed = train(plan, tmp_path / "cut", resume=True)

    assert straight.steps == resumed.steps == 8
    assert straight.metrics == resumed.metrics
    states = [checkpoint_io.load(r.dir / "checkpoints" / "step-000000008.ckpt") for r in (straight, resumed)]
    for section in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(*(state[section] for state in states)), section
    assert artifact.load(resumed.artifact).info["model"] == plan.model["name"]
    assert all(check.passed for check in artifact.verify(resumed.artifact))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_steps_count_the_tokenizer_alone_and_the_discriminator_starts_late(place: Path, tmp_path: Path) -> None:
    plan = recipe(place, "gan", *RUNS["titok_gan"])
    result = train(plan, tmp_path / "run")
    state = checkpoint_io.load(result.dir / "checkpoints" / "step-000000008.ckpt")
    assert state["global_step"] == 8
    first, second = ({int(s["step"]) for s in optimizer["state"].values()} for optimizer in state["optimizer_states"])
    assert first == {8}
    assert second == {5}
    assert [schedule["last_epoch"] for schedule in state["lr_schedulers"]] == [8, 5]


def test_both_stages_of_titok(place: Path, tmp_path: Path) -> None:
    stack = ConvStackConfig(widths=(32, 32), blocks=1, decoder_blocks=1, z_channels=4, bias=False, shortcut="output")
    quantizer = VectorQuantizerConfig(size=16, dim=4)
    torch.manual_seed(1)
    vqgan = MaskGITVQGAN(MaskGITVQGANConfig(stack=stack, quantizer=quantizer, preprocess=PreprocessConfig(size=16)))
    teacher = str(artifact.save(vqgan.eval(), tmp_path / "vqgan"))
    proxy = {**TITOK, "encoder_patch": 2, "decoder_patch": 2, "target": "proxy", "proxy_codes": 16, "quantizer": CVQ}
    task = {"name": "proxy_codes", "vqgan": teacher, "optim": {"lr": 1e-2}}
    first = train(recipe(place, "stage1", proxy, task, {}), tmp_path / "one")
    assert 0 <= first.metrics["val/accuracy"] <= 1

    from zoo.config import to_dict

    second_model = {**proxy, "pixel_decoder": to_dict(stack)}
    tune = {**PLAIN, "freeze_encoder": True, "vqgan": teacher, "adversarial": {**GAN, "adaptive": False}}
    plan = recipe(place, "stage2", second_model, tune, {}, init=str(first.artifact))
    second = train(plan, tmp_path / "two")
    before, after = artifact.load(first.artifact).model, artifact.load(second.artifact).model
    for name, tensor in before.state_dict().items():
        if name.startswith(("encoder.", "quantizer.")):
            assert torch.equal(tensor, after.state_dict()[name]), name
    assert not torch.equal(after.state_dict()["pixel_codebook.weight"], vqgan.quantizer.embedding.weight)
    moved = [
        n for n, t in vqgan.decoder.state_dict().items() if not torch.equal(t, after.pixel_decoder.state_dict()[n])
    ]  # type: ignore[union-attr]
    assert moved
    assert "val/psnr" in second.metrics
