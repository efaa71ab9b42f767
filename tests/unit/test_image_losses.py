"""GAN and perceptual losses, and picture metrics against independent implementations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import linalg

from zoo.errors import ZooError
from zoo.models.discriminator import (
    LeCam,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)
from zoo.nn.image_metrics import fid, inception_score, moments, psnr, ssim
from zoo.nn.perceptual import LPIPS, PerceptualConfig, PerceptualLoss


def test_discriminator_learns_to_tell_two_distributions_apart() -> None:
    model = PatchDiscriminator(PatchDiscriminatorConfig(hidden=32, stages=2, patches=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    real, fake = torch.rand(4, 3, 16, 16), 0.5 * torch.rand(4, 3, 16, 16)
    first = hinge_loss(model(real), model(fake)).item()
    for _ in range(10):
        loss = hinge_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    assert generator_loss(model(real)) < generator_loss(model(fake))


def test_hinge_is_zero_beyond_the_margin() -> None:
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-3.0])) == 0


def test_lecam_follows_the_means() -> None:
    lecam = LeCam(decay=0.5)
    assert torch.allclose(lecam(torch.tensor([2.0]), torch.tensor([-1.0])), torch.tensor(2.0**2 + 1.0**2))
    assert lecam.ema_real.item() == 1.0
    assert lecam.ema_fake.item() == -0.5


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    w = torch.ones(3, requires_grad=True)
    assert abs(adaptive_weight((6 * w).sum(), (2 * w).sum(), w).item() - 3) < 1e-3


def test_perceptual_loss_needs_its_weights(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="lpips_weights"):
        PerceptualLoss(PerceptualConfig(lpips=1.0))
    with pytest.raises(ZooError, match="not at"):
        PerceptualLoss(PerceptualConfig(convnext=1.0, convnext_weights=str(tmp_path / "none.pth")))
    file = tmp_path / "lpips.pt"
    torch.save(LPIPS().state_dict(), file)
    with pytest.raises(ZooError, match="sha256"):
        PerceptualLoss(PerceptualConfig(lpips=1.0, lpips_weights=str(file), lpips_sha256="0" * 64))
    loss = PerceptualLoss(PerceptualConfig(lpips=2.0, lpips_weights=str(file))).train()
    assert not loss.training
    a = torch.rand(1, 3, 32, 32, requires_grad=True)
    value = loss(a, torch.rand(1, 3, 32, 32))
    value.backward()
    assert a.grad.abs().sum() > 0
    assert loss(a, a).item() == 0


def test_lpips_from_its_two_published_files(tmp_path: Path) -> None:
    from torchvision.models import vgg16

    whole, heads, vgg = LPIPS(), tmp_path / "vgg.pth", tmp_path / "vgg16.pth"
    network = vgg16(weights=None)
    torch.save({f"lin{i}.model.1.weight": head.weight.data for i, head in enumerate(whole.heads)}, heads)
    torch.save(network.state_dict(), vgg)
    with pytest.raises(ZooError, match="vgg_weights"):
        PerceptualLoss(PerceptualConfig(lpips=1.0, lpips_weights=str(heads)))
    loss = PerceptualLoss(PerceptualConfig(lpips=1.0, lpips_weights=str(heads), vgg_weights=str(vgg)))
    x = torch.rand(1, 3, 32, 32)
    assert torch.allclose(loss.lpips.features(x)[-1], network.features[:30](x), atol=1e-5)
    assert torch.equal(loss.lpips.heads[2].weight, whole.heads[2].weight)


def test_no_terms_cost_nothing() -> None:
    assert PerceptualLoss(PerceptualConfig())(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)) == 0


def test_fid_equals_the_textbook_formula() -> None:
    a, b = torch.randn(200, 6, dtype=torch.float64), 1.5 * torch.randn(150, 6, dtype=torch.float64) + 0.3
    (ma, ca), (mb, cb) = moments(a), moments(b)
    assert np.allclose(ca.numpy(), np.cov(a.numpy(), rowvar=False))
    root = linalg.sqrtm(ca.numpy() @ cb.numpy()).real
    want = float(((ma - mb) ** 2).sum()) + np.trace(ca.numpy() + cb.numpy() - 2 * root)
    assert abs(fid(a, b) - want) < 1e-8
    assert abs(fid(a, a)) < 1e-9
    assert fid(a[:4], b[:4]) > 0  # singular covariances


def test_inception_score_bounds() -> None:
    sure = 50 * torch.eye(10)
    assert abs(inception_score(sure) - 10) < 1e-6
    assert abs(inception_score(torch.zeros(10, 10)) - 1) < 1e-9


def test_psnr_and_ssim_equal_torchmetrics() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a = torch.rand(2, 3, 24, 24)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    want = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(a, b).float(), want, atol=1e-4)
    assert ssim(a, a).min() > 0.999999
    # torchmetrics reflects the border first; ours takes the positions where the window fits, as the paper does
    want = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    x, y = (F.pad(v, (5, 5, 5, 5), mode="reflect") for v in (a, b))
    assert torch.allclose(ssim(x, y).float(), want, atol=1e-4)
