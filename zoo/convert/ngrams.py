"""Parity cases of infini-gram's index and of input-guided aggressive decoding's anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.convert.parity import Case
from zoo.generate.ngrams import CopySession, NGramIndex


def replay_index(case: Case) -> dict[str, Tensor]:
    """Counts and probabilities of continuations after prompts padded with -1."""
    eos, vocab = int(case.config["eos"]), int(case.config["vocab"])
    plain = lambda rows: [[t for t in row if t >= 0] for row in rows.tolist()]
    index = NGramIndex(plain(case.inputs["corpus"]), eos)
    columns: dict[str, list[float]] = {}
    ahead = []
    for prompt, token in zip(plain(case.inputs["prompts"]), case.inputs["continuations"].tolist(), strict=True):
        size = index.longest(prompt)
        end = prompt[len(prompt) - size :]
        after = index.successors(end)
        values = {
            "suffix_len": size,
            "prompt_cnt": index.count(end),
            "cont_cnt": after.get(token, 0),
            "ngram_count": index.count([*prompt, token]),
            "infgram_prob": index.probability(prompt, token),
            "bigram_context_prob": index.probability(prompt, token, 3),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
        ahead.append([float(after.get(t, 0)) for t in [*range(vocab), eos]])
    result = {name: torch.tensor(column) for name, column in columns.items()}
    for name in ("infgram_prob", "bigram_context_prob"):
        result[name] = torch.tensor(columns[name], dtype=torch.float64)
    return {**result, "ntd_counts": torch.tensor(ahead, dtype=torch.float64)}


def replay_anchors(case: Case) -> dict[str, Tensor]:
    """Where copying goes on after each tail of an output."""
    session = CopySession(case.inputs["source"].tolist(), int(case.config["max_gram"]))
    tails = [[t for t in tail if t >= 0] for tail in case.inputs["tails"].tolist()]
    return {"anchor": torch.tensor([session.anchor(tail) for tail in tails])}
