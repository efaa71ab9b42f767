"""NBP's video tokenizer (magvit2_ucf.pt, magvit2_k600.pt of RenShuhuai-Andy/NBP) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip
from zoo.models.nbp_tokenizer import NBPTokenizer, NBPTokenizerConfig, ProjectedFSQ
from zoo.nn.conv3d import CausalConv3d, DepthToSpace, FrameGroupNorm, ResidualUnit3d, Swish
from zoo.nn.fsq import FSQConfig

_UNIT = [
    ("fn.0.*", "norm1.*"),
    ("fn.1.*", "act1.*"),
    ("fn.2.*", "conv1.*"),
    ("fn.3.*", "norm2.*"),
    ("fn.4.*", "act2.*"),
    ("fn.5.*", "conv2.*"),
    ("residual_fn.0.*", "shortcut.*"),
]
RENAMES = Renames(
    [
        *below("encoder_layers.{}.", "encoder.{}.", [*_UNIT, ("*", "*")]),
        *below("decoder_layers.{}.", "decoder.{}.", [*_UNIT, ("*", "*")]),
        ("quantizers.*", "quantizer.*"),
    ]
)


def config_from_official(official: dict[str, Any]) -> NBPTokenizerConfig:
    """From the official arguments; widths and units a stage, which the official class fixes, where they are given."""
    levels = tuple(official["fsq_levels"])
    widths = official.get("widths", (128, 256, 512))
    return NBPTokenizerConfig(
        widths=(widths[0], widths[1], widths[2]),
        blocks=official.get("blocks_per_stage", 4),
        embed=official.get("embed_dim", len(levels)),
        fsq=FSQConfig(levels=levels, tan_shift=True, truncate_ids=True),
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of NBP's tokenizer."""
    return any(key.removeprefix("module.").startswith("encoder_layers.0.conv.") for key in state)


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "fsq_levels" in config


def config_from_state(state: State) -> NBPTokenizerConfig:
    """The released files come without a config and are all of one size."""
    return NBPTokenizerConfig()


def to_zoo(state: State, config: NBPTokenizerConfig) -> dict[str, Tensor]:
    """Official state dict -> ours; the files carry a `module.` before each key."""
    return _betas(RENAMES.to_zoo({key.removeprefix("module."): value for key, value in state.items()}), 0)


def to_official(state: State, config: NBPTokenizerConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`, without the `module.`."""
    return RENAMES.to_official(_betas(dict(state), None))


def _betas(state: dict[str, Tensor], index: int | None) -> dict[str, Tensor]:
    """The slopes of Swish have an axis for the batch there."""
    return {key: value[index] if key.endswith("beta") else value for key, value in state.items()}


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """A whole tokenizer, or its blocks one by one (`conv`, `gn`, `res` ... in the config)."""
    if "conv" in case.config:
        return _replay_units(case)
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(
        {key.removeprefix("module."): value for key, value in case.state.items()}, to_official(state, config)
    )
    model = NBPTokenizer(config).eval()
    model.load_state_dict(state)
    clip = case.inputs["video"]
    stages: dict[str, nn.Module] = {f"encoder_layers.{i}": layer for i, layer in enumerate(model.encoder)}
    stages |= {f"decoder_layers.{i}": layer for i, layer in enumerate(model.decoder)}
    with Capture(stages) as seen:
        z = model.encoder(clip)
        result = model.quantizer(z.movedim(1, -1))
        recon = model.decode(result.ids)
    out = {name: value[:, :4] for name, value in seen.all().items()}
    out |= {"z": z, "recon": recon, "ids": model.encode(clip), "codes": result.codes.movedim(-1, 1)}
    out["fsq_bound"] = model.quantizer.fsq.bound(model.quantizer.project_in(z.movedim(1, -1)))
    out["ids_first_frame_only"] = model.encode(clip[:, :, :1])
    return out


def _replay_units(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    inner, outer, kernel = config["conv"]
    projected = config["fsq_proj"]
    options = {"tan_shift": True, "truncate_ids": True}
    units = nn.ModuleDict(
        {
            "conv": CausalConv3d(inner, outer, kernel),
            "down": CausalConv3d(inner, outer, kernel, (2, 2, 2)),
            "sdown": CausalConv3d(inner, outer, kernel, (1, 2, 2)),
            "gn": FrameGroupNorm(*config["gn"]),
            "swish": Swish(config["gn"][1]),
            "res": ResidualUnit3d(*config["res"]),
            "res_up": ResidualUnit3d(*config["res_up"]),
            "fsq": ProjectedFSQ(len(config["fsq_levels"]), FSQConfig(levels=tuple(config["fsq_levels"]), **options)),
            "fsq_proj": ProjectedFSQ(projected["dim"], FSQConfig(levels=tuple(projected["levels"]), **options)),
        }
    )
    names = Renames([*below("{}.", "{}.", [*_UNIT, ("*", "*")])])
    state = _betas(names.to_zoo(case.state), 0)
    check_round_trip(case.state, names.to_official(_betas(dict(state), None)))
    units.load_state_dict(state)
    channels = {inputs[name].shape[1]: inputs[name] for name in ("x32", "x64")}
    x = inputs["x4"]
    out = {name: units[name](x) for name in ("conv", "down", "sdown")}
    out["conv_single_frame"] = units["conv"](inputs["x4_single_frame"])
    wide = channels[config["gn"][1]]
    out |= {"gn": units["gn"](wide), "swish": units["swish"](wide)}
    out |= {name: units[name](channels[config[name][0]]) for name in ("res", "res_up")}
    out |= {
        "d2s_122": DepthToSpace((1, 2, 2))(inputs["x_d2s_122"]),
        "d2s_222": DepthToSpace((2, 2, 2))(inputs["x_d2s_222"]),
    }
    pattern = torch.arange(32, dtype=torch.float32).reshape(1, 16, 2, 1, 1)
    out["d2s_222_pattern"] = DepthToSpace((2, 2, 2))(pattern)
    z = inputs["z_fsq"].movedim(1, -1)
    quantizer: Any = units["fsq"]
    result = quantizer(z)
    out |= {"fsq_ids": result.ids, "fsq_codes": result.codes.movedim(-1, 1), "fsq_bound": quantizer.fsq.bound(z)}
    out["fsq_decode"] = quantizer.lookup(result.ids).movedim(-1, 1)
    out["implicit_codebook_sample"] = quantizer.lookup(torch.arange(quantizer.vocab_size))[::997]
    quantizer = units["fsq_proj"]
    result = quantizer(inputs["z_fsq_proj"].movedim(1, -1))
    out |= {"fsq_proj_ids": result.ids, "fsq_proj_out": result.codes.movedim(-1, 1)}
    out["fsq_proj_decode"] = quantizer.lookup(result.ids).movedim(-1, 1)
    return out
