"""Prompts that are no plain sequence: a set of segments whose order does not matter (arXiv:2406.06581)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.nn.layout import Layout


def branches(segments: Sequence[int], root: int = -1) -> Tensor:
    """[1, n] parents of segments of these lengths that all hang on *root* and do not see each other."""
    parent, start = [], root + 1
    for length in segments:
        parent += [root, *range(start, start + length - 1)][:length]
        start += length
    return torch.tensor([parent], dtype=torch.long)


def set_prompt(prefix: int, segments: Sequence[int], suffix: int) -> tuple[Tensor, Tensor]:
    """Who sees whom, bool [L, L], and positions [L] of prefix tokens, parallel segments and suffix tokens.

    Segments do not see each other and all start at the same position; the suffix sees everything and goes on after the
    longest of them.
    """
    chain = torch.arange(-1, prefix - 1)[None]
    tree = torch.cat([chain, branches(segments, prefix - 1)], 1)
    first = tree.shape[1]
    total = first + suffix
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    seen[:first, :first] = Layout("causal", parent=tree).dense(first)[0]
    after = prefix + max(segments, default=0) + torch.arange(suffix)
    return seen, torch.cat([seen[:first, :first].sum(1) - 1, after])
