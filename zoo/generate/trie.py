"""Lookahead's trie (arXiv:2312.12728, §4): branches of the prompt and of all outputs so far, as a draft.

For every token a tree of what followed it, with how often it did in each prompt and in all outputs. A query matches
the last tokens and reads off the branches below, most frequent first, as one tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from zoo.generate.draft import Verdict
from zoo.generate.noise import Noise
from zoo.generate.verify import Draft

Mode = Literal["input", "output", "mix"]
OUTPUT = -1  # the counter that all outputs share; prompts have one each
_NEVER = 1e9
_OUTPUT_WEIGHT = 1e-4  # a prompt's counts come before all outputs'


@dataclass
class Node:
    """What came after a branch: continuations, and how often the branch was seen by each counter."""

    below: dict[int, Node] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)

    def pair(self, prompt: int) -> tuple[float, float]:
        """(count in the prompt, count in outputs)"""
        return self.counts.get(prompt, 0.0), self.counts.get(OUTPUT, 0.0)

    def walk(self, prompt: int) -> Iterator[Node]:
        """All nodes below that this prompt or an output has visited."""
        for node in self.below.values():
            if any(node.pair(prompt)):
                yield node
                yield from node.walk(prompt)


def _mixed(pair: tuple[float, float], weight: float) -> float:
    return (1 - weight) * pair[0] + weight * pair[1]


@dataclass(frozen=True)
class Branches:
    """A query's answer: tokens[0] is the last matched token, parent[i] the index of i's parent (-1 for the first)."""

    tokens: list[int]
    parent: list[int]

    def mask(self) -> list[list[int]]:
        """[n][n] 1 where the column is an ancestor of the row, or the row itself."""
        rows: list[list[int]] = []
        for node, up in enumerate(self.parent):
            row = list(rows[up]) if up >= 0 else [0] * len(self.parent)
            row[node] = 1
            rows.append(row)
        return rows

    def parallel(self) -> Branches:
        """The same branches side by side, each with its own copy of what they share, and no more tokens in all."""
        leaves: list[tuple[int, list[int]]] = []
        for node in range(len(self.tokens) - 1, 0, -1):
            path, at = [], node
            while at > 0:
                path.append(at)
                at = self.parent[at]
            if not any(set(path) <= set(longer) for _, longer in leaves):
                leaves.append((node, path[::-1]))
        tokens, parent, room = self.tokens[:1], [-1], len(self.tokens) - 1
        for _, path in reversed(leaves):
            kept = path[: room - (len(tokens) - 1)]
            for step, node in enumerate(kept):
                parent.append(0 if step == 0 else len(tokens) - 1)
                tokens.append(self.tokens[node])
            if len(tokens) - 1 >= room:
                break
        return Branches(tokens, parent)


class Trie:
    """Branches below every token.

    Args:
        eos: prompts and outputs are cut at this token; None for never.
        max_nodes, max_output_nodes: a token's tree with more loses what outputs visited at most once, and the other
            output counts are halved.
    """

    def __init__(self, eos: int | None = 2, max_nodes: int = 65536, max_output_nodes: int = 512) -> None:
        self.eos = eos
        self.max_nodes = max_nodes
        self.max_output_nodes = max_output_nodes
        self.roots: dict[int, Node] = {}
        self._tails: dict[int, list[int]] = {}
        self._touched: set[int] = set()

    def put(self, tokens: Sequence[int], length: int, prompt: int) -> None:
        """Insert all branches of a whole prompt, of *length* tokens below each."""
        tokens = self._cut(tokens)
        for i in range(len(tokens) - 1):
            self._insert(tokens[i : i + length + 1], prompt)

    def stream(self, tokens: Sequence[int], length: int, prompt: int = 0, final: bool = False) -> None:
        """Insert branches of an output that arrives in pieces, as soon as they are *length* tokens long."""
        tail = self._tails.setdefault(prompt, [])
        tail.extend(self._cut(tokens))
        least = 1 if final else length
        if len(tail) > least:
            for i in range(len(tail) - least):
                self._insert(tail[i : i + length + 1], OUTPUT)
            if not final:
                self._tails[prompt] = tail[len(tail) - length :]
        if final:
            self._tails.pop(prompt, None)
            self.forget(prompt)

    def forget(self, prompt: int) -> None:
        """Clear a prompt's counts, and thin out trees that have grown too large."""
        for root in self.roots.values():
            self._clear(root, prompt)
        if len(self._touched) >= 1024:
            for token in self._touched:
                root = self.roots[token]
                if sum(1 for _ in _all(root)) > min(self.max_nodes, self.max_output_nodes):
                    self._thin(root)
            self._touched.clear()

    def _cut(self, tokens: Sequence[int]) -> list[int]:
        tokens = list(tokens)
        return tokens[: tokens.index(self.eos)] if self.eos in tokens else tokens

    def _insert(self, branch: Sequence[int], counter: int) -> None:
        node = self.roots.setdefault(branch[0], Node())
        for token in branch[1:]:
            node = node.below.setdefault(token, Node())
            node.counts[counter] = node.counts.get(counter, 0.0) + 1
        self._touched.add(branch[0])

    def _clear(self, node: Node, prompt: int) -> None:
        for child in node.below.values():
            if child.counts.pop(prompt, 0.0):
                self._clear(child, prompt)

    def _thin(self, node: Node) -> None:
        node.below = {token: child for token, child in node.below.items() if child.counts.get(OUTPUT, 0.0) > 1}
        for child in node.below.values():
            child.counts[OUTPUT] /= 2
            self._thin(child)

    # --- queries

    def _matches(self, key: Sequence[int], mode: Mode, prompt: int) -> Iterator[tuple[int, Node | None]]:
        """For each suffix of *key* whose first token has a tree: the token to answer with, and the node it leads to."""
        for i, token in enumerate(key):
            if token not in self.roots:
                continue
            node: Node | None = self.roots[token]
            last = 0
            for last in key[i + 1 :]:
                node = node.below.get(last) if node is not None else None
                if node is not None:
                    given, put_out = node.pair(prompt)
                    if not {"input": given, "output": put_out, "mix": given + put_out}[mode]:
                        node = None
                if node is None:
                    break
            if node is None or not node.below:
                yield (key[-1] if key[i + 1 :] else token), None
            else:
                yield last or token, node  # the official code takes a matched token 0 for none

    def query(
        self,
        key: Sequence[int],
        size: int,
        length: int,
        least_input: int = 0,
        least_output: int = 0,
        mode: Mode = "mix",
        prompt: int = 0,
    ) -> Branches:
        """At most *size* tokens of branches of at most *length* tokens, the matched one included, in one tree.

        Where more nodes than *size* match, those stay that are among the `least_input` most frequent ones of the
        prompt or the `least_output` ones of the outputs; the official rule for the rest lets none pass in mode `mix`.
        """
        answer = Branches([key[-1]], [-1])
        if size <= 1 or length == 0:
            return answer
        for token, node in self._matches(key, mode, prompt):
            answer = Branches([token], [-1])
            if node is not None:
                floors = self._floors(node, size, least_input, least_output, mode, prompt)
                weight = {"input": 0.0, "output": 1.0, "mix": _OUTPUT_WEIGHT}[mode]
                self._collect(node, 0, answer, floors, size, length - 1, weight, prompt)
            if len(answer.tokens) >= length:
                break
        return answer

    def _floors(
        self, node: Node, size: int, least_input: int, least_output: int, mode: Mode, prompt: int
    ) -> tuple[float, float, float]:
        """Least counts (prompt, outputs, mixed), one of which a node must reach."""
        pairs = [below.pair(prompt) for below in node.walk(prompt)]
        given, put_out = ([pair[axis] for pair in pairs] for axis in (0, 1))
        if mode == "mix":
            if len(pairs) <= size:
                return _NEVER, _NEVER, 0.0
            floor_in = sorted(given, reverse=True)[least_input - 1] if least_input > 0 else _NEVER
            floor_out = sorted(put_out, reverse=True)[least_output - 1] if least_output > 0 else _NEVER
            return floor_in, floor_out, _NEVER
        counts, least = (given, least_input) if mode == "input" else (put_out, least_output)
        crowded = sum(count > 0 for count in counts) > size
        floor = sorted(counts, reverse=True)[least - 1] if crowded else 0.0
        return (floor, _NEVER, _NEVER) if mode == "input" else (_NEVER, floor, _NEVER)

    def _collect(
        self,
        node: Node,
        at: int,
        answer: Branches,
        floors: tuple[float, float, float],
        size: int,
        depth: int,
        weight: float,
        prompt: int,
    ) -> None:
        """Depth first, most frequent branches first."""
        if depth <= 0:
            return
        ordered = sorted(node.below.items(), key=lambda item: -_mixed(item[1].pair(prompt), weight))
        for token, child in ordered:
            if len(answer.tokens) >= size:
                return
            pair = child.pair(prompt)
            if pair[0] < floors[0] and pair[1] < floors[1] and _mixed(pair, weight) < floors[2]:
                continue
            answer.tokens.append(token)
            answer.parent.append(at)
            self._collect(child, len(answer.tokens) - 1, answer, floors, size, depth - 1, weight, prompt)

    def branch(self, key: Sequence[int], length: int, mode: Mode = "mix", prompt: int = 0) -> list[int]:
        """The matched token and the most frequent branch below it, *length* tokens in all at most."""
        best: list[int] = []
        for token, node in self._matches(key, mode, prompt):
            line = [token]
            while node is not None and node.below and len(line) < length:
                counts = [(self._rank(child.pair(prompt), mode), t) for t, child in node.below.items()]
                most = max(count for count, _ in counts)
                if most <= 0:
                    break
                line.append(next(t for count, t in counts if count == most))
                node = node.below[line[-1]]
            if len(line) > len(best):
                best = line
            if len(line) >= length // 2:
                break
        return best or [key[-1]]

    def _rank(self, pair: tuple[float, float], mode: Mode) -> float:
        if mode == "mix":  # outputs come first here, unlike in `query`
            return pair[0] + 10000 * pair[1]
        return pair[0] if mode == "input" else pair[1]


