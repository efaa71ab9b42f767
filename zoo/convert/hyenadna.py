"""HyenaDNA and safari's Hyena language models: official weights and configs <-> ours.

Official layouts, all of one table: the standalone and training code (`backbone.`), its Lightning checkpoints (`model.`
before it, `.layer.` inside where trained with checkpointing), the Hugging Face port (`hyena.` before it).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.convert import Row, rows_to_official, rows_to_ours
from zoo.errors import ConfigError, ZooError
from zoo.models.hyenadna import HyenaDNAConfig, MixerAt
from zoo.nn.heads import HeadConfig
from zoo.nn.hyena import HyenaConfig, decay_rates, position_grid

WHAT = "HyenaDNA weights"
# options of the official operator that change what it computes and that no published weights use
_UNSUPPORTED = {
    "num_heads": 1, "inner_factor": 1, "num_blocks": 1, "outer_mixing": False, "post_order_ffn": False,
    "activation": "id", "normalized": False, "linear_mixer": False, "modulation_lr": 0.0, "bias": True,
}  # fmt: skip


@dataclass(frozen=True)
class Names:
    """How one official file spells the names of the table.

    Attributes:
        prefix: before `backbone.`: `model.` (Lightning), `hyena.` (Hugging Face) or nothing.
        head: name of the head's module: `lm_head`, `score`, `head.output_transform`, or Lightning's
            `decoder.0.output_transform`.
        mixer_layer, mlp_layer: `.layer` follows `.mixer` and `.mlp` (trained with checkpoint_mixer, checkpoint_mlp).
        aliases: the shared sine frequency stands under each of its names, not only the first.
    """

    prefix: str = ""
    head: str = "lm_head"
    mixer_layer: bool = False
    mlp_layer: bool = False
    aliases: bool = True

    def spell(self, name: str) -> str:
        """The name of the table as this file spells it."""
        if name.startswith("lm_head."):
            lead = "" if self.prefix == "hyena." or self.head != "lm_head" else self.prefix
            return lead + self.head + name.removeprefix("lm_head")
        if self.mixer_layer:
            name = name.replace(".mixer.", ".mixer.layer.")
        if self.mlp_layer:
            name = name.replace(".mlp.", ".mlp.layer.")
        return self.prefix + name


def names_of(state: Mapping[str, Any]) -> Names:
    """Recognise the spelling of an official state dict."""
    prefix = next((p for p in ("model.", "hyena.") if any(key.startswith(p + "backbone.") for key in state)), "")
    heads = ("score", "head.output_transform", "decoder.0.output_transform")
    return Names(
        prefix=prefix,
        head=next((head for head in heads if f"{head}.weight" in state), "lm_head"),
        mixer_layer=any(".mixer.layer." in key for key in state),
        mlp_layer=any(".mlp.layer." in key for key in state),
        aliases=any(key.endswith(".implicit_filter.3.freq") for key in state),
    )


def to_zoo(state: Mapping[str, Tensor], config: HyenaDNAConfig) -> dict[str, Tensor]:
    """Official state dict of any of the layouts -> ours. Entries of torchmetrics are left out.

    Raises:
        ZooError: a missing or unknown key, or tied weights that differ.
    """
    state = {key: tensor for key, tensor in state.items() if "torchmetrics" not in key}
    return rows_to_ours(table(config, names_of(state)), state, WHAT)


def to_official(state: Mapping[str, Tensor], config: HyenaDNAConfig, names: Names | None = None) -> dict[str, Tensor]:
    """Ours -> official state dict, spelled by *names* (the standalone layout by default).

    Raises:
        ZooError: a missing or unknown key.
    """
    if names is None:
        names = Names(head="lm_head" if config.head.kind == "lm" else "head.output_transform")
    return rows_to_official(table(config, names), state, WHAT)


def table(config: HyenaDNAConfig, names: Names) -> list[Row]:
    """Every official entry of a model of *config*, spelled by *names*, in official order."""
    rows = [Row("backbone.embeddings.word_embeddings.weight", "embed.weight")]
    attention = {i: at for at in config.hybrid for i in at.layers}
    for i in range(config.n_layer):
        layer = f"backbone.layers.{i}."
        if i in attention:
            rows += _attention_rows(layer + "mixer.", attention[i].options)
        else:
            rows += mixer_rows(layer + "mixer.", layer + "mixer.", config.hyena, config.d_model, names.aliases)
        rows += [
            Row(layer + part, layer + part)
            for module in ("norm1", "mlp.fc1", "mlp.fc2", "norm2")
            for part in (f"{module}.weight", f"{module}.bias")
        ]
    rows += [Row(f"backbone.ln_f.{part}", f"backbone.norm.{part}") for part in ("weight", "bias")]
    if config.head.kind == "lm" and config.head.tied:
        rows.append(Row("lm_head.weight", "embed.weight", first=False))
    else:
        rows.append(Row("lm_head.weight", "head.weight"))
        if config.head.kind != "lm" and config.head.bias:
            rows.append(Row("lm_head.bias", "head.bias"))
    return [dataclasses.replace(row, official=names.spell(row.official)) for row in rows]


def mixer_rows(official: str, ours: str, config: HyenaConfig, d_model: int, aliases: bool = True) -> list[Row]:
    """The table of one Hyena operator under the name prefixes *official* and *ours*."""
    grid = lambda: position_grid(config.max_len, config.emb_dim, config.phase, torch.device("cpu"))
    channels = (config.order - 1) * d_model
    network = official + "filter_fn.implicit_filter."
    rows = [
        Row(f"{official}{module}.{part}", f"{ours}{module}.{part}")
        for module in ("in_proj", "out_proj", "short_filter")
        for part in (("weight", "bias") if module != "in_proj" or config.bias else ("weight",))
    ]
    rows.append(Row(official + "filter_fn.bias", ours + "filter.skip"))
    if config.learn_positions:
        rows.append(Row(official + "filter_fn.pos_emb.z", ours + "filter.positions", _drop_axis, _add_axis))
    else:
        z = lambda: grid()[0][None]
        rows.append(Row(official + "filter_fn.pos_emb.z", None, value=z))
    t = lambda: grid()[1][None, :, None]
    rows.append(Row(official + "filter_fn.pos_emb.t", None, value=t))
    for j in range(config.num_inner_mlps + 1):
        rows += [Row(f"{network}{2 * j}.{part}", f"{ours}filter.layers.{j}.{part}") for part in ("weight", "bias")]
        if config.train_freq and (aliases or j == 0):
            name = f"{network}{2 * j + 1}.freq"
            rows.append(Row(name, ours + "filter.freq", _drop_axis, _add_axis, first=j == 0))
    rows.append(Row(f"{network}{2 * config.num_inner_mlps + 2}.weight", ours + "filter.out.weight"))
    deltas = lambda: decay_rates(channels, config)[None, None]
    rows.append(Row(official + "filter_fn.modulation.deltas", None, value=deltas))
    return rows


def recognises(state: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> bool:
    """Whether these are the weights of a language model with Hyena layers."""
    return any(".filter_fn.implicit_filter." in key for key in state) and any(
        "backbone.layers.0." in key for key in state
    )


def accepts_config(config: Mapping[str, Any]) -> bool:
    """Whether `config_from_official` can read *config*."""
    return "n_layer" in config and ("max_seq_len" in config or "layer" in config)


def config_from_state(state: Mapping[str, Tensor]) -> HyenaDNAConfig:
    """The config as far as shapes tell it; the rest (window floor, dropout) as in HyenaDNA's inference code.

    Raises:
        ZooError: no Hyena layer in it.
    """
    names = names_of(state)
    first = names.prefix + "backbone.layers.0.mixer." + ("layer." if names.mixer_layer else "")
    network = first + "filter_fn.implicit_filter."
    try:
        embedding = state[names.prefix + "backbone.embeddings.word_embeddings.weight"]
        z, hidden, short = (
            state[key] for key in (first + "filter_fn.pos_emb.z", network + "0.weight", first + "short_filter.weight")
        )
        fc1 = state[names.spell("backbone.layers.0.mlp.fc1.weight")]
    except KeyError as error:
        raise ZooError(f"{WHAT}: the weight {error} is missing, so the sizes cannot be read off") from None
    kind = "lm" if names.head == "lm_head" else "sequence"
    head = HeadConfig(tied=names.prefix != "hyena.")
    if kind == "sequence":
        weight = next(tensor for key, tensor in state.items() if key.endswith(f"{names.head}.weight"))
        bias = any(key.endswith(f"{names.head}.bias") for key in state)
        pooling = "before_pad" if names.head == "score" else "mean_all"
        head = HeadConfig(kind="sequence", num_outputs=weight.shape[0], pooling=pooling, bias=bias)
    return HyenaDNAConfig(
        d_model=embedding.shape[1],
        n_layer=1 + max(int(m.group(1)) for key in state if (m := re.search(r"backbone\.layers\.(\d+)\.", key))),
        d_inner=fc1.shape[0],
        vocab_size=12 if embedding.shape[0] == 16 else embedding.shape[0],
        max_len=z.shape[1],
        hyena=HyenaConfig(
            max_len=z.shape[1],
            order=short.shape[0] // embedding.shape[1] - 1,
            filter_width=hidden.shape[0],
            emb_dim=hidden.shape[1],
            num_inner_mlps=sum(key.startswith(network) and key.endswith(".bias") for key in state) - 1,
            short_filter=short.shape[2],
            phase="split" if names.prefix == "hyena." else "complex",
        ),
        mask_padding=kind == "lm",
        head=head,
    )


def _attention_rows(layer: str, options: dict[str, Any]) -> list[Row]:
    names = {"Wqkv": "qkv_proj", "out_proj": "out_proj"}
    return [
        Row(f"{layer}{name}.{part}", f"{layer}{ours}.{part}")
        for name, ours in names.items()
        for part in ("weight", "bias")
    ]


def _drop_axis(tensor: Tensor) -> Tensor:
    return tensor[0]


def _add_axis(tensor: Tensor) -> Tensor:
    return tensor[None]


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
    head = {"use_head": True, "n_classes": config.head.num_outputs} if classifier else {}
    if hyena.interleaved:  # the code that lays out channels so
        head["class"] = "ConvLMHeadModel"
    return {
        **common, **head, "resid_dropout": config.resid_dropout, "residual_in_fp32": config.residual_in_fp32,
        "layer_norm_epsilon": config.eps, "layer": layer,
    }  # fmt: skip


def _attention_options(official: dict[str, Any]) -> dict[str, Any]:
    raise ZooError("attention layers")
