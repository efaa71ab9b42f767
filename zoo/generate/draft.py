"""Where guesses come from: the protocols of draft strategies, fixed tree shapes, and the adjacency table.

A strategy is made once (a table is shared by all sequences and outlives a call); each sequence opens a session.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.noise import Noise
from zoo.generate.verify import Draft


@dataclass
class Verdict:
    """What a forward pass said about a draft.

    Attributes:
        root: the token the draft hangs on: the last emitted one, or the prompt's last.
        draft: the guesses.
        logits: [n + 1, V] unwarped, after the root and each guess.
        hidden: [n + 1, D] last hidden states, for trained drafters; None where they were not kept.
        path: accepted guesses.
        emitted: tokens that came out of this pass.
    """

    root: int
    draft: Draft
    logits: Tensor
    hidden: Tensor | None
    path: list[int]
    emitted: list[int]


class DraftSession(Protocol):
    """The guesses of one sequence."""

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        """At most *budget* guesses of what follows *context* (prompt and output; its last token is the root)."""

    def observe(self, verdict: Verdict) -> None:
        """Learn from a verified pass."""


class DraftStrategy(Protocol):
    """A source of guesses."""

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> DraftSession:
        """Guesses for a sequence that starts with *prompt*; *noise* is the session's own, and prompt, output
        and guesses are at most *room* tokens."""


Path = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """A fixed tree of ranks: node i guesses the token of rank `rank[i]` after node `parent[i]`.

    Attributes:
        paths: ranks from the root to each node, sorted by depth and then as given.
        parent: index of each node's parent, -1 for the root.
        rank: rank among the parent's successors.
        level: index of the first node of each depth, and the number of nodes.
    """

    paths: tuple[Path, ...]
    parent: tuple[int, ...]
    rank: tuple[int, ...]
    level: tuple[int, ...]

    @staticmethod
    def of(paths: Sequence[Sequence[int]]) -> Tree:
        """The tree of *paths*, in ascending order of depth, then of ranks.

        Raises:
            ZooError: a path whose beginning is not in the tree.
        """
        ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
        index = {path: i for i, path in enumerate(ordered)}
        for path in ordered:
            if len(path) > 1 and path[:-1] not in index:
                raise ZooError(f"draft tree: the path {list(path)} has no parent {list(path[:-1])} in the tree")
        parent = tuple(index[path[:-1]] if len(path) > 1 else -1 for path in ordered)
        depth = max((len(path) for path in ordered), default=0)
        level = tuple(sum(len(path) <= d for path in ordered) for d in range(depth + 1))
        return Tree(tuple(ordered), parent, tuple(path[-1] for path in ordered), level)

    def cut(self, budget: int) -> Tree:
        """The first *budget* nodes."""
        return self if len(self.paths) <= budget else Tree.of(self.paths[:budget])


def optimal_tree(accuracy: Tensor, size: int) -> list[Path]:
    """The *size* paths with the largest product of rank accuracies, largest first.

    Products fall along a path, so the greedy choice is closed under parents and optimal (Medusa, arXiv:2401.10774,
    appendix C; PPD, arXiv:2405.18628, §4). Ties keep depth-first order.

    Args:
        accuracy: [depth, rank] probability that the guess of that rank at that depth is right.
        size: nodes.
    """
    depth, ranks = accuracy.shape
    found: list[tuple[float, Path]] = []

    def grow(path: Path, product: Tensor) -> None:
        for rank in range(ranks):
            value = product * accuracy[len(path), rank]
            longer = (*path, rank)
            found.append((float(value), longer))
            if len(longer) < depth:
                grow(longer, value)

    grow((), torch.ones((), dtype=accuracy.dtype))
    return [path for _, path in sorted(found, key=lambda item: -item[0])[:size]]


def balanced_tree(widths: Sequence[int]) -> list[Path]:
    """All paths of a tree in which every node of depth d has widths[d] children."""
    return [path for d in range(len(widths)) for path in itertools.product(*(range(w) for w in widths[: d + 1]))]


# ranks of successors worth guessing: many alternatives for the next token, few further down
TABLE_TREE: tuple[Path, ...] = (
    (0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0),
)  # fmt: skip


class TokenTable:
    """Token Recycling (arXiv:2408.08696): for every token the likeliest successors seen so far, shared by all.

    Every verified position refreshes the row of its token, rejected guesses included. The table holds vocab · width
    numbers and no model.

    Attributes:
        table: [V, width] int64, successors by rank; zeros until something is learned.
        tree: the guesses made each time.
    """

    def __init__(
        self,
        vocab_size: int,
        tree: Sequence[Sequence[int]] = TABLE_TREE,
        width: int = 8,
        learn_prompt: bool = True,
    ) -> None:
        self.table = torch.zeros(vocab_size, width, dtype=torch.long)
        self.tree = Tree.of(tree)
        self._cuts: dict[int, Tree] = {}

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> TokenTable:
        return self

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        tree = self._cuts.setdefault(budget, self.tree.cut(budget)) if budget < len(self.tree.paths) else self.tree
        return Draft(self.fill(context[-1], tree), list(tree.parent))

    def fill(self, root: int, tree: Tree | None = None) -> list[int]:
        """The guesses below *root*, level by level."""
        tree = tree or self.tree
        rows: dict[int, list[int]] = {}
        tokens: list[int] = []
        for up, rank in zip(tree.parent, tree.rank, strict=True):
            above = root if up < 0 else tokens[up]
            if above not in rows:
                rows[above] = self.table[above].tolist()
            tokens.append(rows[above][rank])
        return tokens

    def observe(self, verdict: Verdict) -> None:
        tokens = [verdict.root, *verdict.draft.tokens]
        best = verdict.logits.topk(self.table.shape[1], dim=-1).indices.cpu()
        for token, row in zip(tokens, best, strict=True):  # in order: of equal tokens the last one counts
            self.table[token] = row
