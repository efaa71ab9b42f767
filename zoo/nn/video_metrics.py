"""Frechet video distance and frame errors, in the forms that published numbers use.

Unterthiner et al. 2018, arXiv:1812.01717. Three preprocessings are in use and give different numbers: a report names
the one it used.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.nn.image_metrics import ssim

Preprocessing = Literal["styleganv", "videogpt", "direct"]
_FORMS = ("styleganv", "videogpt", "direct")


def preprocess(clips: Tensor, form: Preprocessing = "styleganv", size: int = 224) -> Tensor:
    """Clips [B, 3, T, H, W] in [0, 1] -> [B, 3, T, size, size] in [-1, 1]: shorter side to *size*, centre crop.

    `videogpt` cuts the values to bytes first; `direct` (NBP's own evaluation) does too, and then resizes both sides to
    *size* whatever the aspect ratio.

    Raises:
        ZooError: an unknown form.
    """
    if form not in _FORMS:
        raise ZooError(f"unknown FVD preprocessing '{form}': {', '.join(_FORMS)}")
    if form != "styleganv":
        clips = (clips * 255).to(torch.uint8).float() / 255
    height, width = clips.shape[-2:]
    scale = size / min(height, width)
    # the longer side is rounded up, as the official code does
    long = int(np.ceil(max(height, width) * scale))
    target = (size, long) if height < width else (long, size)
    if form == "direct":
        target = (size, size)
    flat = clips.transpose(1, 2).flatten(0, 1)  # [B T, 3, H, W]
    flat = F.interpolate(flat, size=target, mode="bilinear", align_corners=False)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    flat = flat[..., top : top + size, left : left + size]
    out = flat.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)
    return (out - 0.5) * 2


def frechet(real: Tensor, fake: Tensor, form: Preprocessing = "styleganv") -> float:
    """Distance between Gaussians fitted to features [N, D] and [M, D], in float64.

    `styleganv` takes the root of the product of the covariances by Schur decomposition, the others by two singular
    value decompositions; they agree but for rounding.

    Raises:
        ZooError: fewer than two clips on either side.
    """
    if min(len(real), len(fake)) < 2:
        raise ZooError(f"a Frechet distance needs at least 2 clips a side, got {len(real)} and {len(fake)}")
    x, y = (t.detach().cpu().double().numpy() for t in (real, fake))
    mean = np.square(x.mean(0) - y.mean(0)).sum()
    a, b = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    if form != "styleganv":
        root = _symmetric_root(a)
        trace = np.trace(_symmetric_root(root @ b @ root))
    else:
        from scipy.linalg import sqrtm

        trace = np.trace(np.real(sqrtm(a @ b)))
    return float(mean + np.trace(a) + np.trace(b) - 2 * trace)


def _symmetric_root(matrix: np.ndarray, eps: float = 1e-10) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix)
    return (u * np.where(s < eps, s, np.sqrt(s))) @ vt


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of [B, ...] in [0, 1], over everything but the batch."""
    error = (255 * (real - fake)).square().flatten(1).mean(1)
    return 20 * torch.log10(255 / error.sqrt())


def frame_psnr(real: Tensor, fake: Tensor) -> Tensor:
    """[B, T] peak signal-to-noise ratio in dB of each frame of clips [B, C, T, H, W] in [0, 1]; inf where equal."""
    return -10 * torch.log10((real - fake).square().mean((1, 3, 4)))


def frame_ssim(real: Tensor, fake: Tensor) -> Tensor:
    """[B, T] structural similarity of each frame of clips [B, C, T, H, W] in [0, 1]; frames of at least 11 pixels.

    Wang et al. 2004: Gaussian window of 11 pixels and deviation 1.5.
    """
    frames = lambda x: x.transpose(1, 2).flatten(0, 1)
    return ssim(frames(real), frames(fake)).reshape(len(real), -1).to(real.dtype)


@torch.inference_mode()
def i3d_features(model: nn.Module, clips: Tensor, form: Preprocessing = "styleganv", batch: int = 4) -> Tensor:
    """[B, 400] logits of an `InceptionI3d` of clips [B, 3, T, H, W] in [0, 1], at least 9 frames each.

    Raises:
        ZooError: shorter clips.
    """
    if clips.shape[2] < 9:
        raise ZooError(f"I3D needs clips of at least 9 frames, got {clips.shape[2]}")
    return torch.cat([model(preprocess(part, form)) for part in clips.split(batch)])
