"""MaskGIT-VQGAN as 1d-tokenizer stores it (`PretrainedTokenizer`: encoder., decoder., quantize.) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers
from zoo.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig, maskgit_stack
from zoo.nn.conv2d import ConvStackConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.vq import VectorQuantizerConfig

_BLOCK = [("nin_shortcut.*", "shortcut.*"), ("*", "*")]
_ENDS = [("conv_in.*", "conv_in.*"), ("norm_out.*", "norm_out.*"), ("conv_out.*", "conv_out.*")]
ENCODER = [
    *below("down.{}.block.{}.", "levels.{}.blocks.{}.", _BLOCK),
    *below("mid.{}.", "mid.{}.", _BLOCK),
    *_ENDS,
]


def decoder_pairs(levels: int) -> list[tuple[str, str]]:
    """Templates of the decoder; official levels count from the finest, ours in the order they run."""
    pairs = below("mid.{}.", "mid.{}.", _BLOCK)
    for i in range(levels):
        ours = f"levels.{levels - 1 - i}."
        pairs += below(f"up.{i}.block.{{}}.", ours + "blocks.{}.", _BLOCK)
        pairs.append((f"up.{i}.upsample_conv.*", ours + "up.*"))
    return [*pairs, *_ENDS]


def _renames(config: MaskGITVQGANConfig) -> Renames:
    return Renames(
        [
            *below("encoder.", "encoder.", ENCODER),
            *below("decoder.", "decoder.", decoder_pairs(len(config.stack.widths))),
            ("quantize.embedding.weight", "quantizer.embedding.weight"),
        ]
    )


def config_from_official(official: dict[str, Any]) -> MaskGITVQGANConfig:
    """From the constructor arguments of the official encoder, decoder and quantizer in one dict."""
    z = official["z_channels"]
    return MaskGITVQGANConfig(
        stack=maskgit_stack(
            official["hidden_channels"],
            tuple(official["channel_mult"]),
            official["num_res_blocks"],
            z,
            official["num_channels"],
        ),
        quantizer=VectorQuantizerConfig(
            size=official.get("num_embeddings", 1024),
            dim=z,
            commitment=1.0,
            codebook=official.get("commitment_cost", 0.25),
        ),
        preprocess=PreprocessConfig(size=official["resolution"]),
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of a MaskGIT-VQGAN."""
    return "encoder.down.0.block.0.conv1.weight" in state and "quantize.embedding.weight" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "channel_mult" in config


def stack_from_state(state: State, prefix: str = "decoder.") -> ConvStackConfig:
    """The convolution stack as the shapes of a decoder tell it."""
    levels = count_layers(state, f"{prefix}up.")
    widths = [len(state[f"{prefix}up.{i}.block.0.conv1.weight"]) for i in range(levels)]
    hidden = widths[0]
    return maskgit_stack(
        hidden, tuple(width // hidden for width in widths), count_layers(state, f"{prefix}up.0.block."),
        state[f"{prefix}conv_in.weight"].shape[1], len(state[f"{prefix}conv_out.weight"]),
    )  # fmt: skip


def config_from_state(state: State) -> MaskGITVQGANConfig:
    """The config as the shapes of a `.bin` file tell it, for 256-pixel pictures."""
    codes, dim = state["quantize.embedding.weight"].shape
    return MaskGITVQGANConfig(
        stack=stack_from_state(state),
        quantizer=VectorQuantizerConfig(size=codes, dim=dim, commitment=1.0, codebook=0.25),
    )


def to_zoo(state: State, config: MaskGITVQGANConfig) -> dict[str, Tensor]:
    """Official state dict -> ours; every key must be known."""
    return _renames(config).to_zoo(state)


def to_official(state: State, config: MaskGITVQGANConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    return _renames(config).to_official(state)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Encode, quantize and decode with every stage that a case can name."""
    config = config_from_official(case.config)
    model = MaskGITVQGAN(config).eval()
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model.load_state_dict(state)
    pixels = case.inputs["pixel_values"]
    stages = {"z": model.encoder, "recon_unclamped": model.decoder}
    for side, part in (("enc", model.encoder), ("dec", model.decoder)):
        stages |= {f"{side}.conv_in": part.conv_in, f"{side}.mid_last": part.mid}
        stages |= {f"{side}.mid{i}": block for i, block in enumerate(part.mid)}
    levels = len(config.stack.widths)
    stages |= {f"enc.down{i}": level for i, level in enumerate(model.encoder.levels)}
    stages |= {f"dec.up{levels - 1 - i}": level for i, level in enumerate(model.decoder.levels)}
    stages |= {"enc.down_last": model.encoder.levels[-1], "dec.up_last_level": model.decoder.levels[0]}
    with Capture(stages) as seen:
        result = model(pixels)
    factor = model.factor
    grid = (pixels.shape[2] // factor, pixels.shape[3] // factor)
    out = seen.all() | {"codes": model.encode(pixels), "quant_loss": result.loss}
    out["quant"] = model.quantizer.lookup(result.ids).unflatten(1, grid).movedim(-1, 1)
    out["recon"] = model.decode(result.ids, grid).clamp(0, 1)
    for name in case.outputs:
        if name.startswith("soft_code_temp"):
            out[name] = model.soft_codes(pixels, float(name.removeprefix("soft_code_temp")))
    return out
