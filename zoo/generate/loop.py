"""The loop that every way of decoding shares: ask for the next forward pass, run it, take its logits.

A `Scheme` knows the order in which tokens come into being (left to right with or without drafts, in blocks, by
confidence); the target knows the model. Neither knows the other's insides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor

Work = TypeVar("Work")


class Scheme(Protocol[Work]):
    """An order of decoding."""

    def next(self) -> Work | None:
        """What the next forward pass works on; None when all is decoded."""

    def take(self, work: Work, logits: Tensor) -> None:
        """Decide on the logits that *work* came back with."""


def decode(scheme: Scheme[Work], target: Callable[[Work], Tensor]) -> None:
    """Run *scheme* to its end."""
    while (work := scheme.next()) is not None:
        scheme.take(work, target(work))
