"""Losses that more than one task or family uses: pure functions of logits and targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def max_z_loss(logits: Tensor, targets: Tensor, weight: float = 2e-4, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and weight · mean(z²) of the largest logit z of each position (Baichuan 2, arXiv:2309.10305).

    Args:
        logits: [..., V].
        targets: [...]; positions equal to *ignore* count in neither part, though the second is divided by them all,
            as in METAGENE-1's training code.
    """
    top = logits.amax(-1).masked_fill(targets == ignore, 0)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore), weight * top.square().mean()


def base_marginals(logits: Tensor, bases: Tensor, specials_as_first: bool = False) -> Tensor:
    """Probabilities [..., k, 4] of the bases at the k places of the next k-mer token.

    Args:
        logits: [..., V].
        bases: [V, k], the base (0 to 3) at each place of each token; -1 for tokens that are no k-mers.
        specials_as_first: those tokens count as k-mers of base 0, as in GENERator's training code. Otherwise their
            probability belongs to no base, and the four sum to less than one.
    """
    probability = torch.softmax(logits.float(), dim=-1)
    table = bases.clamp_min(0) if specials_as_first else bases
    spread = F.one_hot(table.clamp_min(0), 4) * (table >= 0)[..., None]  # [V, k, 4]
    return (probability @ spread.flatten(1).to(probability)).unflatten(-1, spread.shape[1:])


def per_base_loss(
    logits: Tensor,
    targets: Tensor,
    bases: Tensor,
    *,
    specials_as_first: bool = False,
    bases_only: bool = False,
    ignored: tuple[int, ...] = (0, 3, -100),
) -> Tensor:
    """Negative log-likelihood a base of k-mer targets, from the marginals of each base (GENERator's BPTrainer).

    Targets that are other tokens cost their cross-entropy / k; both parts are weighted by their number of tokens.

    Args:
        logits: [..., V] that predict the targets (already shifted).
        targets: [...].
        bases: see `base_marginals`.
        specials_as_first: see `base_marginals`; the published losses are with it.
        bases_only: leave the other tokens out.
        ignored: targets that count nowhere; <oov>, <pad> and the usual -100.
    """
    skip = torch.zeros_like(targets, dtype=torch.bool)
    for value in ignored:
        skip = skip | (targets == value)
    safe = targets.masked_fill(skip, 0)
    kmer = (bases[safe][..., 0] >= 0) & ~skip
    other = ~kmer & ~skip
    zero = logits.sum() * 0
    base_loss, other_loss = zero, zero
    if bool(kmer.any()):
        marginal = base_marginals(logits[kmer], bases, specials_as_first).clamp_min(1e-8)
        base_loss = -marginal.log().gather(-1, bases[targets[kmer]][..., None]).mean()
    if bases_only:
        return base_loss
    if bool(other.any()):
        other_loss = F.cross_entropy(logits[other].float(), targets[other]) / bases.shape[1]
    n, m = kmer.sum(), other.sum()
    return (base_loss * n + other_loss * m) / (n + m).clamp_min(1)


def sequence_loss(logits: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """Loss of whole-sequence predictions [B, K].

    Args:
        logits: [B, K].
        labels: long [B] for classes, float [B] or [B, K] for `regression`, float {0, 1} [B, K] for multi-label.
        problem: `regression`, `single_label_classification` or `multi_label_classification`; None reads it off K and
            the labels' type, as transformers does.
    """
    if problem is None:
        if logits.shape[-1] == 1:
            problem = "regression"
        else:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
