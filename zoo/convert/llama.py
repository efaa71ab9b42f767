"""Weights and configs in Llama's layout (transformers) and in LitGPT's, for every family built on the decoder.

Ours keep queries, keys and values in one matrix, and gate and up in another. LitGPT stores them by query group: the
group's queries, its key, its value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import ZooError, nearest
from zoo.models.decoder import DecoderConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.positions import RotaryConfig

State = Mapping[str, Tensor]
HEADS = {"lm": "lm_head.weight", "sequence": "score.weight", "token": "score.weight", "chunks": "classifier.weight"}


@dataclass(frozen=True)
class Entry:
    """One tensor of ours and the official ones it is made of."""

    ours: str
    official: tuple[str, ...]
    join: Callable[[list[Tensor]], Tensor] = lambda parts: parts[0]
    part: Callable[[Tensor], list[Tensor]] = lambda whole: [whole]


def _cat(sizes: list[int]) -> dict[str, Any]:
    return {"join": torch.cat, "part": lambda whole: [p.contiguous() for p in whole.split(sizes)]}


def _heads(config: DecoderConfig) -> tuple[int, int, int]:
    return config.n_head, config.n_kv_head or config.n_head, config.head_dim or config.d_model // config.n_head


def _grouped(config: DecoderConfig) -> dict[str, Any]:
    """LitGPT's rows: for each group its queries, its key, its value."""
    heads, groups, width = _heads(config)
    per = heads // groups

    def join(parts: list[Tensor]) -> Tensor:
        rows = parts[0].unflatten(0, (groups, per + 2, width))
        return torch.cat([piece.flatten(0, 2) for piece in rows.split([per, 1, 1], dim=1)])

    def part(whole: Tensor) -> list[Tensor]:
        q, k, v = whole.split([heads * width, groups * width, groups * width])
        pieces = [q.unflatten(0, (groups, per, width)), *(t.unflatten(0, (groups, 1, width)) for t in (k, v))]
        return [torch.cat(pieces, dim=1).flatten(0, 2).contiguous()]

    return {"join": join, "part": part}


