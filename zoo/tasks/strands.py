"""What is made of the two strands of a sequence: nothing, augmentation, or one prediction from both.

A model conjoined after its training (Zhou et al. 2022, "Towards a better understanding of reverse-complement
equivariance for deep learning models in genomics", PMLR 165, §2) reads both strands with the same weights and
averages what they say before the output's non-linearity, so that its answer does not depend on which strand was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Policy = Literal["none", "augment", "average", "conjoin"]
BOTH = ("average", "conjoin")  # policies that read both strands at test time


def both_strands(logits: Tensor, other: Tensor, policy: str, kind: str, known: Tensor | None = None) -> Tensor:
    """One prediction [..., K] from the logits of a sequence and of its reverse complement, as logits again.

    Args:
        logits, other: [..., K], of the same bases.
        policy: `conjoin` takes the mean of the logits, `average` that of the probabilities; the numbers of a
            regression are the same either way.
        kind: `multiclass`, `multilabel` or `regression`.
        known: [...] where *other* means something; elsewhere *logits* alone count (a base that no token covers there).
    """
    joined = merged([logits, other], policy, kind)
    return joined if known is None else torch.where(known[..., None], joined, logits)


def merged(views: Sequence[Tensor], policy: str, kind: str) -> Tensor:
    """One prediction [..., K] from the logits of several views of the same sequences, as logits again.

    Args:
        views: each [..., K].
        policy: `average` takes the mean of the probabilities, any other that of the logits.
        kind: `multiclass`, `multilabel` or `regression`.
    """
    every = torch.stack(list(views))  # [V, ..., K]
    if policy != "average" or kind == "regression":
        return every.mean(0)
    if kind == "multilabel":
        return torch.logit(torch.sigmoid(every).mean(0), eps=1e-7)
    return every.log_softmax(-1).logsumexp(0) - math.log(len(views))


def at(logits: Tensor, token: Tensor, place: Tensor | None = None) -> Tensor:
    """Logits of single bases [B, N, K]: those of the tokens that cover them.

    Args:
        logits: [B, L, K], or [B, L, S, K] of a head that tells S places of a token apart.
        token: [B, N] place in the row of the token that covers each base; -1 where none does, which takes token 0
            (its label is to be ignored).
        place: [B, N] of each base in its token.
    """
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    token = token.clamp_min(0)
    if logits.dim() == 3:
        return logits[rows, token]
    assert place is not None
    return logits[rows, token, place.clamp(0, logits.shape[2] - 1)]
