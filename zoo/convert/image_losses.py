"""TiTok's discriminator, LPIPS and the evaluator's arithmetic: official state dicts <-> ours, and their replays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, check_round_trip
from zoo.models.discriminator import (
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    generator_loss,
    hinge_loss,
    lecam_loss,
)
from zoo.nn.codebook import codebook_usage
from zoo.nn.image_metrics import fid, inception_score
from zoo.nn.perceptual import LPIPS, lpips_names

DISCRIMINATOR = Renames([("block_in.*", "conv_in.*"), ("blocks.*", "stages.*"), ("to_logits.*", "head.*")])
LPIPS_KEYS = Renames(
    [
        ("scaling_layer.shift", "shift"),
        ("scaling_layer.scale", "scale"),
        *((f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in lpips_names() for leaf in ("weight", "bias")),
    ]
)


def config_from_official(official: dict[str, Any]) -> PatchDiscriminatorConfig:
    """From the arguments of NLayerDiscriminator."""
    return PatchDiscriminatorConfig(
        channels=official.get("num_channels", 3),
        hidden=official["hidden_channels"],
        stages=official["num_stages"],
        blur=official.get("blur_kernel_size", 4),
    )


def to_zoo(state: State, config: PatchDiscriminatorConfig) -> dict[str, Tensor]:
    """Official discriminator -> ours."""
    return DISCRIMINATOR.to_zoo(state)


def to_official(state: State, config: PatchDiscriminatorConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    return DISCRIMINATOR.to_official(state)


@torch.no_grad()
def replay_discriminator(case: Case) -> dict[str, Tensor]:
    """Logits of real and fake pictures, the stages of the real ones (large maps with stride 4), and the losses."""
    config = config_from_official(case.config)
    model = PatchDiscriminator(config).eval()
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model.load_state_dict(state)
    stages = {"block_in": model.conv_in} | {f"block{i}": stage for i, stage in enumerate(model.stages)}
    fake = model(case.inputs["fake"])
    with Capture(stages) as seen:
        real = model(case.inputs["real"])
    out = seen.all()
    for name in ("block_in", "block0"):
        out[name] = out[name][..., ::4, ::4]
    ema_real, ema_fake = case.inputs["ema_real_logits_mean"], case.inputs["ema_fake_logits_mean"]
    return out | {
        "logits_real": real,
        "logits_fake": fake,
        "hinge_d_loss": hinge_loss(real, fake),
        "generator_loss": generator_loss(fake),
        "lecam_loss": lecam_loss(real.mean(), fake.mean(), ema_real, ema_fake),
    }


@torch.no_grad()
def replay_lpips(case: Case) -> dict[str, Tensor]:
    """The distance of a and b, and the first 8 channels of a's five feature maps at stride 2."""
    model = LPIPS().eval()
    state = LPIPS_KEYS.to_zoo(case.state)
    check_round_trip(case.state, LPIPS_KEYS.to_official(state))
    model.load_state_dict(state)
    distance = model(case.inputs["a"], case.inputs["b"])
    maps = model.features(((case.inputs["a"] * 2 - 1) - model.shift) / model.scale)
    return {f"feat{i}": x[:, :8, ::2, ::2] for i, x in enumerate(maps)} | {"lpips": distance}


def replay_rfid(case: Case) -> dict[str, Tensor]:
    """FID, IS and codebook statistics from given features, logits and ids."""
    inputs = case.inputs
    usage = codebook_usage(inputs["codebook_indices"], case.config["num_codebook_entries"])
    values = {
        "rFID": fid(inputs["features_real"], inputs["features_fake"]),
        "InceptionScore": inception_score(inputs["logits_fake"]),
        "CodebookUsage": usage["usage"],
        "CodebookEntropy_bits": usage["entropy"],
    }
    return {name: torch.tensor(value) for name, value in values.items()}
