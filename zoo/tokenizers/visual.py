"""The protocol of visual tokenizers: models that turn pictures into ids and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class VisualTokenizer(Protocol):
    """A model with the verbs of a tokenizer.

    Attributes:
        vocab_size: number of ids, None for a continuous (VAE) tokenizer.
        num_tokens: ids of a picture of the configured size.
        config: holds `preprocess`, which says how a file becomes the pixels that `encode` takes.
    """

    vocab_size: int | None
    num_tokens: int
    config: Any

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, K] int64."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """[B, K] -> [B, 3, H, W], nominally in [0, 1], unclamped."""
        ...
