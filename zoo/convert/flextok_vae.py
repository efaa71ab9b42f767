"""FlexTok's VAE as diffusers stores an AutoencoderKL <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, fuse, split
from zoo.errors import ZooError
from zoo.models.flextok_vae import FlexTokVAE, FlexTokVAEConfig
from zoo.nn.conv2d import ConvStackConfig

_BLOCK = [("conv_shortcut.*", "shortcut.*"), ("*", "*")]
_ATTENTION = [("group_norm.*", "norm.*"), ("to_out.0.*", "out_proj.*"), ("to_{}.*", "{}.*")]
_SIDE = [
    *below("mid_block.attentions.0.", "mid.1.", _ATTENTION),
    *below("mid_block.resnets.0.", "mid.0.", _BLOCK),
    *below("mid_block.resnets.1.", "mid.2.", _BLOCK),
    ("conv_in.*", "conv_in.*"),
    ("conv_norm_out.*", "norm_out.*"),
    ("conv_out.*", "conv_out.*"),
]
RENAMES = Renames(
    [
        *below("encoder.down_blocks.{}.resnets.{}.", "encoder.levels.{}.blocks.{}.", _BLOCK),
        ("encoder.down_blocks.{}.downsamplers.0.conv.*", "encoder.levels.{}.down.*"),
        *below("encoder.", "encoder.", _SIDE),
        *below("decoder.up_blocks.{}.resnets.{}.", "decoder.levels.{}.blocks.{}.", _BLOCK),
        ("decoder.up_blocks.{}.upsamplers.0.conv.*", "decoder.levels.{}.up.*"),
        *below("decoder.", "decoder.", _SIDE),
        ("quant_conv.*", "quant_conv.*"),
        ("post_quant_conv.*", "post_quant_conv.*"),
    ]
)
_USED = {
    "act_fn", "block_out_channels", "down_block_types", "in_channels", "latent_channels", "layers_per_block",
    "norm_num_groups", "out_channels", "scaling_factor", "up_block_types",
}  # fmt: skip


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of an AutoencoderKL."""
    return "quant_conv.weight" in state and "encoder.down_blocks.0.resnets.0.norm1.weight" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "block_out_channels" in config


def config_from_official(official: dict[str, Any]) -> FlexTokVAEConfig:
    """From a diffusers AutoencoderKL config.

    Raises:
        ZooError: block types, an activation or channels that this family does not have.
    """
    widths = tuple(official["block_out_channels"])
    kinds = set(official.get("down_block_types", ())) | set(official.get("up_block_types", ()))
    odd = kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    if odd or official.get("act_fn", "silu") != "silu" or official["in_channels"] != official["out_channels"]:
        raise ZooError(
            f"an AutoencoderKL of plain residual blocks with SiLU is expected, got {sorted(odd) or official}"
        )
    blocks = official["layers_per_block"]
    return FlexTokVAEConfig(
        stack=ConvStackConfig(
            channels=official["in_channels"], widths=widths, blocks=blocks, decoder_blocks=blocks + 1,
            z_channels=official["latent_channels"], groups=official["norm_num_groups"], mid_attention=True,
        ),
        scaling_factor=official.get("scaling_factor"),
        official={key: value for key, value in official.items() if key not in _USED},
    )  # fmt: skip


def config_to_official(config: FlexTokVAEConfig) -> dict[str, Any]:
    """The inverse of `config_from_official`."""
    stack = config.stack
    return config.official | {
        "act_fn": "silu", "block_out_channels": list(stack.widths), "in_channels": stack.channels,
        "out_channels": stack.channels, "latent_channels": stack.z_channels, "layers_per_block": stack.blocks,
        "norm_num_groups": stack.groups, "scaling_factor": config.scaling_factor,
        "down_block_types": ["DownEncoderBlock2D"] * len(stack.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(stack.widths),
    }  # fmt: skip


def to_zoo(state: State, config: FlexTokVAEConfig) -> dict[str, Tensor]:
    """Official state dict -> ours: q, k and v of the attention become one matrix."""
    out = RENAMES.to_zoo(state)
    for side in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            fuse(out, [f"{side}.mid.1.{part}.{kind}" for part in "qkv"], f"{side}.mid.1.qkv.{kind}")
    return out


def to_official(state: State, config: FlexTokVAEConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    for side in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            split(out, f"{side}.mid.1.qkv.{kind}", [f"{side}.mid.1.{part}.{kind}" for part in "qkv"])
    return RENAMES.to_official(out)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """The posterior of the (already normalised) pixel_values and the reconstruction of its unscaled mean."""
    config = config_from_official(case.config)
    model = FlexTokVAE(config).eval()
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model.load_state_dict(state)
    stages: dict[str, Any] = {"enc.mid": model.encoder.mid, "dec.mid": model.decoder.mid}
    for side, part in (("enc", model.encoder), ("dec", model.decoder)):
        stages |= {f"{side}.conv_in": part.conv_in, f"{side}.conv_out": part.conv_out}
        stages |= {f"{side}.{'down' if side == 'enc' else 'up'}{i}": level for i, level in enumerate(part.levels)}
    with Capture(stages) as seen:
        posterior = model.posterior(case.inputs["pixel_values"])
        recon = model.reconstruct(posterior.mode())
    moments = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std, "kl": posterior.kl()}
    return seen.all() | moments | {"recon": recon}
