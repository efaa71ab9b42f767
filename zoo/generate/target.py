"""The model under the loop: it holds the states, runs token trees on top of them and keeps the accepted path.

Attention serves a tree in one pass, masked. Recurrent states fold tokens together, so a tree becomes one row for each
of its paths, run from copies of the state; the accepted path is then run again, unless it is a whole row already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.lean import LeanDecoder
from zoo.generate.prompts import branches
from zoo.nn.kv import KVState, RingState
from zoo.nn.layout import Layout
from zoo.nn.policy import CachePolicy, managed
from zoo.nn.state import Stack

_MANY = 64  # passes that repay copying the weights
_ROOM = 4 << 30  # bytes of weights that are copied at most


class ModelTarget:
    """A sequence model with its decoding states.

    Attributes:
        state: what the layers remember; B rows.
        trees: drafts are taken back from the states themselves, so rows may keep different numbers of tokens.
        forwards: passes so far.
        shift: added to the number of cached tokens to give the position of the next one.

    Args:
        model: a SequenceModel with a language-model head.
        batch: rows.
        capacity: tokens a row, drafts included.
        policy: what caches keep; None keeps all.
        lean: use the lean pass where the model fits.
        passes: how many are expected; 64 are worth a copy of the weights in a faster order (on a CPU, of up to 4 GiB),
            which lives as long as the target.
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        capacity: int,
        policy: CachePolicy | None = None,
        lean: bool = True,
        passes: int = 0,
    ) -> None:
        weight = model.embed.weight
        self.model = model
        self.capacity = capacity
        self.state = model.init_state(batch, capacity, weight.device, weight.dtype)
        if policy is not None:
            self.state = managed(self.state, policy)
        self.trees = _takes_back(self.state)
        full = isinstance(self.state, Stack) and all(isinstance(layer, KVState) for layer in self.state.layers)
        copy = passes >= _MANY and sum(p.numel() * p.element_size() for p in model.parameters()) <= _ROOM
        self.lean = LeanDecoder(model, copy) if lean and full and LeanDecoder.fits(model) else None
        self.forwards = 0
        self.shift = 0
        self.hidden: Tensor | None = None
        self._open: tuple[Tensor, list[list[int]], Any] | None = None  # a tree run by paths

    def prefill(self, ids: Tensor, valid: Tensor | None = None, chunk: int = 0) -> Tensor:
        """Consume prompts [B, L], padded on the left; logits [B, V] after their last tokens."""
        size = chunk or ids.shape[1]
        for start in range(0, ids.shape[1], size):
            piece = ids[:, start : start + size]
            layout = Layout("causal", valid=None if valid is None else valid[:, start : start + size])
            hidden, self.state = self.model.forward_features(piece, layout, self.state)
            self.forwards += 1
        self.hidden = hidden[:, -1:]
        return self._head(self.hidden)[:, 0]

    def prefill_set(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Consume prompts [B, L] of a prefix, segments that do not see each other, and a suffix of these *lengths*.

        The segments are a draft's branches that all stay, so their order changes nothing (set-based prompting).

        Raises:
            ZooError: lengths that do not fit, or a model that is not attention throughout.
        """
        prefix, *segments, suffix = lengths
        if sum(lengths) != ids.shape[1] or min(prefix, suffix) < 1:
            raise ZooError(f"segments {list(lengths)} must sum to the {ids.shape[1]} tokens, both ends at least 1")
        if not self.trees:
            raise ZooError("a set of segments needs a model whose layers are all attention")
        self.prefill(ids[:, :prefix])
        inner = sum(segments)
        if inner:
            self.tree(ids[:, prefix : prefix + inner], branches(segments).to(ids.device))
            self.commit(torch.arange(inner, device=ids.device).expand(len(ids), -1))
            self.shift = max(segments) - inner
        return self.append(ids[:, prefix + inner :])[:, -1]

    def _head(self, hidden: Tensor) -> Tensor:
        """Logits over the tokens that mean something: rows that only fill up the embedding are cut off."""
        logits = self.model.forward_head(hidden) if self.lean is None else self.lean.logits(hidden)
        return logits[..., : self.model.config.vocab_size]

    def step(self, tokens: Tensor) -> Tensor:
        """Consume one token a row [B, 1]: logits [B, V]."""
        return self.append(tokens)[:, -1]

    def append(self, tokens: Tensor) -> Tensor:
        """Consume tokens [B, n], all of which stay: logits [B, n, V]."""
        self.forwards += 1
        if self.lean is not None and tokens.shape[1] == 1 and not self.shift:
            self.hidden = self.lean(tokens, self.state)
        else:
            layout = Layout("causal")
            if self.shift:
                place = self.state.layers[0].length + self.shift + torch.arange(tokens.shape[1], device=tokens.device)
                layout = Layout("causal", position=place.expand(len(tokens), -1))
            self.hidden, self.state = self.model.forward_features(tokens, layout, self.state)
        return self._head(self.hidden)

    def block(self, tokens: Tensor) -> Tensor:
        """Consume a block [B, n] whose tokens all see each other: logits [B, n, V]."""
        self.forwards += 1
        index = torch.zeros(1, tokens.shape[1], dtype=torch.long, device=tokens.device)
        layout = Layout("block_causal", block=index)
        self.hidden, self.state = self.model.forward_features(tokens, layout, self.state)
        return self._head(self.hidden)

    def tree(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Logits [B, n, V] of a tree: tokens [B, n], parent [B, n] (-1: the last consumed token). `commit` follows.

        Raises:
            ZooError: several rows of a model whose states cannot take tokens back.
        """
        self.forwards += 1
        if self.trees:
            if self.lean is not None:
                self.hidden = self.lean(tokens, self.state, parent)
            else:
                layout = Layout("causal", parent=parent)
                self.hidden, self.state = self.model.forward_features(tokens, layout, self.state)
            return self._head(self.hidden)
        if len(tokens) != 1:
            raise ZooError("drafts for models with recurrent states are verified one sequence at a time")
        return self._by_paths(tokens, parent[0].tolist())

    def _by_paths(self, tokens: Tensor, parent: list[int]) -> Tensor:
        n, paths = tokens.shape[1], []
        for leaf in set(range(n)) - set(parent):
            path, node = [], leaf
            while node >= 0:
                path.append(node)
                node = parent[node]
            paths.append(path[::-1])
        longest = max(map(len, paths))
        padded = torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths], device=tokens.device)
        rows = self.state.select(torch.zeros(len(paths), dtype=torch.long, device=tokens.device))
        hidden, after = self.model.forward_features(tokens[0][padded], Layout("causal"), rows)
        at = {node: (row, depth) for row, path in enumerate(paths) for depth, node in enumerate(path)}
        row, depth = (torch.tensor([at[node][axis] for node in range(n)], device=tokens.device) for axis in (0, 1))
        self.hidden = hidden[row, depth][None]
        self._open = (tokens, [path if len(path) == longest else [] for path in paths], after)
        return self._head(self.hidden)

    def commit(self, path: Tensor) -> None:
        """Keep, of the last tree, the nodes on *path* [B, m] in that order; -1 pads shorter paths."""
        if self._open is None:
            self.state = self.state.commit(path)
            return
        (tokens, paths, after), self._open = self._open, None
        nodes = [node for node in path[0].tolist() if node >= 0]
        whole = next((row for row, nodes_ in enumerate(paths) if nodes_ == nodes), None)
        if whole is not None:
            self.state = after.select(torch.tensor([whole], device=tokens.device))
        elif nodes:
            self.forwards += 1
            _, self.state = self.model.forward_features(tokens[:, nodes], Layout("causal"), self.state)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only (or with copies of them)."""
        self.state = self.state.select(rows)

    def save(self) -> Callable[[], None]:
        """A function that brings the present state back, whatever was consumed since."""
        state = self.state
        if self.trees and isinstance(state, Stack) and all(isinstance(layer, KVState) for layer in state.layers):
            kept = [(layer, layer.length, layer.base, layer.longest) for layer in state.layers]  # type: ignore[union-attr]

            def back() -> None:  # what lies beyond the length is never read
                for layer, length, base, longest in kept:
                    layer.length, layer.base, layer.longest = length, base, longest  # type: ignore[union-attr]

            return back
        rows = torch.arange(_rows(state))
        copy = state.select(rows)

        def restore() -> None:
            self.state = copy.select(rows)

        return restore


class GuidedTarget:
    """Classifier-free guidance: rows with and without the condition side by side, their logits combined.

    Args:
        inner: a target of 2B rows, the conditional ones first.
        scale: guidance scale as a function of the tokens emitted so far.
    """

    def __init__(self, inner: ModelTarget, scale: Callable[[int], float]) -> None:
        self.inner = inner
        self.scale = scale
        self.emitted = [0] * (_rows(inner.state) // 2)
        self.trees = inner.trees
        self._roots: Tensor | None = None  # [B] last tokens of the prompts without the condition, not consumed yet

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    @property
    def state(self) -> Any:
        return self.inner.state

    @property
    def hidden(self) -> Tensor | None:
        hidden = self.inner.hidden
        return None if hidden is None else hidden.chunk(2)[0]

    def _mix(self, logits: Tensor, depth: list[list[int]]) -> Tensor:
        """Logits [2B, n, V] combined, token i of a row being the one after emitted + depth[row][i] others."""
        scale = [[self.scale(sent + d) for d in line] for sent, line in zip(self.emitted, depth, strict=True)]
        given, without = logits.chunk(2)
        return without + (given - without) * torch.tensor(scale, device=logits.device, dtype=logits.dtype)[..., None]

    def prefill(self, ids: Tensor, valid: Tensor | None = None, chunk: int = 0) -> Tensor:
        logits = self._mix(self.inner.prefill(ids, valid, chunk)[:, None], [[0]] * len(self.emitted))[:, 0]
        self.emitted = [1] * len(self.emitted)
        return logits

    def hold(self, roots: Tensor) -> None:
        """The last prompt tokens [B] without the condition are consumed with the first pass (drafts hang on them)."""
        self._roots = roots
        self.emitted = [0] * len(self.emitted)

    def _both(self, tokens: Tensor) -> Tensor:
        other, roots, self._roots = tokens, self._roots, None
        if roots is not None:
            other = tokens.clone()
            other[:, 0] = roots
        return torch.cat([tokens, other])

    def append(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        logits = self._mix(self.inner.append(self._both(tokens)), [list(range(count))] * len(tokens))
        self.emitted = [sent + count for sent in self.emitted]
        return logits

    def tree(self, tokens: Tensor, parent: Tensor) -> Tensor:
        """Logits [B, n, V] of a tree, as `ModelTarget.tree`; a schedule goes by each guess's depth."""
        depth: list[list[int]] = []
        for line in parent.tolist():
            depth.append([])
            for up in line:
                depth[-1].append(0 if up < 0 else depth[-1][up] + 1)
        return self._mix(self.inner.tree(self._both(tokens), parent.repeat(2, 1)), depth)

    def commit(self, path: Tensor) -> None:
        self.inner.commit(path.repeat(2, 1))
        kept = (path >= 0).sum(1).tolist()
        self.emitted = [sent + count for sent, count in zip(self.emitted, kept, strict=True)]

    def step(self, tokens: Tensor) -> Tensor:
        return self.append(tokens)[:, -1]

    def block(self, tokens: Tensor) -> Tensor:
        """A block whose tokens come into being together, all at the scale of the first of the next block."""
        count = tokens.shape[1]
        self.emitted = [sent + count for sent in self.emitted]
        return self._mix(self.inner.block(tokens.repeat(2, 1)), [[0] * count] * len(tokens))

    def select(self, rows: Tensor) -> None:
        half = _rows(self.inner.state) // 2
        self.inner.select(torch.cat([rows, rows + half]))
        self.emitted = [self.emitted[row] for row in rows.tolist()]
        self._roots = None if self._roots is None else self._roots[rows]


def _takes_back(state: Any) -> bool:
    if isinstance(state, Stack):
        return all(_takes_back(layer) for layer in state.layers)
    return isinstance(state, KVState | RingState)


def _rows(state: Any) -> int:
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor))
        return tensor

    state._map(note)
    return sizes[0]
