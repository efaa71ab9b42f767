"""PoNet (lxchtan/PoNet): the BERT-shaped model and the Long Range Arena model <-> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.convert.common import linear, load
from zoo.convert.parity import Capture, Case
from zoo.errors import ConfigError
from zoo.models.lm import LM, LMConfig
from zoo.nn.backbone import Block
from zoo.nn.heads import HeadConfig
from zoo.nn.layout import Layout
from zoo.nn.mlp import MLPConfig
from zoo.nn.ponet import PoNet, separator_blocks

WHAT = "PoNet weights"
MODEL = "lm"  # the family of zoo.models these weights become
SEPARATORS = (101, 102)  # CLS and SEP of BERT's vocabulary, written into the official code


def table(config: LMConfig, prefix: str = "") -> list[Row]:
    """Every official entry of an encoder, in official order; *prefix* is `ponet.` in checkpoints with heads."""
    if config.prenorm:
        return _lra_table(config)
    embeddings = prefix + "embeddings."
    rows = [
        Row(embeddings + "word_embeddings.weight", "embed.weight"),
        Row(embeddings + "position_embeddings.weight", "positions.weight"),
        Row(embeddings + "token_type_embeddings.weight", "token_types.weight"),
        *linear(embeddings + "LayerNorm", "embed_norm"),
    ]
    mixer = {"local": "local_proj", "segment": "segment_proj", "q": "q_proj", "k": "k_proj", "o": "o_proj"}
    for i in range(config.n_layer):
        theirs, ours = f"{prefix}encoder.layer.{i}.", f"backbone.layers.{i}."
        for name, mine in mixer.items():
            rows += linear(f"{theirs}attention.self.dense_{name}", f"{ours}mixer.{mine}")
        rows += linear(theirs + "attention.output.dense", ours + "mixer.out_proj")
        rows += linear(theirs + "attention.output.LayerNorm", ours + "norm1")
        rows += linear(theirs + "intermediate.dense", ours + "mlp.fc1")
        rows += linear(theirs + "output.dense", ours + "mlp.fc2")
        rows += linear(theirs + "output.LayerNorm", ours + "norm2")
    if config.pooler:
        rows += linear(prefix + "pooler.dense", "pooler")
    if config.transform:
        rows += [
            Row("cls.predictions.bias", "transform.bias"),
            *linear("cls.predictions.transform.dense", "transform.dense"),
            *linear("cls.predictions.transform.LayerNorm", "transform.norm"),
            Row("cls.predictions.decoder.weight", "embed.weight", first=False),
            Row("cls.predictions.decoder.bias", "transform.bias", first=False),
        ]
    return rows + (linear("cls.seq_relationship", "sentence") if config.sentence_classes else [])


def _lra_table(config: LMConfig) -> list[Row]:
    rows = [
        Row("embeddings.word_embeddings.weight", "embed.weight"),
        Row("embeddings.position_embeddings.weight", "positions.weight"),
    ]
    # the code's W_v is the gate o: values are the keys
    mixer = {
        "W_q": "q_proj", "W_k": "k_proj", "W_v": "o_proj", "W_local": "local_proj", "W_segment": "segment_proj",
        "ff": "out_proj",
    }  # fmt: skip
    for i in range(config.n_layer):
        theirs, ours = f"transformer_{i}.", f"backbone.layers.{i}."
        rows += linear(theirs + "norm1", ours + "norm1")
        for name, mine in mixer.items():
            rows += linear(f"{theirs}mha.{name}", f"{ours}mixer.{mine}")
        rows += linear(theirs + "norm2", ours + "norm2")
        rows += linear(theirs + "mlpblock.0", ours + "mlp.fc1")
        rows += linear(theirs + "mlpblock.3", ours + "mlp.fc2")
    return rows + linear("norm", "backbone.norm")


def to_zoo(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Official state dict of an encoder, with or without the pretraining heads, -> ours.

    Raises:
        ZooError: a missing or unknown key.
    """
    prefix = "ponet." if any(key.startswith("ponet.") for key in state) else ""
    return rows_to_ours(table(config, prefix), state, WHAT)


