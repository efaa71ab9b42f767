"""How close a video tokenizer's reconstructions, and a next-block model's continuations, come to the clips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.generate.next_block import generate_blocks
from zoo.models.nbp import NBP
from zoo.models.video import VideoModel
from zoo.nn.video_metrics import Preprocessing, frame_psnr, frame_ssim, frechet, i3d_features


class FrechetVideo:
    """Frechet video distance, clip by clip; *form* names the preprocessing (see `zoo.nn.video_metrics`)."""

    def __init__(self, network: Any, form: Preprocessing) -> None:
        self.network, self.form = network, form
        self.real: list[Tensor] = []
        self.fake: list[Tensor] = []

    def update(self, real: Tensor, fake: Tensor) -> None:
        """Clips [B, 3, T, H, W] in [0, 1]; the first 16 frames count, as in published numbers."""
        self.real.append(i3d_features(self.network, real[:, :, :16], self.form))
        self.fake.append(i3d_features(self.network, fake[:, :, :16], self.form))

    def compute(self) -> float:
        return frechet(torch.cat(self.real), torch.cat(self.fake), self.form)


@torch.inference_mode()
def reconstruction(
    model: VideoModel, batches: Iterable[dict[str, Any]], fvd: FrechetVideo | None = None
) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM of the frames, of the first one and of the last one, and the distance where asked."""
    sums: list[Tensor] = []
    for batch in batches:
        real = torch.as_tensor(batch["pixels"])
        fake = _rebuilt(model, real)
        sums.append(torch.stack([frame_psnr(real, fake), frame_ssim(real, fake)]))
        if fvd is not None:
            fvd.update(real, fake)
    if not sums:
        raise ZooError("the split holds no clip")
    psnr, ssim = torch.cat(sums, 1).mean(1)  # [2, T]
    out = {"psnr": psnr.mean(), "ssim": ssim.mean(), "psnr_first_frame": psnr[0], "psnr_last_frame": psnr[-1]}
    return {name: float(value) for name, value in out.items()} | ({"fvd": fvd.compute()} if fvd is not None else {})


def _rebuilt(model: VideoModel, clips: Tensor) -> Tensor:
    rebuilt = model(clips).output if model.vocab_size is None else model.decode(model.encode(clips))
    return rebuilt.float().clamp(0, 1)


@torch.inference_mode()
def continuation(
    model: NBP,
    tokenizer: VideoModel,
    batches: Iterable[dict[str, Any]],
    given: int = 2,
    fvd: FrechetVideo | None = None,
    **sampling: Any,
) -> dict[str, float]:
    """Clips continued from their first *given* latent frames.

    PSNR of the next frame, and of the frames of the next latent frame, beside what repeating the last given frame
    reaches (`copy_...`) and what the tokenizer can reach at all (`tokenizer_...`).

    Raises:
        ZooError: the model takes no frames, or makes clips of another size.
    """
    if model.config.hybrid:
        raise ZooError("a hybrid NBP begins each clip itself: it continues none")
    step, _, _ = tokenizer.factor
    first = 1 + (given - 1) * step if tokenizer.lone_first else given * step
    rows: list[Tensor] = []
    for batch in batches:
        real = torch.as_tensor(batch["pixels"])
        codes = tokenizer.encode(real)
        if tuple(codes.shape[1:]) != tuple(model.config.grid):
            raise ZooError(
                f"the model makes clips of {list(model.config.grid)} tokens, these have {list(codes.shape[1:])}"
            )
        made = generate_blocks(model, frames=codes[:, :given], **sampling).codes
        fake = tokenizer.decode(made).clamp(0, 1)
        still = real[:, :, first - 1 : first].expand_as(real)
        coded = tokenizer.decode(codes).clamp(0, 1)
        rows.append(torch.stack([frame_psnr(real, other)[:, first : first + step] for other in (fake, still, coded)]))
        if fvd is not None:
            fvd.update(real, fake)
    if not rows:
        raise ZooError("the split holds no clip")
    found = torch.cat(rows, 1).mean(1)  # [3, step]
    out: dict[str, float] = {}
    for name, values in zip(("", "copy_", "tokenizer_"), found, strict=True):
        out |= {f"{name}psnr_next_frame": float(values[0]), f"{name}psnr_next_{step}": float(values.mean())}
    return out | ({"fvd": fvd.compute()} if fvd is not None else {})
