"""Quantizers: index layouts round-trip, gradients pass, closed forms equal brute force, dead codes come alive."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from zoo.config import from_dict
from zoo.errors import ConfigError
from zoo.nn.codebook import codebook_usage
from zoo.nn.elastic import NestedDropout, prefix_mask, sample_keep
from zoo.nn.fsq import FSQ, FSQConfig
from zoo.nn.lfq import LFQ, LFQConfig
from zoo.nn.vae_bottleneck import DiagonalGaussian
from zoo.nn.vq import VectorQuantizer, VectorQuantizerConfig


@pytest.mark.parametrize("l2_norm", [False, True])
def test_vq_finds_the_nearest_code_and_passes_gradients(l2_norm: bool) -> None:
    vq = VectorQuantizer(VectorQuantizerConfig(size=32, dim=5, l2_norm=l2_norm))
    vq.embedding.weight.data.normal_()
    z = torch.randn(3, 7, 5, requires_grad=True)
    result = vq(z)
    a, e = (F.normalize(z, dim=-1), F.normalize(vq.embedding.weight, dim=-1)) if l2_norm else (z, vq.embedding.weight)
    assert torch.equal(result.ids, torch.cdist(a.reshape(-1, 5), e).argmin(1).reshape(3, 7))
    assert torch.allclose(result.codes, vq.lookup(result.ids), atol=1e-6)
    result.codes.sum().backward()
    if not l2_norm:
        assert torch.equal(z.grad, torch.ones_like(z))
    assert torch.isfinite(z.grad).all()
    one_hot = F.one_hot(result.ids, 32).float()
    assert torch.allclose(vq.mix(one_hot), vq.lookup(result.ids), atol=1e-6)


def test_vq_chunks_do_not_change_the_answer() -> None:
    vq = VectorQuantizer(VectorQuantizerConfig(size=64, dim=4))
    z = torch.randn(100, 4)
    assert torch.equal(vq.nearest(z, vq.embedding.weight, rows=7), vq.nearest(z, vq.embedding.weight))


@pytest.mark.parametrize("update", ["ema", "cvq"])
def test_codebook_updates_fit_clusters_and_only_in_training(update: str) -> None:
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]])
    vq = VectorQuantizer(VectorQuantizerConfig(size=4, dim=2, update=update, decay=0.8))
    before = vq.embedding.weight.detach().clone()
    vq.eval()
    vq(torch.randn(8, 2))
    assert torch.equal(vq.embedding.weight, before)
    vq.train()
    for _ in range(60):
        batch = centres.repeat(16, 1) + 0.1 * torch.randn(64, 2)
        result = vq(batch)
    if update == "cvq":  # restarts alone bring every code to life
        assert codebook_usage(result.ids, 4)["usage"] == 1.0
    else:
        used = vq.embedding.weight[result.ids.unique()]
        assert torch.cdist(used, batch).min(1).values.max() < 4.0
        assert not vq.embedding.weight.requires_grad
        assert "codebook_loss" not in result.parts


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (3, 2), (7, 5, 5, 5, 5), (26, 39)])
def test_fsq_ids_round_trip_for_every_code(levels: tuple[int, ...]) -> None:
    fsq = FSQ(FSQConfig(levels=levels))
    ids = torch.arange(fsq.vocab_size)
    codes = fsq.lookup(ids)
    assert torch.equal(fsq.to_ids(codes), ids)
    assert codes.abs().max() <= 1
    step = torch.eye(len(levels))[0] / (levels[0] // 2)
    assert torch.allclose(codes[1] - codes[0], step, atol=1e-6)  # dimension 0 is least significant


def test_fsq_of_far_inputs_uses_the_outermost_levels() -> None:
    fsq = FSQ(FSQConfig(levels=(8, 5)))
    result = fsq(torch.tensor([[-50.0, -50.0], [50.0, 50.0]]))
    assert result.ids.tolist() == [0, fsq.vocab_size - 1]


def test_fsq_training_extras_change_training_only() -> None:
    fsq = FSQ(FSQConfig(levels=(8, 5), drop_quant=1.0))
    z = torch.randn(4, 6, 2)
    raw = fsq(z).codes
    fsq.eval()
    assert not torch.allclose(raw, fsq(z).codes)
    noisy = FSQ(FSQConfig(levels=(8, 5), corrupt=1.0))
    assert (noisy(z).ids != fsq(z).ids).any()
    assert torch.allclose(noisy(z).codes.abs().max(), torch.tensor(1.0), atol=0.3)


def test_fsq_levels_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        from_dict(FSQConfig, {"levels": [8, 1]})


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
def test_lfq_closed_forms_equal_brute_force(spherical: bool, big_endian: bool) -> None:
    lfq = LFQ(LFQConfig(dim=5, temperature=0.7, spherical=spherical, big_endian=big_endian))
    z = torch.randn(2, 9, 5)
    result = lfq(z)
    unit = F.normalize(z, dim=-1) if spherical else z
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5))) * (5**-0.5 if spherical else 1.0)
    p = torch.softmax(2 * unit.reshape(-1, 5) @ codes.T / 0.7, -1)
    assert torch.allclose(result.parts["sample_entropy"], -(p * p.log()).sum(-1).mean(), atol=1e-5)
    mean = p.mean(0)
    assert torch.allclose(result.parts["batch_entropy"], -(mean * (mean + 1e-5).log()).sum(), atol=1e-5)
    enumerated = LFQ(replace(lfq.config, factorized=False))(z)
    for name, value in result.parts.items():
        assert torch.allclose(enumerated.parts[name], value, atol=1e-5), name
    assert torch.allclose(lfq.lookup(result.ids), result.codes, atol=1e-6)
    first_bit = lfq.lookup(torch.tensor([1]))[0] > 0
    assert first_bit.tolist() == ([False] * 4 + [True] if big_endian else [True] + [False] * 4)


def test_gaussian_kl_of_the_standard_normal_is_zero() -> None:
    moments = torch.cat([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)], 1)
    assert torch.equal(DiagonalGaussian(moments).kl(), torch.zeros(2))
    gaussian = DiagonalGaussian(
        torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), math.log(4.0))], 1)
    )
    sample = gaussian.sample(torch.Generator().manual_seed(0))
    assert abs(sample.mean().item() - 3) < 0.05
    assert abs(sample.std().item() - 2) < 0.05


def test_usage_counts_codes_in_bits() -> None:
    stats = codebook_usage(torch.tensor([0, 1, 2, 3] * 5), 8)
    assert stats["usage"] == 0.5
    assert abs(stats["entropy"] - 2) < 1e-6
    assert abs(stats["perplexity"] - 4) < 1e-6


@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2"])
def test_nested_sizes_cover_their_range(mode: str) -> None:
    keep = sample_keep(4000, 12, mode)
    assert keep.min() == 1
    assert keep.max() == 12
    expected = {1, 2, 4, 8, 12} if mode == "pow2" else set(range(1, 13))
    assert set(keep.tolist()) == expected
    if mode == "uniform_pow2":
        assert (keep <= 2).float().mean() > 0.25  # a uniform draw gives 1/6


def test_nested_dropout_masks_the_tail() -> None:
    dropout = NestedDropout(3).eval()
    x = torch.randn(2, 5, 3)
    assert dropout(x) is x
    y = dropout(x, torch.tensor([2, 5]))
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[0, :2], x[0, :2])
    assert torch.equal(y[0, 2:], dropout.mask_token.expand(3, 3))
    assert prefix_mask(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]
