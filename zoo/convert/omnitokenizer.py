"""OmniTokenizer (FoundationVision/OmniTokenizer, imagenet_k600.ckpt and its siblings) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip
from zoo.errors import ZooError
from zoo.models.omnitokenizer import OmniTokenizer, OmniTokenizerConfig
from zoo.nn.omni import window_places
from zoo.nn.vae_bottleneck import DiagonalGaussian
from zoo.nn.vq import VectorQuantizerConfig

TRAINING = ("image_discriminator.", "video_discriminator.", "perceptual_model.")  # beside the tokenizer in its files
_PLACES = ".relative_position_index"

_BIAS = (("0.0", 0), ("1.0", 1), ("2", 2))
_BLOCK = [
    ("0.dsconv.*", "position.conv.*"),
    *[(f"1.{n}.gamma", f"attention.{n}.weight") for n in ("norm", "context_norm")],
    *[(f"1.{n}.beta", f"attention.{n}.bias") for n in ("norm", "context_norm")],
    ("1.q_scale", "attention.q_scale"),
    ("1.k_scale", "attention.k_scale"),
    ("1.to_q.weight", "attention.q.weight"),
    ("1.to_kv.weight", "attention.kv.weight"),
    ("1.to_out.weight", "attention.out_proj.weight"),
    ("1.qkv.weight", "attention.qkv.weight"),
    ("1.proj.*", "attention.proj.*"),
    ("1.relative_position_bias_table", "attention.table"),
    *[(f"1.spatial_rel_pos_bias.net.{a}.*", f"attention.stored_bias.net.{b}.*") for a, b in _BIAS],
    ("3.0.*", "mlp.norm.*"),
    ("3.1.weight", "mlp.up.weight"),
    ("3.4.weight", "mlp.down.weight"),
]


def _renames() -> Renames:
    pairs: list[tuple[str, str]] = []
    for short, side in (("enc", "encoder"), ("dec", "decoder")):
        for kind in ("spatial", "temporal"):
            theirs, ours = f"{side}.{short}_{kind}_transformer.", f"{side}.{kind}."
            pairs += below(theirs + "layers.{}.", ours + "blocks.{}.", _BLOCK)
            pairs += [(theirs + "norm_out.gamma", ours + "norm.weight"), (theirs + "norm_out.beta", ours + "norm.bias")]
    for theirs, ours in (("to_patch_emb_first_frame", "first"), ("to_patch_emb", "rest")):
        pairs += [(f"encoder.{theirs}.{i + 1}.*", f"encoder.{ours}.{i}.*") for i in range(3)]
    return Renames(
        [
            *pairs,
            ("decoder.to_pixels_first_frame.0.*", "decoder.first.*"),
            ("decoder.to_pixels.0.*", "decoder.rest.*"),
            ("codebook.embeddings", "quantizer.embedding.weight"),
            ("codebook.N", "quantizer.cluster_size"),
            ("codebook.z_avg", "quantizer.embed_sum"),
            ("codebook.codebook_usage", "usage"),
            ("pre_vq_conv.1.*", "pre.*"),
            ("post_vq_conv.1.*", "post.*"),
        ]
    )


RENAMES = _renames()


def config_from_official(official: dict[str, Any]) -> OmniTokenizerConfig:
    """From the official hyper-parameters, in either spelling of `causal`.

    Raises:
        ZooError: an option that no released tokenizer uses.
    """
    for name, value in (("patch_embed", "linear"), ("gen_upscale", None)):
        if official.get(name, value) != value:
            raise ZooError(f"OmniTokenizer with {name}={official[name]!r} is not covered, only {value!r}")
    for name in ("defer_temporal_pool", "defer_spatial_pool"):
        if official.get(name):
            raise ZooError(f"OmniTokenizer with {name} is not covered")

    def causal(name: str) -> bool:
        return bool(official.get(f"causal_in_{name}", official.get(f"casual_in_{name}", False)))

    side = official["patch_size"]
    return OmniTokenizerConfig(
        width=official["embedding_dim"],
        heads=official["heads"],
        head_dim=official["dim_head"],
        patch=(official["temporal_patch_size"], side, side),
        encoder=official["enc_block"],
        decoder=official["dec_block"],
        temporal=official["temporal_depth"],
        window=official["twod_window_size"],
        position="rotary" if official["spatial_pos"] == "rope" else "stored",
        mlp_mult=float(official["ff_mult"]),
        causal=causal("temporal_transformer"),
        causal_position=causal("peg"),
        quantizer=VectorQuantizerConfig(
            size=official["n_codes"], dim=official["codebook_dim"] or official["embedding_dim"], update="ema"
        ),
        vae=bool(official.get("use_vae")),
        unit_latent=bool(official.get("l2_code")),
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of an OmniTokenizer."""
    return "encoder.to_patch_emb_first_frame.2.weight" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "enc_block" in config and "temporal_patch_size" in config