def config_from_state(state: Mapping[str, Tensor]) -> LMConfig:
    """The config that a checkpoint of the BERT-shaped model implies; heads are assumed to be 64 wide."""
    prefix = "ponet." if any(key.startswith("ponet.") for key in state) else ""
    vocab, width = state[prefix + "embeddings.word_embeddings.weight"].shape
    official = {
        "hidden_size": width, "vocab_size": vocab, "num_attention_heads": width // 64,
        "num_hidden_layers": 1 + max(int(k.split("layer.")[1].split(".")[0]) for k in state if "encoder.layer." in k),
        "intermediate_size": state[prefix + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[prefix + "embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": state[prefix + "embeddings.token_type_embeddings.weight"].shape[0],
    }  # fmt: skip
    return config_from_official(official, heads="cls.predictions.bias" in state)


def recognises(state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are weights of a PoNet."""
    return any(".dense_segment." in key or ".W_segment." in key for key in state)


def to_official(state: Mapping[str, Tensor], config: LMConfig) -> dict[str, Tensor]:
    """Ours -> official state dict; checkpoints with heads have `ponet.` before the encoder's names."""
    return rows_to_official(table(config, "ponet." if config.transform else ""), state, WHAT)


def config_from_official(official: Mapping[str, Any], heads: bool | None = None) -> LMConfig:
    """A BertConfig with PoNet's fields, or an LRA model's config (it has `transformer_dim`), as a dict -> ours.

    `architectures` (or *heads*) says whether the pretraining heads are there.

    Raises:
        ConfigError: an LRA model with tied layers, another attention or a head width that does not fit.
    """
    get = official.get
    common: dict[str, Any] = {"norm": "layernorm", "layout": "full", "mixer": "ponet", "positions": "learned"}
    if "transformer_dim" in official:
        width, number = int(official["transformer_dim"]), int(official["num_head"])
        if get("tied_weights") or get("attn_type", "ponet") != "ponet" or number * int(official["head_dim"]) != width:
            raise ConfigError("this LRA model is no PoNet with untied layers and num_head x head_dim = transformer_dim")
        return LMConfig(
            d_model=width, vocab_size=int(official["vocab_size"]), n_layer=int(official["num_layers"]),
            options={"num_heads": number, "segments": int(official["segment_num"])}, eps=1e-5,
            mlp=MLPConfig(kind="gelu", width=int(official["transformer_hidden_dim"])),
            max_len=int(official["max_seq_len"]), embed_dropout=float(get("dropout_prob", 0.0)),
            resid_dropout=float(get("dropout_prob", 0.0)), head=HeadConfig(tied=True), **common,
        )  # fmt: skip
    if heads is None:
        heads = "PoNetForPreTraining" in (get("architectures") or ())
    return LMConfig(
        transform=heads, sentence_classes=3 if heads else 0,
        d_model=int(get("hidden_size", 768)), vocab_size=int(get("vocab_size", 30522)),
        n_layer=int(get("num_hidden_layers", 12)),
        options={"num_heads": int(get("num_attention_heads", 12)), "isolate": bool(get("clsgsepg", True))},
        mlp=MLPConfig(kind="gelu", width=int(get("intermediate_size", 3072))),
        max_len=int(get("max_position_embeddings", 512)), eps=float(get("layer_norm_eps", 1e-12)), prenorm=False,
        token_types=int(get("type_vocab_size", 2)), embed_norm=True, pooler=True, separators=SEPARATORS,
        embed_dropout=float(get("hidden_dropout_prob", 0.1)), resid_dropout=float(get("hidden_dropout_prob", 0.1)),
        head=HeadConfig(tied=True), **common,
    )  # fmt: skip


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of PoNetModel or of the LRA model; `attention_mask` or `mask` among the inputs marks real tokens."""
    config = config_from_official(case.config)
    model = load(LM(config), table(config), case.state, WHAT)
    ids = case.inputs["input_ids"]
    mask = case.inputs.get("attention_mask", case.inputs.get("mask"))
    valid = None if mask is None else mask.bool()
    layers = {f"layer{i}": layer for i, layer in enumerate(model.backbone.layers)}
    start = model.embed_norm if model.embed_norm is not None else model.embed_dropout
    pooled: dict[str, Tensor] = {}

    def before_projection(i: int) -> Any:
        def record(_module: torch.nn.Module, args: tuple) -> None:
            pooled[f"ponet_pool_layer{i}"] = args[0]

        return record

    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, Block)
        assert isinstance(layer.mixer, PoNet)
        layer.mixer.out_proj.register_forward_pre_hook(before_projection(i))
    with Capture({**layers, "embeddings": start}) as seen:
        hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    out = {**seen.all(), **pooled, "y": hidden, "last_hidden": hidden}
    if model.pooler is not None:
        out["pooled"] = model.pooled(hidden, valid)
        out["segment_index"] = separator_blocks(ids, config.separators)
    return out
