"""METAGENE-1's weights and configs in both published layouts, and the replay of its parity cases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.config import from_dict, to_dict
from zoo.convert import llama, load_strict
from zoo.convert.common import check_round_trip
from zoo.convert.parity import Capture, Case
from zoo.errors import ZooError
from zoo.models.metagene import METAGENE, METAGENEConfig
from zoo.nn.losses import max_z_loss
from zoo.tokenizers import build
from zoo.tokenizers.base import Tokenizer

State = Mapping[str, Tensor]
VOCAB = 1024
BOS, EOS = 3, 4


def recognises(state: State, config: Mapping[str, Any] | None = None) -> bool:
    """A Llama with METAGENE-1's vocabulary, in either layout."""
    return llama.is_llama(state) and llama.embedding_rows(state) == VOCAB


def to_zoo(state: State, config: METAGENEConfig) -> dict[str, Tensor]:
    """Official weights of either layout -> ours; see `zoo.convert.llama.to_zoo`."""
    return llama.to_zoo(state, config, "metagene")


def to_official(state: State, config: METAGENEConfig, layout: str = "hf") -> dict[str, Tensor]:
    """The inverse of `to_zoo`, in the layout `hf` (the released weights) or `litgpt` (the training code)."""
    return llama.to_official(state, config, layout, "metagene")


def config_from_official(official: Mapping[str, Any]) -> METAGENEConfig:
    """From a transformers config or a LitGPT one."""
    return from_dict(METAGENEConfig, to_dict(llama.config_fields(official, "metagene")))


def config_to_official(config: METAGENEConfig) -> dict[str, Any]:
    """A transformers config with METAGENE-1's token ids."""
    return llama.config_to_official(config, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Run a case of either layout."""
    padding = llama.padding_of(case.config, str(case.meta.get("notes", "")))
    config = dataclasses.replace(config_from_official(case.config), padding=padding, max_len=None)
    model = METAGENE(config).eval()
    load_strict(model, to_zoo(case.state, config), case.path.name)
    layout = llama.layout_of(case.state)
    check_round_trip(to_official(model.state_dict(), config, layout), case.state, case.path.name)
    ids = case.inputs["input_ids"]
    mask = case.inputs.get("attention_mask")
    valid = None if mask is None else mask.bool()
    stages = {f"hidden_{i + 1}": layer for i, layer in enumerate(model.backbone.layers)}
    with Capture({**stages, "last_hidden": model.backbone.norm}) as seen:
        logits = model(ids, valid)
    out = seen.all()
    out |= {"embeddings": model.embed(ids), f"hidden_{config.n_layer}": out["last_hidden"]}
    targets = case.inputs.get("labels", ids)[:, 1:]
    out["loss_ce"], out["loss_z"] = max_z_loss(logits[:, :-1], targets)
    for name, want in case.outputs.items():
        if name == "logits":
            out[name] = logits[:, : want.shape[1]]
        elif cut := re.fullmatch(r"logits_first(\d+)", name):
            out[name] = logits[:, : int(cut[1])]
    means, lasts = [], []
    for read in _wrapped(case, ids):
        hidden, _ = model.forward_features(read[None])
        means.append(model.embed_reads(read[None]))
        lasts.append(hidden[:, -1])
    return {**out, "embed_mean_bos_eos": torch.cat(means), "embed_last_bos_eos": torch.cat(lasts)}


def _wrapped(case: Case, ids: Tensor) -> list[Tensor]:
    """[BOS] tokens [EOS] of each read.

    The rows of ids are those tokens with [EOS] but cut to a common length, so what was cut off has to be read from the
    texts; without a tokenizer that gives these rows they are taken as they are.
    """
    reads = case.meta.get("reads") or ()
    if len(reads) == len(ids) and not bool((ids[:, -1] == EOS).all()):
        for tokenizer in _tokenizers(case):
            rows = [torch.from_numpy(tokenizer.encode(read)) for read in reads]
            if all(row[1 : 1 + ids.shape[1]].equal(known) for row, known in zip(rows, ids, strict=True)):
                return rows
    ends = torch.tensor([EOS])
    bare = [row[:-1] if row[-1] == EOS else row for row in ids]
    return [torch.cat([torch.tensor([BOS]), row, ends]) for row in bare]


def _tokenizers(case: Case) -> Iterator[Tokenizer]:
    """METAGENE-1's tokenizer from the Hugging Face cache, and those that stand above the case or the working folder."""
    section = {"name": "bpe", "pad": "[PAD]", "bos": "[BOS]", "eos": "[EOS]", "unk": "[UNK]", "mask": "[MASK]"}
    above = dict.fromkeys([*case.path.resolve().parents, Path.cwd(), *Path.cwd().parents])
    inner = ("", "metagene", "goldens/metagene", "shared/goldens/metagene")
    files = [file for top in above for place in inner if (file := top / place / "tokenizer.json").is_file()]
    for where in ({"hub": "metagene-ai/METAGENE-1"}, *({"file": str(file)} for file in files)):
        try:
            yield build({**section, **where})
        except ZooError:
            continue  # not there, or of another model