def _table(config: DecoderConfig, layout: str, head: str | None) -> list[Entry]:
    """All entries, in the official order. *head* is the official name of the output layer."""
    heads, groups, width = _heads(config)
    qkv = _cat([heads * width, groups * width, groups * width])
    gate_up = _cat([config.d_inner, config.d_inner])
    kinds = ("weight", "bias") if config.bias else ("weight",)
    embed, final = ("model.embed_tokens", "model.norm") if layout == "hf" else ("transformer.wte", "transformer.ln_f")
    entries = [Entry("embed.weight", (f"{embed}.weight",))]
    for i in range(config.n_layer):
        ours = f"backbone.layers.{i}."
        if layout == "hf":
            at = f"model.layers.{i}."
            for kind in kinds:
                names = tuple(f"{at}self_attn.{n}_proj.{kind}" for n in "qkv")
                entries.append(Entry(f"{ours}mixer.qkv.{kind}", names, **qkv))
            entries += [Entry(f"{ours}mixer.out_proj.{kind}", (f"{at}self_attn.o_proj.{kind}",)) for kind in kinds]
            gates = (f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight")
            down, norm1, norm2 = "mlp.down_proj", "input_layernorm", "post_attention_layernorm"
        else:
            at = f"transformer.h.{i}."
            for kind in kinds:
                entries.append(Entry(f"{ours}mixer.qkv.{kind}", (f"{at}attn.attn.{kind}",), **_grouped(config)))
            entries += [Entry(f"{ours}mixer.out_proj.{kind}", (f"{at}attn.proj.{kind}",)) for kind in kinds]
            gates = (f"{at}mlp.fc_1.weight", f"{at}mlp.fc_2.weight")
            down, norm1, norm2 = "mlp.proj", "norm_1", "norm_2"
        entries += [
            Entry(f"{ours}mlp.gate_up.weight", gates, **gate_up),
            Entry(f"{ours}mlp.down.weight", (f"{at}{down}.weight",)),
            Entry(f"{ours}norm1.weight", (f"{at}{norm1}.weight",)),
            Entry(f"{ours}norm2.weight", (f"{at}{norm2}.weight",)),
        ]
    entries.append(Entry("backbone.norm.weight", (f"{final}.weight",)))
    if head == HEADS["chunks"]:
        entries.append(Entry("chunk_head.weight", (head,)))
    elif head is not None:
        entries.append(Entry("head.weight", (head,)))
        if config.head.kind != "lm" and config.head.bias:
            entries.append(Entry("head.bias", (head.replace("weight", "bias"),)))
    return entries


def layout_of(state: State) -> str:
    """`hf` or `litgpt`."""
    return "litgpt" if any(key.startswith("transformer.") for key in state) else "hf"


def _head_name(config: DecoderConfig) -> str | None:
    if getattr(config, "chunks", None) is not None:
        return HEADS["chunks"]
    if config.head.kind == "lm" and config.head.tied:
        return None
    return HEADS[config.head.kind]


def to_zoo(state: State, config: DecoderConfig, what: str = "llama") -> dict[str, Tensor]:
    """Official weights of either layout -> ours.

    Raises:
        ZooError: a missing or unknown key, or a tied output layer that differs from the embedding.
    """
    layout, head = layout_of(state), _head_name(config)
    entries = _table(config, layout, head)
    known = {name for entry in entries for name in entry.official}
    rest = dict(state)
    if head is None and HEADS["lm"] in rest:  # files may repeat a tied weight
        tied, embed = rest.pop(HEADS["lm"]), state[entries[0].official[0]]
        if not tied.is_meta and not torch.equal(tied, embed):
            raise ZooError(f"{what}: '{HEADS['lm']}' differs from the embedding it is tied to")
    for key in rest:
        if key not in known:
            raise ZooError(f"{what}: unknown weight '{key}'" + nearest(key, known))
    ours = {}
    for entry in entries:
        for name in entry.official:
            if name not in rest:
                raise ZooError(f"{what}: the weight '{name}' is missing" + nearest(name, rest))
        ours[entry.ours] = entry.join([rest[name] for name in entry.official])
    return ours


def to_official(state: State, config: DecoderConfig, layout: str = "hf", what: str = "llama") -> dict[str, Tensor]:
    """The inverse, in the layout `hf` or `litgpt`.

    Raises:
        ZooError: a missing or unknown key of ours.
    """
    entries = _table(config, layout, _head_name(config))
    known = {entry.ours for entry in entries}
    for key in state:
        if key not in known:
            raise ZooError(f"{what}: unknown weight '{key}'" + nearest(key, known))
    official: dict[str, Tensor] = {}
    for entry in entries:
        if entry.ours not in state:
            raise ZooError(f"{what}: the weight '{entry.ours}' is missing" + nearest(entry.ours, state))
        official.update(zip(entry.official, entry.part(state[entry.ours]), strict=True))
    return official


# --- configs


def config_fields(official: Mapping[str, Any], what: str = "llama") -> dict[str, Any]:
    """DecoderConfig fields from a transformers Llama config or a LitGPT one.

    Raises:
        ZooError: an option that the decoder does not have.
    """
    return _from_litgpt(official, what) if "n_embd" in official else _from_hf(official, what)


def _from_hf(official: Mapping[str, Any], what: str) -> dict[str, Any]:
    if official.get("hidden_act", "silu") not in ("silu", "swish") or official.get("mlp_bias"):
        raise ZooError(f"{what}: only SiLU-gated feed-forward networks without biases are known")
    heads = int(official["num_attention_heads"])
    groups = int(official.get("num_key_value_heads") or heads)
    window = official.get("sliding_window")
    return {
        "d_model": int(official["hidden_size"]),
        "n_layer": int(official["num_hidden_layers"]),
        "n_head": heads,
        "n_kv_head": 0 if groups == heads else groups,
        "head_dim": 0 if official.get("head_dim") in (None, official["hidden_size"] // heads) else official["head_dim"],
        "d_inner": int(official["intermediate_size"]),
        "vocab_size": int(official["vocab_size"]),
        "max_len": int(official.get("max_position_embeddings", 2048)),
        "rope": _rope_from_hf(official, what),
        "window": None if window is None else int(window) - 1,  # theirs counts the token itself
        "bias": bool(official.get("attention_bias", False)),
        "eps": float(official.get("rms_norm_eps", 1e-6)),
        "init_std": float(official.get("initializer_range", 0.02)),
        "head": _head_from_hf(official),
    }


def _rope_from_hf(official: Mapping[str, Any], what: str) -> RotaryConfig:
    scaling = dict(official.get("rope_parameters") or official.get("rope_scaling") or {})
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    base = float(scaling.get("rope_theta", official.get("rope_theta", 10000.0)))
    if kind == "default":
        return RotaryConfig(base=base)
    if kind == "linear":
        return RotaryConfig(base=base, scaling="linear", factor=float(scaling["factor"]))
    if kind == "yarn":
        length = scaling.get("original_max_position_embeddings") or official.get("max_position_embeddings", 2048)
        gain = scaling.get("attention_factor")
        return RotaryConfig(
            base=base,
            scaling="yarn",
            factor=float(scaling["factor"]),
            original_len=int(length),
            beta_fast=float(scaling.get("beta_fast") or 32),
            beta_slow=float(scaling.get("beta_slow") or 1),
            attention_factor=None if gain is None else float(gain),
        )
    raise ZooError(f"{what}: unknown rope scaling '{kind}'" + nearest(kind, ("default", "linear", "yarn")))


def _head_from_hf(official: Mapping[str, Any]) -> HeadConfig:
    names = official.get("architectures") or [""]
    name = str(official.get("class") or names[0])
    outputs = int(official.get("num_labels") or len(official.get("id2label") or ()) or 2)
    if "SequenceClassification" in name:
        return HeadConfig(kind="sequence", num_outputs=outputs, pooling="last", bias=False)
    if "TokenClassification" in name:
        return HeadConfig(kind="token", num_outputs=outputs)
    return HeadConfig(tied=bool(official.get("tie_word_embeddings", False)))


def _from_litgpt(official: Mapping[str, Any], what: str) -> dict[str, Any]:
    if official.get("parallel_residual", False) or official.get("shared_attention_norm", False):
        raise ZooError(f"{what}: parallel residual branches are not known")
    if (
        official.get("mlp_class_name", "LLaMAMLP") != "LLaMAMLP"
        or official.get("norm_class_name", "RMSNorm") != "RMSNorm"
    ):
        raise ZooError(f"{what}: only LLaMAMLP and RMSNorm are known")
    if official.get("bias", False) or official.get("lm_head_bias", False) or official.get("scale_embeddings", False):
        raise ZooError(f"{what}: biases and scaled embeddings are not known")
    width, heads = int(official["n_embd"]), int(official["n_head"])
    groups = int(official.get("n_query_groups") or heads)
    head_dim = int(official.get("head_size") or width // heads)
    vocab = official.get("padded_vocab_size")
    if vocab is None:
        multiple = int(official.get("padding_multiple", 512))
        vocab = -(-int(official["vocab_size"]) // multiple) * multiple
    turned = int(float(official.get("rotary_percentage", 1.0)) * head_dim)
    condense = float(official.get("rope_condense_ratio", 1))
    return {
        "d_model": width,
        "n_layer": int(official["n_layer"]),
        "n_head": heads,
        "n_kv_head": 0 if groups == heads else groups,
        "head_dim": 0 if head_dim == width // heads else head_dim,
        "d_inner": int(official["intermediate_size"]),
        "vocab_size": int(vocab),
        "max_len": int(official.get("block_size", 4096)),
        "rope": RotaryConfig(
            base=float(official.get("rope_base", 10000)),
            dim=0 if turned == head_dim else turned,
            scaling="none" if condense == 1 else "linear",
            factor=condense,
        ),
        "eps": float(official.get("norm_eps", 1e-5)),
        "head": HeadConfig(tied=False),
    }


def config_to_official(config: DecoderConfig, **extra: Any) -> dict[str, Any]:
    """A transformers Llama config with the fields *extra* added."""
    heads, groups, width = _heads(config)
    rope = config.rope or RotaryConfig()
    scaling: dict[str, Any] | None = None
    if rope.scaling == "linear":
        scaling = {"rope_type": "linear", "factor": rope.factor}
    elif rope.scaling == "yarn":
        scaling = {
            "rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": rope.original_len,
            "beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow,
        }  # fmt: skip
        if rope.attention_factor is not None:
            scaling["attention_factor"] = rope.attention_factor
    official: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM" if config.head.kind == "lm" else "LlamaForSequenceClassification"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.eps,
        "rope_theta": rope.base,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.head.kind == "lm" and config.head.tied,
        "initializer_range": config.init_std,
    }
    if width != config.d_model // heads:
        official["head_dim"] = width
    if config.window is not None:
        official["sliding_window"] = config.window + 1
    if config.head.kind != "lm":
        official["num_labels"] = config.head.num_outputs
    return {**official, **extra}


def padding_of(official: Mapping[str, Any], notes: str = "") -> Literal["eager", "sdpa"]:
    """`sdpa` where the config or the notes of a case name that attention, else `eager`.

    They differ at padding that has no past.
    """
    name = official.get("attn_implementation") or official.get("_attn_implementation")
    if name is None and "eager" not in notes and re.search(r"\bsdpa\b", notes, re.IGNORECASE):
        name = "sdpa"
    return "sdpa" if name == "sdpa" else "eager"


def embedding_rows(state: State) -> int:
    """Rows of the embedding of a state dict in either layout, 0 where it is none of them."""
    for name in ("model.embed_tokens.weight", "transformer.wte.weight"):
        if name in state:
            return int(state[name].shape[0])
    return 0


def is_llama(state: State) -> bool:
    """Whether the names are those of a Llama in either layout, and all its blocks are."""
    block = re.compile(r"model\.layers\.0\.self_attn\.q_proj\.weight|transformer\.h\.0\.attn\.attn\.weight")
    gated = re.compile(r"model\.layers\.0\.mlp\.gate_proj\.weight|transformer\.h\.0\.mlp\.fc_2\.weight")
    return any(block.fullmatch(key) for key in state) and any(gated.fullmatch(key) for key in state)
