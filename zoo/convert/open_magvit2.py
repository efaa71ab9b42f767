"""Open-MAGVIT2's video tokenizer (TencentARC/SEED-Voken, video_128_262144.ckpt) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip
from zoo.errors import ZooError
from zoo.models.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from zoo.nn.lfq import LFQConfig

EMA = "model_ema."
_CONV = "conv_1.*"
_BLOCK = [
    ("norm1.*", "norm1.*"),
    ("norm2.*", "norm2.*"),
    ("conv1.conv_1.*", "conv1.conv.*"),
    ("conv2.conv_1.*", "conv2.conv.*"),
    ("nin_shortcut.conv_1.*", "shortcut.conv.*"),
]


def _side(side: str, stages: str, resample: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        *[
            (f"{side}.{theirs}.conv_1.*", f"{side}.{ours}.conv.*")
            for theirs, ours in (("conv_in", "start"), ("conv_out", "end"))
        ],
        *below(f"{side}.{stages}.{{}}.block.{{}}.", f"{side}.stages.{{}}.blocks.{{}}.", _BLOCK),
        *below(f"{side}.{stages}.{{}}.", f"{side}.stages.{{}}.", resample),
        *below(f"{side}.mid_block.{{}}.", f"{side}.middle.blocks.{{}}.", _BLOCK),
        (f"{side}.norm_out.*", f"{side}.norm.*"),
    ]


RENAMES = Renames(
    [
        *_side("encoder", "down", [("downsample.conv_1.*", "resample.conv.*")]),
        *_side("decoder", "up", [("upsample.conv1.conv_1.*", "resample.conv.conv.*")]),
        ("decoder.adaptive.{}.gamma.*", "decoder.adaptive.{}.gain.*"),
        ("decoder.adaptive.{}.beta.*", "decoder.adaptive.{}.shift.*"),
    ]
)


def config_from_official(official: dict[str, Any]) -> OpenMAGVIT2Config:
    """From the official arguments.

    Raises:
        ZooError: channels that are not colours, or a codebook that the latent has not the bits for.
    """
    inner = official["ddconfig"]
    if inner["in_channels"] != 3 or inner["out_ch"] != 3:
        raise ZooError(f"Open-MAGVIT2 codes clips of 3 channels, the config says {inner['in_channels']}")
    if official["n_embed"] != 2 ** official["embed_dim"] or official["embed_dim"] != inner["z_channels"]:
        raise ZooError(f"{official['n_embed']} codes do not go with {inner['z_channels']} channels of one bit")
    return OpenMAGVIT2Config(
        width=inner["ch"],
        mults=tuple(inner["ch_mult"]),
        blocks=inner["num_res_blocks"],
        quantizer=LFQConfig(dim=official["embed_dim"]),
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of Open-MAGVIT2's video tokenizer."""
    return "encoder.conv_in.conv_1.weight" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "ddconfig" in config and "n_embed" in config


def averaged(state: State) -> dict[str, Tensor]:
    """The moving average of the weights, which the authors evaluate, where a file holds one; else its weights.

    The average is stored under `model_ema.` and the names without their dots.
    """
    plain = {key: value for key, value in state.items() if not key.startswith(EMA)}
    return {key: state.get(EMA + key.replace(".", ""), value) for key, value in plain.items()}


def to_zoo(state: State, config: OpenMAGVIT2Config) -> dict[str, Tensor]:
    """Official state dict -> ours; of a file with a moving average that one is taken."""
    return RENAMES.to_zoo(averaged(state))


def to_official(state: State, config: OpenMAGVIT2Config) -> dict[str, Tensor]:
    """The inverse of `to_zoo`, without a moving average."""
    return RENAMES.to_official(state)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Encode, quantize and decode with every stage that a case can name."""
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = OpenMAGVIT2(config).eval()
    model.load_state_dict(state)
    encoder, decoder = model.encoder, model.decoder
    stages: dict[str, nn.Module] = {"enc.conv_in": encoder.start, "dec.conv_in": decoder.start}
    stages["dec.adaptive_first"] = decoder.adaptive[-1]
    for i, stage in enumerate(encoder.stages):
        blocks: Any = stage.blocks
        stages |= {f"enc.down{i}.block{j}": block for j, block in enumerate(blocks)}
    with Capture(stages) as seen:
        z = encoder(case.inputs["x"])
        result = model.quantizer(z.movedim(1, -1))
        quant = model.quantizer.lookup(result.ids).movedim(-1, 1)
        recon = decoder(quant)
    out = {f"{name}_ch0_3": value[:, :4] for name, value in seen.all().items()}
    flat = result.ids.reshape(len(z), -1)
    return out | {
        "z": z,
        "ids": result.ids.flatten(),
        "quant": quant,
        "recon": recon,
        "codes_from_ids": model.quantizer.lookup(flat),
    }
