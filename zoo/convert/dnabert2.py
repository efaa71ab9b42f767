"""DNABERT-2's weights and configs, and the replay of its parity cases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.config import from_dict, to_dict
from zoo.convert import Row, load_strict, rows_to_official, rows_to_ours
from zoo.convert.common import check_round_trip, linear
from zoo.convert.parity import Capture, Case
from zoo.errors import ZooError
from zoo.models.dnabert2 import DNABERT2, DNABERT2Config, masked_lm_loss, masked_logits
from zoo.nn.attention import Attention
from zoo.nn.heads import HeadConfig, pool
from zoo.nn.layout import Layout
from zoo.nn.losses import sequence_loss

State = Mapping[str, Tensor]


def rows(config: DNABERT2Config) -> list[Row]:
    """One row an official entry, in the official order."""
    table = [
        Row("bert.embeddings.word_embeddings.weight", "embed.weight"),
        Row("bert.embeddings.token_type_embeddings.weight", "embed_type.weight"),
        *linear("bert.embeddings.LayerNorm", "embed_norm"),
    ]
    for i in range(config.n_layer):
        at, ours = f"bert.encoder.layer.{i}.", f"backbone.layers.{i}."
        table += [
            *linear(f"{at}attention.self.Wqkv", f"{ours}mixer.qkv"),
            *linear(f"{at}attention.output.dense", f"{ours}mixer.out_proj"),
            *linear(f"{at}attention.output.LayerNorm", f"{ours}norm1"),
            Row(f"{at}mlp.gated_layers.weight", f"{ours}mlp.gate_up.weight"),
            *linear(f"{at}mlp.wo", f"{ours}mlp.down"),
            *linear(f"{at}mlp.layernorm", f"{ours}norm2"),
        ]
    if config.head.kind == "lm":
        table += [
            *linear("cls.predictions.transform.dense", "transform.dense"),
            *linear("cls.predictions.transform.LayerNorm", "transform.norm"),
            Row("cls.predictions.decoder.weight", "embed.weight", first=False),  # tied
            Row("cls.predictions.decoder.bias", "transform.bias"),
        ]
    else:
        if config.head.kind == "sequence" and config.pooler:
            table += linear("bert.pooler.dense", "pooler")
        table += linear("classifier", "head")
    return table


def recognises(state: State, config: Mapping[str, Any] | None = None) -> bool:
    """The fused projection and the gated network of MosaicBERT, under their names."""
    return "bert.encoder.layer.0.attention.self.Wqkv.weight" in state


def to_zoo(state: State, config: DNABERT2Config) -> dict[str, Tensor]:
    """Official weights -> ours.

    Raises:
        ZooError: a missing or unknown key, or an output layer that is not tied to the embedding.
    """
    return rows_to_ours(rows(config), state, "dnabert2")


def to_official(state: State, config: DNABERT2Config) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    return rows_to_official(rows(config), state, "dnabert2")


def config_from_official(official: Mapping[str, Any]) -> DNABERT2Config:
    """From the published config; `class` or `architectures` say which head (a masked language model without them).

    Raises:
        ZooError: an activation other than GELU.
    """
    if official.get("hidden_act", "gelu") != "gelu":
        raise ZooError(f"dnabert2: the gate is GELU, not '{official['hidden_act']}'")
    name = str(official.get("class") or (official.get("architectures") or [""])[0])
    dropout = float(official.get("hidden_dropout_prob", 0.1))
    head = HeadConfig()
    if "Classification" in name:
        outputs = int(official.get("num_labels") or len(official.get("id2label") or ()) or 2)
        token = "TokenClassification" in name
        rate = official.get("classifier_dropout")
        head = HeadConfig(
            kind="token" if token else "sequence",
            num_outputs=outputs,
            pooling="first",
            dropout=dropout if rate is None else float(rate),
            tied=False,
        )
    fields = {
        "d_model": int(official["hidden_size"]),
        "n_layer": int(official["num_hidden_layers"]),
        "n_head": int(official["num_attention_heads"]),
        "d_inner": int(official["intermediate_size"]),
        "vocab_size": int(official["vocab_size"]),
        "type_vocab": int(official.get("type_vocab_size", 2)),
        "eps": float(official.get("layer_norm_eps", 1e-12)),
        "dropout": dropout,
        "attn_dropout": float(official.get("attention_probs_dropout_prob", 0.0)),
        "init_std": float(official.get("initializer_range", 0.02)),
        "padding_idx": official.get("pad_token_id"),
        "head": head,
    }
    return from_dict(DNABERT2Config, to_dict(fields))


def config_to_official(config: DNABERT2Config) -> dict[str, Any]:
    """The inverse; lengths are those of the published config, since ALiBi has no limit."""
    official: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.d_inner,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attn_dropout,
        "max_position_embeddings": 512,
        "type_vocab_size": config.type_vocab,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.eps,
        "position_embedding_type": "absolute",
        "classifier_dropout": None,
        "alibi_starting_size": 512,
        "use_cache": True,
    }
    if config.padding_idx is not None:
        official["pad_token_id"] = config.padding_idx
    if config.head.kind != "lm":
        kind = "Sequence" if config.head.kind == "sequence" else "Token"
        official |= {"architectures": [f"BertFor{kind}Classification"], "num_labels": config.head.num_outputs}
        official["classifier_dropout"] = None if config.head.dropout == config.dropout else config.head.dropout
    return official


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case: masked language model or classifier."""
    config = config_from_official(case.config)
    model = DNABERT2(config).eval()
    load_strict(model, to_zoo(case.state, config), case.path.name)
    check_round_trip(to_official(model.state_dict(), config), case.state, case.path.name)
    ids = case.inputs["input_ids"]
    valid = case.inputs.get("attention_mask", torch.ones_like(ids)).bool()
    labels = case.inputs.get("labels")
    hidden, _ = model.forward_features(ids, Layout("full", valid=valid))
    out = _stages(model, ids, valid)
    out |= {"last_hidden": hidden, "mean_pool_masked": pool(hidden, valid, "mean")}
    out["max_pool_masked"] = hidden.masked_fill(~valid[..., None], -torch.inf).amax(1)
    out |= _alibi(model, case)
    logits = model(ids, valid)
    out["logits"] = logits
    for name in case.outputs:
        if cut := re.fullmatch(r"logits_first(\d+)", name):
            out[name] = logits[:, : int(cut[1])]
    if config.head.kind == "lm":
        if labels is not None:
            out["logits_masked"] = masked_logits(model, ids, labels, valid)
            out["loss"] = masked_lm_loss(logits, labels, official=True)
        return out
    if model.pooler is not None:
        out["pooled"] = model.pooled(hidden, None)  # the official code takes position 0 whatever stands there
        logits = model.head(out["pooled"][:, None])
        out["logits"] = logits
    if labels is not None and config.head.kind == "sequence":
        out["loss"] = sequence_loss(logits, labels, case.config.get("problem_type"))
    return out


