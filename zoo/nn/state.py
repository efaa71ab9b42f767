"""Decoding states: what a mixer remembers of the tokens it has consumed. Typed, batch-first, never hidden in a dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor


@dataclasses.dataclass
class State:
    """Base of all states. Every tensor field has the batch as its first axis; nested states and lists are followed.

    `forward` and `step` of a mixer return the state that continues the sequence; they may reuse (mutate) the storage
    of the one they were given, so a caller that wants to branch takes `select` first, which copies.
    """

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        def go(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, State):
                return value._map(change)
            if isinstance(value, list | tuple):
                return type(value)(go(item) for item in value)
            return value

        return type(self)(**{f.name: go(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def nbytes(self) -> int:
        """Bytes held by all tensors of this state."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        self._map(count)
        return total

    def select(self, rows: Tensor) -> Self:
        """A copy holding batch rows *rows* [N] in that order (beam search, several samples from one prompt)."""
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def detach(self) -> Self:
        """The same values cut from the autograd graph (truncated back-propagation through time)."""
        return self._map(torch.Tensor.detach)

    def commit(self, path: Tensor) -> Self:
        """Keep, of the draft tokens of the last call, only those on *path* ([B, n] indices among the new tokens).

        Raises:
            TypeError: this state folds tokens together and cannot drop one (recurrent states keep a snapshot instead).
        """
        raise TypeError(f"{type(self).__name__} cannot drop tokens it has folded in; decode drafts from a copy")


@dataclasses.dataclass
class Stack(State):
    """The states of a stack of layers, in order; None for a layer that needs none."""

    layers: list[State | None]

    def commit(self, path: Tensor) -> Self:
        return type(self)([None if layer is None else layer.commit(path) for layer in self.layers])
