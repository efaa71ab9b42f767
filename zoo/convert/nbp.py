"""NBP (RenShuhuai-Andy/NBP, the `transformer.` part of its Lightning checkpoints) <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.convert.parity import Capture, Case
from zoo.convert.rename import Renames, State, below, check_round_trip, count_layers, fuse, split
from zoo.generate.next_block import generate_blocks
from zoo.models.nbp import NBP, NBPConfig
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig

FIRST_STAGE = "first_stage_model."
RENAMES = Renames(
    below(
        "transformer.",
        "",
        [
            ("pos_emb", "positions.weight"),
            ("uncond_embedding", "uncond"),
            ("tok_emb.weight", "embed.weight"),
            *below(
                "blocks.{}.",
                "backbone.layers.{}.",
                [
                    ("ln1.*", "norm1.*"),
                    ("ln2.*", "norm2.*"),
                    ("attn.proj.*", "mixer.out_proj.*"),
                    ("attn.query.*", "mixer.query.*"),
                    ("attn.key.*", "mixer.key.*"),
                    ("attn.value.*", "mixer.value.*"),
                    ("mlp.0.*", "mlp.fc1.*"),
                    ("mlp.2.*", "mlp.fc2.*"),
                ],
            ),
            ("ln_f.*", "backbone.norm.*"),
            ("head.weight", "head.weight"),
        ],
    )
)


def config_from_official(official: dict[str, Any]) -> NBPConfig:
    """From the arguments of the official training script."""
    width, block = official["n_embd"], official["token_number_per_step"]
    unconditional = official.get("unconditional", False)
    grid = official.get("latent_shape")
    if grid is None:  # 8x8 spatial and 4x temporal reduction, the first frame apart
        side = official["resolution"] // 8
        grid = ((official["sequence_length"] - 1) // 4 + 1, side, side)
    dropout = official.get("transformer_dropout", 0.1)
    return NBPConfig(
        d_model=width,
        n_layer=official["n_layer"],
        options={"heads": official["n_head"], "bias": True, "out_bias": True},
        mlp=MLPConfig(kind="gelu", width=4 * width),
        video_vocab=official["first_stage_vocab_size"],
        cond_vocab=0 if unconditional else official["cond_stage_vocab_size"],
        cond_tokens=0 if unconditional else official["cond_token_num"],
        grid=(grid[0], grid[1], grid[2]),
        block=block,
        hybrid=official["hybrid"],
        cond_dropout=official.get("p_drop_cond") or 0.0,
        max_len=official["block_size"],
        embed_dropout=dropout,
        resid_dropout=dropout,
    )


def recognises(state: State, config: Any = None) -> bool:
    """Whether these are the weights of an NBP transformer."""
    return "transformer.uncond_embedding" in state and "transformer.pos_emb" in state


def accepts_config(config: dict[str, Any]) -> bool:
    """Whether *config* is one that `config_from_official` can read."""
    return "token_number_per_step" in config and "first_stage_vocab_size" in config


def config_from_state(state: State) -> NBPConfig:
    """The config of a released file as its shapes tell it (the heads by the published sizes): blocks of 16."""
    rows, width = state["transformer.tok_emb.weight"].shape
    layers, cond = count_layers(state, "transformer.blocks."), len(state["transformer.uncond_embedding"])
    hybrid = cond > 0
    return NBPConfig(
        d_model=width,
        n_layer=layers,
        options={"heads": 16 if width == 1536 else 32, "bias": True, "out_bias": True},
        mlp=MLPConfig(kind="gelu", width=4 * width),
        cond_vocab=rows - 64000 - 16 if hybrid else 0,
        cond_tokens=cond,
        hybrid=hybrid,
        max_len=state["transformer.pos_emb"].shape[1],
    )


def tokenizer_state(state: State) -> dict[str, Tensor]:
    """The video tokenizer's weights, where a checkpoint holds them too: official keys of family `nbp_tokenizer`."""
    return {key.removeprefix(FIRST_STAGE): value for key, value in state.items() if key.startswith(FIRST_STAGE)}


def to_zoo(state: State, config: NBPConfig) -> dict[str, Tensor]:
    """Official state dict -> ours. A tokenizer among the weights is left to `tokenizer_state`."""
    out = RENAMES.to_zoo({key: value for key, value in state.items() if not key.startswith(FIRST_STAGE)})
    out["positions.weight"] = out["positions.weight"][0]
    for i in range(config.n_layer):
        for leaf in ("weight", "bias"):
            fuse(out, _parts(i, leaf), f"backbone.layers.{i}.mixer.qkv.{leaf}")
    return out


def to_official(state: State, config: NBPConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    out = dict(state)
    out["positions.weight"] = out["positions.weight"][None]
    for i in range(config.n_layer):
        for leaf in ("weight", "bias"):
            split(out, f"backbone.layers.{i}.mixer.qkv.{leaf}", _parts(i, leaf))
    return RENAMES.to_official(out)


def _parts(layer: int, leaf: str) -> list[str]:
    return [f"backbone.layers.{layer}.mixer.{name}.{leaf}" for name in ("query", "key", "value")]


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Training form with its stages, the mask, and greedy cached decoding."""
    config = config_from_official(case.config)
    state = to_zoo(case.state, config)
    check_round_trip(case.state, to_official(state, config) | {
        key: value for key, value in case.state.items() if key.startswith(FIRST_STAGE)
    })  # fmt: skip
    model = NBP(config).eval()
    model.load_state_dict(state)
    codes, cond = case.inputs["video_ids"], case.inputs.get("cond")
    cond = cond if cond is not None and cond.numel() else None
    ids, targets = model.arrange(codes, cond)
    stages: dict[str, Any] = {"embeddings": model.dropout, "ln_f": model.backbone.norm}
    stages |= {f"block{i}": layer for i, layer in enumerate(model.backbone.layers)}
    stages |= {f"block{i}_attn": layer.mixer for i, layer in enumerate(model.backbone.layers)}
    with Capture(stages) as seen:
        trained = model.loss(codes, cond)
    out = seen.all() | trained | {"input_ids": ids, "target": targets}
    layout = Layout("block_causal", block=model.block_index(ids.shape[1]))
    out["attn_mask"] = layout.dense(ids.shape[1])[0]
    frames = None
    if not config.hybrid:
        length = case.outputs["generate_prefix_ids"].shape[1] - config.cond_tokens
        frames = codes[:, : length // (config.grid[1] * config.grid[2])]
    made = generate_blocks(model, cond, frames, temperature=0, video_only=False, batch=len(codes))
    out |= {"generate_ids": made.ids, "generate_prefix_ids": made.prefix, "generate_steps": torch.tensor(made.steps)}
    out["generate_video_ids"] = made.codes.flatten(1)[:, -made.ids.shape[1] :]
    return out