def _stages(model: DNABERT2, ids: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Every layer's stages at the valid tokens in row-major order, without packing."""
    modules: dict[str, torch.nn.Module] = {}
    heads: dict[str, torch.nn.Module] = {}
    layers: list[Any] = list(model.backbone.layers)
    for i, layer in enumerate(layers):
        modules |= {f"layer{i}_attn_out": layer.norm1, f"layer{i}_out": layer}
        assert isinstance(layer.mixer, Attention)
        heads[f"layer{i}_attn"] = layer.mixer.out_proj
    before: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, args: before.__setitem__(name, args[0])

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in heads.items()]
    layout = Layout("full", valid=valid)
    with Capture(modules) as seen:
        embeddings = model.embed_tokens(ids, layout)
        model.backbone(embeddings, layout)
    for handle in handles:
        handle.remove()
    stages = {**seen.all(), **before}
    return {"embeddings": embeddings, **{f"{name}_unpadded": value[valid] for name, value in stages.items()}}


def _alibi(model: DNABERT2, case: Case) -> dict[str, Tensor]:
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, Attention)
    assert mixer.slopes is not None
    slopes = torch.tensor(mixer.slopes)
    out = {"alibi_slopes": slopes}
    for name in case.outputs:
        if size := re.fullmatch(r"alibi_(\d+)x\1", name):
            place = torch.arange(int(size[1]))
            out[name] = (-slopes[:, None, None] * (place[:, None] - place).abs())[None]
    return out
