"""A table of successors by context as the draft, and trees as large as their guesses repay.

Token Recycling keeps successors of single tokens. Where tokens are bases, four rows say next to nothing; the tokens
before the last one do. Here a row belongs to the last few tokens, with shorter contexts where a long one has not been
seen, and each draft is the tree that promises most tokens a second.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from zoo.generate.draft import Verdict
from zoo.generate.noise import Noise
from zoo.generate.verify import Draft


class ContextTable:
    """For every context seen, the likeliest successors that the model named there; shared by all sequences.

    How often a guess of each rank is right is counted for each context length, guessed or not. Guesses join the tree in
    the order of their chance, while a guess's chance over its cost exceeds what the tree has: the tokens expected over
    the time they take. No guess is made where none pays.

    Args:
        orders: lengths of the contexts, the longest first.
        width: successors kept.
        node_cost, entry_cost: time of one more guess in a pass, and of having any, in passes of a single token; to be
            measured for the machine and model.
        limit: contexts kept of each length; a full table starts anew.
    """

    def __init__(
        self,
        orders: Sequence[int] = (12, 6, 2),
        width: int = 4,
        node_cost: float = 0.1,
        entry_cost: float = 0.3,
        limit: int = 1 << 20,
    ) -> None:
        self.orders = tuple(sorted(orders, reverse=True))
        self.width = width
        self.node_cost = node_cost
        self.entry_cost = entry_cost
        self.limit = limit
        self.rows: list[dict[tuple[int, ...], list[int]]] = [{} for _ in self.orders]
        # two imagined trials of each rank, so that a new table tries
        self.right = [[1.0 / 2**rank for rank in range(width)] for _ in self.orders]
        self.trials = [2.0 for _ in self.orders]

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> ContextSession:
        return ContextSession(self)

    def look(self, context: tuple[int, ...]) -> tuple[int, list[int]] | None:
        """(which order, successors by rank) of the longest context known that ends *context*."""
        for level, order in enumerate(self.orders):
            found = self.rows[level].get(context[-order:])
            if found is not None:
                return level, found
        return None

    def learn(self, context: tuple[int, ...], successors: list[int]) -> None:
        """Remember what may follow *context*."""
        for rows, order in zip(self.rows, self.orders, strict=True):
            if len(rows) >= self.limit:
                rows.clear()
            rows[context[-order:]] = successors

    def count(self, level: int, row: list[int], token: int) -> None:
        """A context of that order was followed by *token*."""
        self.trials[level] += 1
        if token in row:
            self.right[level][row.index(token)] += 1


class ContextSession:
    """The table's guesses for one sequence."""

    def __init__(self, table: ContextTable) -> None:
        self.table = table
        self._contexts: list[tuple[int, ...]] = []

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        table = self.table
        tokens: list[int] = []
        parent: list[int] = []
        self._contexts = [tuple(context[-table.orders[0] :])]
        waiting: list[tuple[float, int, int, int]] = []  # -chance, tie, parent, token

        def grow(node: int, chance: float) -> None:
            found = table.look(self._contexts[node + 1])
            if found is not None:
                level, row = found
                for rank, token in enumerate(row):
                    rate = table.right[level][rank] / table.trials[level]
                    heapq.heappush(waiting, (-chance * rate, len(tokens) * table.width + rank, node, token))

        grow(-1, 1.0)
        expected, time = 1.0, 1.0 + table.entry_cost
        best, size = 1.0, 0  # tokens a pass's time, and with how many guesses
        while waiting and len(tokens) < budget:
            chance, _, node, token = heapq.heappop(waiting)
            tokens.append(token)
            parent.append(node)
            self._contexts.append((*self._contexts[node + 1], token)[-table.orders[0] :])
            expected, time = expected - chance, time + table.node_cost
            if expected / time > best:
                best, size = expected / time, len(tokens)
            elif -chance < best * table.node_cost and len(tokens) > 2 * size + table.width:
                break  # chances only fall from here
            grow(len(tokens) - 1, -chance)
        return Draft(tokens[:size], parent[:size])

    def observe(self, verdict: Verdict) -> None:
        table = self.table
        best = verdict.logits.topk(table.width, dim=-1).indices.tolist()
        nodes = [-1, *verdict.path]
        for node, token in zip(nodes, verdict.emitted, strict=True):
            found = table.look(self._contexts[node + 1])
            if found is not None:
                table.count(*found, token)
        for context, successors in zip(self._contexts, best, strict=False):
            table.learn(context, successors)