def training_state(state: State) -> dict[str, Tensor]:
    """The discriminators and the perceptual network that the official files hold beside the tokenizer."""
    return {key: value for key, value in state.items() if key.startswith(TRAINING)}


def to_zoo(state: State, config: OmniTokenizerConfig) -> dict[str, Tensor]:
    """Official state dict -> ours, without `training_state`.

    Raises:
        ZooError: an unknown key, or a table of window places that is not the one the config makes.
    """
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_PLACES):
            same = value.shape == (config.window**2, config.window**2)
            if not same or (value.device.type != "meta" and not torch.equal(value, window_places(config.window))):
                raise ZooError(f"'{key}' is no table of the places in a window of {config.window}")
        elif not key.startswith(TRAINING):
            kept[key] = value
    return RENAMES.to_zoo(kept)


def to_official(state: State, config: OmniTokenizerConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = RENAMES.to_official(state)
    places = window_places(config.window)
    for key in [key for key in out if key.endswith(".relative_position_bias_table")]:
        out[key.removesuffix(".relative_position_bias_table") + _PLACES] = places.to(out[key].device)
    return out


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Encode, quantize (or take the mean) and decode, with every stage that a case names; pictures as clips of one."""
    config = config_from_official(case.config)
    official = {  # a case fills no integers
        key: window_places(config.window) if key.endswith(_PLACES) else value for key, value in case.state.items()
    }
    state = to_zoo(official, config)
    check_round_trip(official, to_official(state, config) | training_state(official))
    model = OmniTokenizer(config).eval()
    model.load_state_dict(state)
    x = case.inputs["x"]
    picture = x.ndim == 4
    x = x[:, :, None] if picture else x
    encoder, decoder = model.encoder, model.decoder
    stages: dict[str, nn.Module] = {"enc.first_frame_embed": encoder.first, "enc.rest_embed": encoder.rest}
    stacks = {
        f"{short}.{kind}": getattr(side, kind)
        for short, side in (("enc", encoder), ("dec", decoder))
        for kind in ("spatial", "temporal")
    }
    for name, stack in stacks.items():
        stages[name] = stack
        last = len(stack.blocks) - 1
        for label, i in [*((str(i), i) for i in range(last + 1)), ("last", last)]:
            block = stack.blocks[i]
            parts = {"peg": block.position, "attn": block.attention, "ff": block.mlp}
            stages |= {f"{name}.{label}.{part}": module for part, module in parts.items() if module is not None}
    with Capture(stages) as seen:
        hidden = encoder(x)
        z = model.pre(hidden)
        front = lambda t: t.movedim(-1, 1)
        out = {"enc.out": front(hidden)}
        if config.vae:
            law = DiagonalGaussian(z, -1)
            per_sample = DiagonalGaussian(front(z), 1).kl()
            out |= {"moments": front(z), "mean": front(law.mean), "kl_per_sample": per_sample}
            out["kl_loss_weight1"] = per_sample.sum() / len(per_sample)
            codes = law.mode()
        else:
            unit = F.normalize(z, dim=-1) if config.unit_latent else z
            result = model.quantizer(unit)
            codes = model.quantizer.lookup(result.ids)
            share = torch.bincount(result.ids.flatten(), minlength=config.quantizer.size) / result.ids.numel()
            out |= {
                "pre_vq": front(z), "pre_vq_l2": front(unit), "ids": result.ids, "embeddings": front(codes),
                "commitment_loss": result.parts["commitment_loss"],
                "perplexity": torch.exp(-(share * torch.log(share + 1e-10)).sum()),
            }  # fmt: skip
        recon = model.from_latent(codes)
    out["recon"] = recon[:, :, 0] if picture else recon
    return out | seen.all()
