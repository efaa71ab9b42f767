"""VideoGPT's VQ-VAE (wilson1yan/VideoGPT) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, fuse, split
from zoo.models.videogpt import VideoGPT, VideoGPTConfig
from zoo.nn.vq import VectorQuantizerConfig

_AXES = ("w", "h", "t")
_BLOCK = [
    ("0.*", "norm1.*"),
    ("2.*", "conv1.*"),
    ("3.*", "norm2.*"),
    ("5.*", "conv2.*"),
    ("6.*", "norm3.*"),
    *[(f"8.attn_{a}.fc.*", f"along_{a}.out_proj.*") for a in _AXES],
    *[(f"8.attn_{a}.w_{n}s.weight", f"along_{a}.{n}.weight") for a in _AXES for n in "qkv"],
]


def _renames(config: VideoGPTConfig) -> Renames:
    pairs = [("encoder.convs.{}.*", "down.{}.*"), ("encoder.conv_last.*", "down_last.*")]
    for side in ("encoder", "decoder"):
        pairs += below(f"{side}.res_stack.{{}}.block.", f"{side}.blocks.{{}}.", _BLOCK)
        pairs.append((f"{side}.res_stack.{config.layers}.*", f"{side}.norm.*"))
    pairs += [
        ("decoder.convts.{}.*", "up.{}.*"),
        ("pre_vq_conv.*", "pre.*"),
        ("post_vq_conv.*", "post.*"),
        ("codebook.embeddings", "quantizer.embedding.weight"),
        ("codebook.N", "quantizer.cluster_size"),
        ("codebook.z_avg", "quantizer.embed_sum"),
    ]
    return Renames(pairs)


def config_from_official(official: dict[str, Any]) -> VideoGPTConfig:
    """From the official hyper-parameters."""
    t, h, w = official["downsample"]
    return VideoGPTConfig(
        width=official["n_hiddens"],
        layers=official["n_res_layers"],
        downsample=(t, h, w),
        quantizer=VectorQuantizerConfig(size=official["n_codes"], dim=official["embedding_dim"], update="ema"),
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of VideoGPT's tokenizer."""
    return "codebook.z_avg" in state and "encoder.convs.0.conv.weight" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "n_res_layers" in config and "downsample" in config


def to_zoo(state: State, config: VideoGPTConfig) -> dict[str, Tensor]:
    """Official state dict -> ours."""
    out = _renames(config).to_zoo(state)
    for prefix in _attentions(config):
        fuse(out, [f"{prefix}.{name}.weight" for name in "qkv"], f"{prefix}.qkv.weight")
    return out


def to_official(state: State, config: VideoGPTConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    for prefix in _attentions(config):
        split(out, f"{prefix}.qkv.weight", [f"{prefix}.{name}.weight" for name in "qkv"])
    return _renames(config).to_official(out)


def _attentions(config: VideoGPTConfig) -> list[str]:
    return [
        f"{side}.blocks.{i}.along_{a}" for side in ("encoder", "decoder") for i in range(config.layers) for a in _AXES
    ]


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Encode, quantize and decode with every stage that a case can name."""
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config))
    model = VideoGPT(config).eval()
    model.load_state_dict(state)
    x = case.inputs["x"]
    stages: dict[str, nn.Module] = {"enc.conv_last": model.down_last, "enc.out": model.encoder, "pre_vq": model.pre}
    stages |= {f"enc.conv{i}": conv for i, conv in enumerate(model.down)}
    stages |= {f"enc.res{i}": block for i, block in enumerate(model.encoder.blocks)}
    with Capture(stages) as seen:
        z = model.to_latent(x)
    out = seen.all()
    out |= {name: F.relu(out[name])[:, :4] for name in out if name.startswith("enc.conv") and name != "enc.conv_last"}
    result = model.quantizer(z.movedim(1, -1))
    recon = model.from_codes(result.codes.movedim(-1, 1))
    usage = torch.bincount(result.ids.flatten(), minlength=config.quantizer.size).float() / result.ids.numel()
    return out | {
        "ids": result.ids,
        "commitment_loss": result.parts["commitment_loss"],
        "embeddings": model.quantizer.lookup(result.ids).movedim(-1, 1),
        "perplexity": torch.exp(-(usage * torch.log(usage + 1e-10)).sum()),
        "recon": recon,
        "recon_loss": F.mse_loss(recon, x) / 0.06,  # the variance of the official training pixels
    }
