"""Exact byte-level probabilities (facebookresearch/Exact-Byte-Level-Probabilities-from-Tokenized-LMs): parity cases."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.convert.sentencepiece import SentencePiece
from zoo.convert.streaming_llm import tiny_llama
from zoo.generate.exact import ByteView

_SPACE = "\u2581".encode()


@torch.no_grad()
def replay(case: Case) -> dict[str, Tensor]:
    """Covers of the prompt beyond its last space, and the law of each byte of a forced continuation."""
    config = case.config
    case.state["lm_head.weight"] *= float(config.get("lm_head_multiplier", 1.0))
    model = tiny_llama(case)
    prefix = (int(config["llama"]["bos_token_id"]),) if config.get("bos_prepended", True) else ()
    units = SentencePiece(case.path / "tokenizer.model", prefix)
    text = units.text(bytes(case.inputs["prompt_bytes"].tolist()))
    chosen = bytes(case.outputs["chosen_bytes"].tolist())
    view = ByteView(model, units, int(config["llama"]["max_position_embeddings"]))
    before = text[: max(0, text.rfind(_SPACE))]
    anchor = units.canonical(before)
    assert anchor is not None
    counts, laws = [], []
    for k in range(len(chosen)):
        covers, law = view.covers(text + chosen[:k])
        counts.append(len(covers))
        laws.append(law)
        if k == 0:
            first = sorted((cover.tokens[len(anchor) :], cover.logprob) for cover in covers)
    given = view._read([anchor])[0][0]
    width = max(len(tokens) for tokens, _ in first)
    rows = sorted([*tokens, *[-1] * (width - len(tokens))] for tokens, _ in first)
    by_row = {(*tokens, *[-1] * (width - len(tokens))): score for tokens, score in first}
    return {
        "chosen_bytes": torch.tensor(list(chosen)),
        "cover_encodings": torch.tensor(rows),
        "cover_logprobs": torch.tensor([by_row[tuple(row)] - given for row in rows], dtype=torch.float32),
        "div_enc": torch.tensor([*prefix, *anchor]),
        "n_covers": torch.tensor(counts),
        "next_byte_probs": torch.stack(laws).float(),
    }
