"""Configs of HyenaDNA and of safari's Hyena language models: official config.json or constructor arguments <-> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import ConfigError, nearest
from zoo.models.hyenadna import HyenaDNAConfig, MixerAt
from zoo.nn.heads import HeadConfig
from zoo.nn.hyena import HyenaConfig

# options of the official operator that change what it computes and that no published weights use
_UNSUPPORTED = {
    "num_heads": 1, "inner_factor": 1, "num_blocks": 1, "outer_mixing": False, "post_order_ffn": False,
    "activation": "id", "normalized": False, "linear_mixer": False, "modulation_lr": 0.0, "bias": True,
}  # fmt: skip


def accepts_config(config: Mapping[str, Any]) -> bool:
    """Whether `config_from_official` can read *config*."""
    return "n_layer" in config and ("max_seq_len" in config or "layer" in config)


def config_from_official(official: Mapping[str, Any]) -> HyenaDNAConfig:
    """An official config.json or constructor's arguments -> ours; `class` in it names the official class.

    Raises:
        ConfigError: an option that no published weights use and that we do not compute.
    """
    if "max_seq_len" in official:
        return _from_hf(official)
    name = str(official.get("class", ""))
    layer = dict(official.get("layer") or {})
    vocab = int(official["vocab_size"])
    # the training code's window has no floor, the published inference code's has 0.05: the same weights, two filters
    training = "ConvLMHeadModel" in name or (not name and vocab != 12)
    hyena = mixer_config(layer, shift=0.0 if training else 0.05, interleaved=training)
    hybrid: tuple[MixerAt, ...] = ()
    if official.get("attn_layer_idx"):
        options = _attention_options(dict(official.get("attn_cfg") or {}))
        hybrid = (MixerAt(layers=tuple(official["attn_layer_idx"]), mixer="attention", options=options),)
    head = HeadConfig()
    if official.get("use_head"):
        head = HeadConfig(kind="sequence", num_outputs=int(official["n_classes"]), pooling="mean_all")
    return HyenaDNAConfig(
        d_model=int(official["d_model"]),
        n_layer=int(official["n_layer"]),
        d_inner=int(official.get("d_inner") or 0),
        vocab_size=vocab,
        vocab_multiple=int(official.get("pad_vocab_size_multiple", 1)),
        max_len=hyena.max_len,
        hyena=hyena,
        hybrid=hybrid,
        embed_dropout=float(official.get("embed_dropout", 0.1)),
        resid_dropout=float(official.get("resid_dropout", 0.0)),
        residual_in_fp32=bool(official.get("residual_in_fp32", False)),
        eps=float(official.get("layer_norm_epsilon", 1e-5)),
        mask_padding=head.kind == "lm",
        head=head,
    )


def mixer_config(layer: Mapping[str, Any], shift: float, interleaved: bool) -> HyenaConfig:
    """Arguments of an official HyenaOperator -> ours; *shift* and *interleaved* are what its code does by default.

    The released key `local_order` is ignored there, and so it is here; `lr` is dropped because the official recipes
    set it to the optimiser's.
    """
    for key, usual in _UNSUPPORTED.items():
        if layer.get(key, usual) != usual:
            raise ConfigError(
                f"official option {key}={layer[key]!r} is not supported (published weights have {usual!r})"
            )
    lr_pos_emb = float(layer.get("lr_pos_emb", 1e-5))
    return HyenaConfig(
        max_len=int(layer["l_max"]),
        order=int(layer.get("order", 2)),
        filter_width=int(layer.get("filter_order", 64)),
        emb_dim=int(layer.get("emb_dim", 3)),
        num_inner_mlps=int(layer.get("num_inner_mlps", 2)),
        sin_freq=float(layer.get("w", 1)),
        short_filter=int(layer.get("short_filter_order", 3)),
        shift=float(layer.get("shift", shift)),
        modulate=bool(layer.get("modulate", True)),
        fast_decay_pct=float(layer.get("fast_decay_pct", 0.3)),
        slow_decay_pct=float(layer.get("slow_decay_pct", 1.5)),
        decay_target=float(layer.get("target", 1e-2)),
        dropout=float(layer.get("dropout", 0.0)),
        learn_positions=lr_pos_emb != 0.0,
        positions_lr=lr_pos_emb or None,
        filter_weight_decay=float(layer.get("wd", 0.0)),
        interleaved=interleaved,
        bidirectional="ring" if layer.get("bidirectional") else "no",
    )


def _from_hf(official: Mapping[str, Any]) -> HyenaDNAConfig:
    if official.get("hyena_order", 2) != 2 or not official.get("use_bias", True):
        raise ConfigError("the Hugging Face port of HyenaDNA works only with hyena_order=2 and use_bias=true")
    hyena = HyenaConfig(
        max_len=int(official["max_seq_len"]),
        filter_width=int(official.get("filter_order", 64)),
        emb_dim=int(official.get("emb_dim", 5)),
        num_inner_mlps=int(official.get("num_inner_mlps", 2)),
        sin_freq=float(official.get("activation_freq", 10)),
        train_freq=bool(official.get("train_freq", True)),
        short_filter=int(official.get("short_filter_order", 3)),
        phase="split",
        dropout=float(official.get("hyena_dropout", 0.0)),
    )
    names = [str(official.get("class", "")), *(official.get("architectures") or [])]
    head = HeadConfig(tied=bool(official.get("tie_word_embeddings", False)))
    if any("SequenceClassification" in name for name in names):
        labels = int(official.get("num_labels") or len(official.get("id2label") or {}) or 2)
        head = HeadConfig(kind="sequence", num_outputs=labels, pooling="before_pad", bias=False)
    return HyenaDNAConfig(
        d_model=int(official["d_model"]),
        n_layer=int(official["n_layer"]),
        d_inner=int(official.get("d_inner") or 0),
        vocab_size=int(official["vocab_size"]),
        vocab_multiple=int(official.get("pad_vocab_size_multiple", 8)),
        max_len=hyena.max_len,
        hyena=hyena,
        embed_dropout=float(official.get("embed_dropout", 0.1)),
        eps=float(official.get("layer_norm_epsilon", 1e-5)),
        init_std=float(official.get("initializer_range", 0.02)),
        mask_padding=head.kind == "lm",
        head=head,
    )


def config_to_official(config: HyenaDNAConfig, hf: bool = False) -> dict[str, Any]:
    """Ours -> the config.json of the original repositories, or with *hf* that of the Hugging Face port.

    Raises:
        ConfigError: the original has no such option (another mixer).
    """
    if config.mixer != "hyena" or config.hybrid:
        raise ConfigError("only models of Hyena layers have an official HyenaDNA config")
    hyena, classifier = config.hyena, config.head.kind == "sequence"
    common = {
        "d_model": config.d_model,
        "n_layer": config.n_layer,
        "d_inner": config.d_inner or 4 * config.d_model,
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": config.vocab_multiple,
        "embed_dropout": config.embed_dropout,
    }
    if hf:
        architecture = "HyenaDNAForSequenceClassification" if classifier else "HyenaDNAForCausalLM"
        labels = {"num_labels": config.head.num_outputs} if classifier else {}
        return {
            **common, **labels,
            "model_type": "hyenadna", "architectures": [architecture], "use_bias": True,
            "train_freq": hyena.train_freq, "max_seq_len": config.max_len, "emb_dim": hyena.emb_dim,
            "num_inner_mlps": hyena.num_inner_mlps, "hyena_order": hyena.order,
            "short_filter_order": hyena.short_filter, "filter_order": hyena.filter_width,
            "activation_freq": hyena.sin_freq, "hyena_dropout": hyena.dropout, "hyena_filter_dropout": 0.0,
            "layer_norm_epsilon": config.eps, "initializer_range": config.init_std,
            "tie_word_embeddings": config.head.kind == "lm" and config.head.tied, "pad_token_id": 4,
        }  # fmt: skip
    lr_pos_emb = hyena.positions_lr or (1e-5 if hyena.learn_positions else 0.0)
    layer = {
        "_name_": "hyena", "emb_dim": hyena.emb_dim, "filter_order": hyena.filter_width, "order": hyena.order,
        "short_filter_order": hyena.short_filter, "l_max": config.max_len, "modulate": hyena.modulate,
        "w": hyena.sin_freq, "wd": hyena.filter_weight_decay, "lr_pos_emb": lr_pos_emb,
        "num_inner_mlps": hyena.num_inner_mlps, "shift": hyena.shift, "dropout": hyena.dropout,
        "fast_decay_pct": hyena.fast_decay_pct, "slow_decay_pct": hyena.slow_decay_pct, "target": hyena.decay_target,
        "bidirectional": hyena.bidirectional == "ring",
    }  # fmt: skip
    head: dict[str, Any] = {"use_head": True, "n_classes": config.head.num_outputs} if classifier else {}
    if hyena.interleaved:  # the code that lays out channels so
        head["class"] = "ConvLMHeadModel"
    return {
        **common, **head, "resid_dropout": config.resid_dropout, "residual_in_fp32": config.residual_in_fp32,
        "layer_norm_epsilon": config.eps, "layer": layer,
    }  # fmt: skip


def _attention_options(official: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of flash-attn's MHA -> options of our attention mixer."""
    known = {
        "num_heads", "num_heads_kv", "qkv_proj_bias", "out_proj_bias", "bias", "rotary_emb_dim", "rotary_emb_base",
        "rotary_emb_interleaved", "softmax_scale", "dropout", "causal", "use_alibi", "use_flash_attn", "fused_bias_fc",
    }  # fmt: skip
    idle = {"dwconv", "return_residual", "checkpointing", "device", "dtype", "layer_idx"}  # harmless while they are off
    for key in official:
        if key not in known and not (key in idle and not official[key]):
            raise ConfigError(
                f"official attention option {key}={official[key]!r} is not supported" + nearest(key, known)
            )
    if not official.get("causal", True):
        raise ConfigError("official attention option causal=False is not supported: these models only look back")
    bias = bool(official.get("bias", True))
    options: dict[str, Any] = {
        "heads": int(official["num_heads"]),
        "kv_heads": int(official.get("num_heads_kv") or 0),
        "bias": bool(official.get("qkv_proj_bias", bias)),
        "out_bias": bool(official.get("out_proj_bias", bias)),
        "alibi": bool(official.get("use_alibi", False)),
        "scale": official.get("softmax_scale"),
        "dropout": float(official.get("dropout", 0.0)),
    }
    if official.get("rotary_emb_dim"):
        options["rope"] = {
            "dim": int(official["rotary_emb_dim"]),
            "base": float(official.get("rotary_emb_base", 10000.0)),
            "interleaved": bool(official.get("rotary_emb_interleaved", False)),
        }
    return options
