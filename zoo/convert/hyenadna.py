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
from zoo.convert.hyenadna_config import accepts_config, config_from_official, config_to_official, mixer_config
from zoo.errors import ZooError
from zoo.models.hyenadna import HyenaDNAConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.hyena import HyenaConfig
from zoo.nn.implicit_filter import decay_rates, position_grid

__all__ = [
    "Names", "accepts_config", "config_from_official", "config_from_state", "config_to_official", "mixer_config",
    "mixer_rows", "names_of", "recognises", "table", "to_official", "to_zoo",
]  # fmt: skip
WHAT = "HyenaDNA weights"


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
        head = HeadConfig(
            kind="sequence",
            num_outputs=weight.shape[0],
            pooling="before_pad" if names.head == "score" else "mean_all",
            bias=bias,
        )
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


def _attention_rows(layer: str, options: Mapping[str, Any]) -> list[Row]:
    """flash-attn's MHA: one projection holding queries, keys and values in that order."""
    rows = []
    for official, ours, bias in (("Wqkv", "qkv", "bias"), ("out_proj", "out_proj", "out_bias")):
        for part in ("weight", "bias") if options.get(bias) else ("weight",):
            rows.append(Row(f"{layer}{official}.{part}", f"{layer}{ours}.{part}"))
    return rows


def _drop_axis(tensor: Tensor) -> Tensor:
    return tensor[0]


def _add_axis(tensor: Tensor) -> Tensor:
    return tensor[None]
