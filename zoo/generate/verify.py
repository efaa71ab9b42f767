"""The one acceptance routine of all drafts: which guesses stay, so that the output has exactly the target's law.

At a node with target law q and children x_1 .. x_k, in the order in which they were drawn, child i from the law p_i:

    accept x_i with min(1, q(x_i) / p_i(x_i)) and descend; otherwise q <- norm(max(q - p_i, 0)) and go on with x_{i+1};
    after the last rejection emit a token of q.

Independent children have p_i = p; children drawn without replacement have p_{i+1} = p_i without x_i, renormalised
(recursive rejection, arXiv:2402.14160); a deterministic child is a point mass, accepted with q(x_i). SpecTr
(arXiv:2310.15141) replaces the rule at a node and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zoo.generate.noise import Noise
from zoo.generate.samplers import draw


@dataclass
class Draft:
    """A tree of guessed tokens below the last emitted one; parents stand before their children.

    Attributes:
        tokens: guesses.
        parent: index of each guess's parent, -1 for the last emitted token.
        laws: for each guess the law [V] that it was drawn from; None for deterministic guesses.
    """

    tokens: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    laws: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self) -> list[list[int]]:
        """Children of the root, then of every guess, in the order they were drawn."""
        below: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, up in enumerate(self.parent):
            below[up + 1].append(node)
        return below

    def paths(self) -> list[list[int]]:
        """Guesses from the root to every leaf."""
        below = self.children()
        found = []
        for leaf in range(len(self)):
            if not below[leaf + 1]:
                path, node = [], leaf
                while node >= 0:
                    path.append(node)
                    node = self.parent[node]
                found.append(path[::-1])
        return found


class NodeRule(Protocol):
    """What happens at one node."""

    def __call__(self, q: Tensor, tokens: Sequence[int], laws: Sequence[Tensor | None]) -> tuple[list[float], Tensor]:
        """For children *tokens* drawn from *laws* (None: point masses) under the target law *q* [V], float64:

        the probability of accepting each one, given that those before it were rejected, and the law [V] of the token
        emitted when all were.
        """


def normed(law: Tensor, fallback: Tensor) -> Tensor:
    """law / sum, or *fallback* where nothing is left: a branch that has probability 0."""
    total = law.sum()
    return law / total if total > 0 else fallback


def recursive(q: Tensor, tokens: Sequence[int], laws: Sequence[Tensor | None]) -> tuple[list[float], Tensor]:
    """Recursive rejection: the rule in the module's docstring."""
    accept = []
    for token, law in zip(tokens, laws, strict=True):
        if law is None:
            accept.append(float(q[token]))
            rest = q.clone()
            rest[token] = 0
        else:
            accept.append(min(1.0, float(q[token] / law[token])) if law[token] > 0 else 0.0)
            rest = (q - law).clamp_min(0)
        q = normed(rest, q)
    return accept, q


def spectr(q: Tensor, tokens: Sequence[int], laws: Sequence[Tensor | None]) -> tuple[list[float], Tensor]:
    """SpecTr's k-sequential selection, for independent children of one law (arXiv:2310.15141, algorithm 2)."""
    if not tokens or laws[0] is None:
        return recursive(q, tokens, laws)
    p, count = laws[0], len(tokens)
    rho, beta, total = spectr_factor(p, q, count)
    accept = [min(1.0, float(q[token] / (rho * p[token]))) for token in tokens]
    rest = (q - torch.minimum(p, q / rho) * (total / beta if beta > 0 else 0.0)).clamp_min(0)
    return accept, normed(rest, q)


def spectr_factor(p: Tensor, q: Tensor, count: int) -> tuple[float, float, float]:
    """(rho, beta, probability that any of *count* drafts is accepted).

    rho is the smallest division factor in [1, count] with 1 - (1 - beta)^count <= rho beta, by bisection, where
    beta = sum_x min(p, q / rho).
    """

    def excess(rho: float) -> float:
        beta = float(torch.minimum(p, q / rho).sum())
        return 1 - (1 - beta) ** count - rho * beta

    low, high = 1.0, float(count)
    if excess(low) <= 0:
        high = low
    else:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    beta = float(torch.minimum(p, q / high).sum())
    return high, beta, 1 - (1 - beta) ** count


def verify(draft: Draft, laws: Tensor, noise: Noise, rule: NodeRule = recursive) -> tuple[list[int], int]:
    """The accepted guesses from the root down, and the token emitted after them.

    Args:
        draft: the guesses.
        laws: [n + 1, V] target laws, of the token after the root and after each guess.
        noise: uniform numbers.
        rule: acceptance at one node.
    """
    path: list[int] = []
    below, node = draft.children(), -1
    while True:
        q = laws[node + 1]
        children = below[node + 1]
        if not children:
            return path, draw(q, noise)
        if draft.laws is None:  # point masses: one draw decides, whatever the rule's order
            token = draw(q, noise)
            found = next((child for child in children if draft.tokens[child] == token), None)
            if found is None:
                return path, token
        else:
            accept, rest = rule(q.double(), [draft.tokens[c] for c in children], [draft.laws[c] for c in children])
            found = next((c for c, p in zip(children, accept, strict=True) if noise.uniform() <= p), None)
            if found is None:
                return path, draw(rest, noise)
        path.append(found)
        node = found


def verify_greedy(draft: Draft, best: Sequence[int]) -> tuple[list[int], int]:
    """The same for one-hot laws: *best* is the likeliest token after the root and after each guess."""
    path: list[int] = []
    below, node = draft.children(), -1
    while True:
        token = best[node + 1]
        found = next((child for child in below[node + 1] if draft.tokens[child] == token), None)
        if found is None:
            return path, token
        path.append(found)
        node = found
