"""GENERator's weights and configs (transformers' Llama), its chunk ensemble, and the replay of its parity cases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.config import from_dict, to_dict
from zoo.convert import llama, load_strict
from zoo.convert.common import check_round_trip
from zoo.convert.parity import Capture, Case
from zoo.models.generator import (
    SPECIALS,
    ChunksConfig,
    GENERator,
    GENERatorConfig,
    allele_probabilities,
    base_table,
    variant_score,
)
from zoo.nn.layout import Layout
from zoo.nn.losses import per_base_loss, sequence_loss

State = Mapping[str, Tensor]
VOCAB = 4128
LETTERS = "ATCG"


def recognises(state: State, config: Mapping[str, Any] | None = None) -> bool:
    """A Llama with GENERator's vocabulary."""
    named = any("GENERator" in str(name) for name in (config or {}).get("architectures") or ())
    return llama.is_llama(state) and (named or llama.embedding_rows(state) == VOCAB)


def to_zoo(state: State, config: GENERatorConfig) -> dict[str, Tensor]:
    """Official weights -> ours; see `zoo.convert.llama.to_zoo`."""
    return llama.to_zoo(state, config, "generator")


def to_official(state: State, config: GENERatorConfig) -> dict[str, Tensor]:
    """The inverse of `to_zoo`."""
    return llama.to_official(state, config, "hf", "generator")


def config_from_official(official: Mapping[str, Any]) -> GENERatorConfig:
    """From a transformers config; `class`, `chunk_size` and `max_chunks` name the chunk ensemble."""
    fields = llama.config_fields(official, "generator")
    chunks = None
    if "chunk_size" in official or "max_chunks" in official or "ChunkEnsemble" in str(official.get("class", "")):
        chunks = ChunksConfig(size=int(official.get("chunk_size", 4096)), count=int(official.get("max_chunks", 8)))
    pad = official.get("pad_token_id") if fields["head"].kind == "sequence" and chunks is None else None
    return from_dict(GENERatorConfig, to_dict({**fields, "chunks": chunks, "pool_pad_id": pad}))


def config_to_official(config: GENERatorConfig) -> dict[str, Any]:
    """The inverse, with the token ids that every GENERator config has."""
    extra: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if config.pool_pad_id is not None:
        extra["pad_token_id"] = config.pool_pad_id
    if config.chunks is not None:
        name = "ChunkEnsembleLlamaForSequenceClassification"
        extra |= {"chunk_size": config.chunks.size, "max_chunks": config.chunks.count, "class": name}
    return llama.config_to_official(config, **extra)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case: language model, classifier or chunk ensemble, with the losses, scores and greedy tokens."""
    padding = llama.padding_of(case.config, str(case.meta.get("notes", "")))
    config = dataclasses.replace(config_from_official(case.config), padding=padding, max_len=None)
    model = GENERator(config).eval()
    load_strict(model, to_zoo(case.state, config), case.path.name)
    check_round_trip(to_official(model.state_dict(), config), case.state, case.path.name)
    ids = case.inputs["input_ids"]
    mask = case.inputs.get("attention_mask")
    valid = None if mask is None else mask.bool()
    labels = case.inputs.get("labels")
    stages = {f"hidden_{i + 1}": layer for i, layer in enumerate(model.backbone.layers)}
    with Capture(stages) as seen:
        hidden, _ = model.forward_features(ids, Layout("causal", valid=valid))
    out = seen.all()
    out |= {"embeddings": model.embed(ids), "last_hidden": hidden, f"hidden_{config.n_layer}": hidden}
    logits = model(ids, valid)
    out["logits"] = logits
    for name in case.outputs:
        if cut := re.fullmatch(r"logits_first(\d+)", name):
            out[name] = logits[:, : int(cut[1])]
    if config.head.kind == "sequence":
        if labels is not None:
            out["loss"] = sequence_loss(logits, labels, case.config.get("problem_type"))
        return out
    if labels is not None:
        out |= _losses(logits[:, :-1], labels[:, 1:])
    if "ref_alt" in case.meta:
        out |= _variants(model, case)
    if "greedy_new_tokens" in case.outputs:
        out["greedy_new_tokens"] = _greedy(model, out, case)
    return out


def _losses(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    table = base_table(logits.shape[-1])
    return {
        "loss_ce_token": F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        "loss_bp_total": per_base_loss(logits, targets, table, specials_as_first=True),
        "loss_bp_only": per_base_loss(logits, targets, table, specials_as_first=True, bases_only=True),
    }


def _variants(model: GENERator, case: Case) -> dict[str, Tensor]:
    """The published variant score: context upstream of the variant, cut on its left to whole 6-mers."""
    from zoo.tokenizers.kmer import KmerTokenizer, KmerTokenizerConfig

    tokenizer = KmerTokenizer(KmerTokenizerConfig())
    texts = [text.lstrip("N") for text in case.meta["sequences"]]
    texts = ["<s>" + text[len(text) % 6 :] for text in texts]
    rows, real = tokenizer.encode_batch(texts, pad_side="left", add_special=False)
    ids, valid = torch.from_numpy(rows), torch.from_numpy(real)
    logits = model(ids, valid)[:, -1]
    alleles = torch.tensor([[LETTERS.index(a) for a in pair] for pair in case.meta["ref_alt"]])
    ref, alt = alleles.unbind(1)
    return {
        "vep_input_ids": ids,
        "vep_attention_mask": valid.long(),
        "vep_last_probs": logits.softmax(-1),
        "vep_p_ref_p_alt": allele_probabilities(logits).gather(1, alleles),
        "vep_score": variant_score(logits, ref, alt),
    }


def _greedy(model: GENERator, out: dict[str, Tensor], case: Case) -> Tensor:
    """Greedy tokens after the variants' contexts, special tokens suppressed; prefill, then a token at a time."""
    ids = out.get("vep_input_ids", case.inputs["input_ids"])
    mask = out.get("vep_attention_mask", case.inputs.get("attention_mask", torch.ones_like(ids)))
    count = case.outputs["greedy_new_tokens"].shape[1]
    plain = GENERator(dataclasses.replace(model.config, padding="skip")).eval()
    load_strict(plain, model.state_dict(), case.path.name)
    state = plain.init_state(len(ids), ids.shape[1] + count)
    hidden, state = plain.forward_features(ids, Layout("causal", valid=mask.bool()), state)
    last = torch.where(mask.bool(), torch.arange(ids.shape[1]), 0).amax(1)
    hidden, chosen = hidden[torch.arange(len(ids)), last][:, None], []
    for step in range(count):
        logits = plain.forward_head(hidden)[:, -1]
        logits[:, :SPECIALS] = -torch.inf
        chosen.append(logits.argmax(-1))
        if step + 1 < count:
            hidden, state = plain.forward_features(chosen[-1][:, None], Layout("causal"), state)
    return torch.stack(chosen, dim=1)
