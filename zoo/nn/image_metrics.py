"""The arithmetic of picture metrics: PSNR, SSIM, Fréchet distance (FID), Inception score. No feature extractor.

FID: Heusel et al. 2017 (arXiv 1706.08500); IS: Salimans et al. 2016 (arXiv 1606.03498); SSIM: Wang et al. 2004.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> Tensor:
    """[B] peak signal-to-noise ratio in dB of pictures [B, C, H, W] in [0, peak]."""
    return 10 * torch.log10(peak**2 / (a.double() - b.double()).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor, peak: float = 1.0, window: int = 11, sigma: float = 1.5) -> Tensor:
    """[B] structural similarity of pictures [B, C, H, W], Gaussian window, valid positions only."""
    offset = torch.arange(window, dtype=torch.float64, device=a.device) - (window - 1) / 2
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    channels = a.shape[1]
    kernel = (line[:, None] * line / line.sum() ** 2).expand(channels, 1, window, window)
    x, y = a.double(), b.double()
    mx, my, xx, yy, xy = (F.conv2d(v, kernel, groups=channels) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (divided by n - 1) of features [N, D], in float64."""
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, |μa - μb|² + tr(A + B - 2 (A B)^½).

    The trace of the root is taken from the eigenvalues of A^½ B A^½, which is symmetric: it exists for singular
    covariances too (fewer samples than features) and has no imaginary part.
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.double() @ root).clamp_min(0).sqrt().sum()
    gap = (mean_a.double() - mean_b.double()).square().sum()
    return float(gap + cov_a.double().trace() + cov_b.double().trace() - 2 * cross)


def fid(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of two feature sets [N, D] and [M, D]."""
    return frechet_distance(*moments(real), *moments(fake))


def inception_score(logits: Tensor) -> float:
    """exp of the mean KL divergence between each class distribution and their mean; logits [N, classes], one split."""
    p = torch.softmax(logits.double(), -1)
    mean = p.mean(0)
    return float((p * (p.clamp_min(1e-30).log() - mean.clamp_min(1e-30).log())).sum(1).mean().exp())
