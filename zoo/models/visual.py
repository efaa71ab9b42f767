"""The common part of the visual tokenizers: what `forward` returns for training, and the checks on what goes in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.mixer import ParamGroup


@dataclass
class Reconstruction:
    """Output of a visual tokenizer in training.

    Attributes:
        output: [B, 3, H, W] pixels in [0, 1], or [B, V, h, w] logits of proxy codes (TiTok stage 1).
        ids: [B, K] int64, None for a continuous tokenizer.
        loss: the bottleneck's loss (quantizer loss or weighted KL).
        parts: its terms, for logging.
    """

    output: Tensor
    ids: Tensor | None
    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class VisualModel(nn.Module):
    """Base class: `config.preprocess`, `vocab_size`, `num_tokens`, and the verbs `encode` and `decode`.

    `ordered`: any first few of a picture's ids decode to a picture, by sampling with steps and guidance (FlexTok).
    """

    config: Any
    vocab_size: int | None
    num_tokens: int
    ordered: ClassVar[bool] = False

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, K] int64."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """[B, K] -> [B, 3, H, W], nominally in [0, 1], unclamped."""
        raise NotImplementedError

    def example_inputs(self) -> dict[str, Tensor]:
        """Arguments of `forward`, made from a seed: what a saved model is checked with."""
        size = self.config.preprocess.size
        return {"pixels": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(20))}

    def check_pixels(self, pixels: Tensor, multiple: int | None = None) -> None:
        """Raise ZooError unless *pixels* is [B, 3, size, size] (or sides that are multiples of *multiple*)."""
        size, shape = self.config.preprocess.size, list(pixels.shape)
        name = type(self).__name__
        if pixels.ndim != 4 or shape[1] != 3:
            raise ZooError(f"{name} takes pixels [B, 3, H, W], got {shape}")
        if multiple is not None:
            if shape[2] % multiple or shape[3] % multiple:
                raise ZooError(
                    f"{name} takes pictures whose sides are multiples of {multiple}, got {shape[2]} x {shape[3]}"
                )
        elif shape[2:] != [size, size]:
            raise ZooError(
                f"{name} was built for {size} x {size} pictures, got {shape[2]} x {shape[3]}; resize or crop first"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise ZooError unless *ids* is [B, K] with values below the vocabulary's size."""
        name = type(self).__name__
        if self.vocab_size is None:
            raise self.continuous()
        if ids.ndim != 2:
            raise ZooError(f"{name} takes ids [B, K], got {list(ids.shape)}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise ZooError(
                f"{name} takes ids from 0 to {self.vocab_size - 1}, got {int(ids.min())} to {int(ids.max())}"
            )

    def continuous(self) -> ZooError:
        """The error of asking a VAE for ids."""
        return ZooError(
            f"{type(self).__name__} is continuous here (VAE): use encode_latents and decode_latents instead of ids"
        )

    def param_groups(self) -> list[ParamGroup]:
        """Weight matrices with the task's weight decay; gains, biases, tokens and embeddings without."""
        decay: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (plain if parameter.ndim < 2 or any(w in name for w in ("embed", "token", "norm")) else decay).append(
                    parameter
                )
        groups: list[ParamGroup] = [{"params": decay}] if decay else []
        return [*groups, {"params": plain, "weight_decay": 0.0}] if plain else groups

    def set_grad_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the transformer blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if module is not self and hasattr(module, "grad_checkpointing"):
                setattr(module, "grad_checkpointing", enabled)  # noqa: B010


def trunc_normal_init(module: nn.Module, std: float = 0.02) -> None:
    """Truncated normal weights and zero biases in linear layers and convolutions, for `module.apply`."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=std)


def to_uint8(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] -> uint8 by truncation, as TiTok's evaluator does before it computes any metric."""
    return (pixels.clamp(0, 1) * 255).to(torch.uint8)