def _all(node: Node) -> Iterator[Node]:
    for child in node.below.values():
        yield child
        yield from _all(child)


class Lookahead:
    """The trie as a draft strategy; it is shared by all sequences and remembers their outputs.

    Args:
        branch: tokens of a branch.
        match: last tokens that a query tries to match, the longest match first.
        eos: end-of-sequence token.
    """

    def __init__(self, branch: int = 8, match: int = 2, eos: int | None = None) -> None:
        self.trie = Trie(eos)
        self.branch = branch
        self.match = match
        self._sessions = 0

    def session(self, prompt: Sequence[int], noise: Noise, room: int) -> LookaheadSession:
        self._sessions += 1
        self.trie.put(prompt, self.branch, self._sessions)
        return LookaheadSession(self, self._sessions)


class LookaheadSession:
    """One sequence's view of the trie."""

    def __init__(self, strategy: Lookahead, number: int) -> None:
        self.strategy = strategy
        self.number = number

    def propose(self, context: Sequence[int], budget: int) -> Draft:
        key = list(context[-self.strategy.match :])
        found = self.strategy.trie.query(
            key, budget + 1, self.strategy.branch, 0, max(budget // 2, 1), prompt=self.number
        )
        return Draft(found.tokens[1:], [up - 1 for up in found.parent[1:]])

    def observe(self, verdict: Verdict) -> None:
        self.strategy.trie.stream(verdict.emitted, self.strategy.branch, self.number)
