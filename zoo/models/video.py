"""The common part of the video tokenizers: what they take, and the checks on it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.models.visual import Reconstruction, VisualModel


class VideoModel(VisualModel):
    """Base class: clips [B, 3, T, H, W] in [0, 1] <-> ids [B, T', H', W'].

    Attributes:
        factor: frames, rows and columns that one token stands for.
        span: lowest and highest pixel value of the network's own scale.
        lone_first: the first frame has tokens of its own: T = 1 + (T' - 1) · factor[0], and a picture is a clip of one
            frame. Otherwise T = T' · factor[0].
    """

    config: Any
    factor: tuple[int, int, int]
    span: ClassVar[tuple[float, float]] = (0.0, 1.0)
    lone_first: ClassVar[bool] = True

    def check_clip(self, clip: Tensor) -> None:
        """Raise ZooError unless *clip* is [B, 3, T, H, W] of sizes that the factors divide."""
        name, shape = type(self).__name__, list(clip.shape)
        if clip.ndim != 5 or shape[1] != 3:
            raise ZooError(f"{name} takes clips [B, 3, T, H, W], got {shape}")
        t, h, w = self.factor
        if (shape[2] - int(self.lone_first)) % t:
            rule = f"1 + a multiple of {t}" if self.lone_first else f"a multiple of {t}"
            raise ZooError(f"{name} takes {rule} frames, got {shape[2]}")
        if shape[3] % h or shape[4] % w:
            raise ZooError(f"{name} takes sides that are multiples of {h} and {w}, got {shape[3]} x {shape[4]}")

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of a clip."""
        t, h, w = self.factor
        return (frames - 1) // t + 1 if self.lone_first else frames // t, height // h, width // w

    def check_ids(self, ids: Tensor) -> None:
        """Raise ZooError unless *ids* is [B, T', H', W'] with values below the vocabulary's size."""
        if ids.ndim != 4:
            raise ZooError(f"{type(self).__name__} takes ids [B, T, H, W], got {list(ids.shape)}")
        super().check_ids(ids.flatten(1))

    def normalized(self, clip: Tensor) -> Tensor:
        """[0, 1] -> the network's scale."""
        low, high = self.span
        return clip if (low, high) == (0.0, 1.0) else clip * (high - low) + low

    def pixels(self, output: Tensor) -> Tensor:
        """The inverse of `normalized`."""
        low, high = self.span
        return output if (low, high) == (0.0, 1.0) else (output - low) / (high - low)

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: two tokens in time and in each direction."""
        t, h, w = self.factor
        size = (1, 3, t + 1 if self.lone_first else 2 * t, 2 * h, 2 * w)
        return {"clip": torch.rand(size, generator=torch.Generator().manual_seed(20))}


class ConvVideoModel(VideoModel):
    """An encoder, a quantizer of the vectors at its places, and a decoder, all between clips and latents
    [B, D, T', H', W'] on the network's own scale.
    """

    quantizer: Any
    decoder: nn.Module

    def to_latent(self, clip: Tensor) -> Tensor:
        """[B, 3, T, H, W] -> [B, D, T', H', W'] before quantization."""
        raise NotImplementedError

    def from_codes(self, codes: Tensor) -> Tensor:
        """[B, D, T', H', W'] -> [B, 3, T, H, W]."""
        raise NotImplementedError

    def forward(self, clip: Tensor) -> Reconstruction:
        """Training form.

        Raises:
            ZooError: a clip whose sizes the factors do not divide.
        """
        self.check_clip(clip)
        z = self.to_latent(self.normalized(clip))
        result = self.quantizer(z.movedim(1, -1))
        output = self.pixels(self.from_codes(result.codes.movedim(-1, 1).to(z.dtype)))
        return Reconstruction(output, result.ids, result.loss, result.parts)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """[B, T', H', W'] -> [B, 3, T, H, W], nominally in [0, 1], unclamped."""
        self.check_ids(ids)
        dtype = next(self.decoder.parameters()).dtype
        return self.pixels(self.from_codes(self.quantizer.lookup(ids).movedim(-1, 1).to(dtype)))
