"""SEED: causal tokens, both decode heads, both training stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zoo.errors import ZooError
from zoo.models.seed import (
    SEED,
    SEEDConfig,
    SEEDContrastive,
    SEEDContrastiveConfig,
    contrastive_loss,
    decoder_vit,
    eva_vit,
)
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.qformer import QFormer, QFormerConfig
from zoo.nn.vq import VectorQuantizerConfig

QFORMER = QFormerConfig(
    width=24, encoder_width=32, layers=3, heads=4, inner=48, queries=5, dropout=0.0, attn_dropout=0.0
)


def tiny(**changes: object) -> SEEDConfig:
    base = SEEDConfig(
        vit=eva_vit(32, 2, 4), patch=7, qformer=QFORMER, decoder=decoder_vit(24, 1, 4), embed_width=10,
        quantizer=VectorQuantizerConfig(size=16, dim=6, commitment=1.0, codebook=0.25),
        preprocess=PreprocessConfig(size=14, resize="both"),
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize("head", ["image_down", "reverse_qformer"])
def test_pixels_to_ids_to_an_embedding(head: str) -> None:
    model = SEED(tiny(embedder=head)).eval()
    pixels = torch.rand(3, 3, 14, 14)
    ids = model.encode(pixels)
    assert ids.shape == (3, model.num_tokens) == (3, 5)
    result = model(pixels, torch.randn(3, 10))
    assert torch.equal(result.ids, ids)
    assert torch.allclose(model.decode_embedding(ids), result.output, atol=1e-5)
    with pytest.raises(ZooError, match="decode_embedding"):
        model.decode(ids)


@pytest.mark.parametrize("head", ["image_down", "reverse_qformer"])
def test_stage_2_trains_everything_behind_the_frozen_encoder(head: str) -> None:
    model = SEED(tiny(embedder=head)).train()
    model.freeze_encoder()
    model(torch.rand(4, 3, 14, 14), torch.randn(4, 10)).loss.backward()
    still = {
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    }
    assert still == set()
    assert not any(p.requires_grad for p in model.qformer.parameters())


def test_a_query_sees_only_earlier_queries() -> None:
    for causal in (True, False):
        qformer = QFormer(replace(QFORMER, causal=causal)).eval()
        features = torch.randn(1, 7, 32)
        before = qformer(features)
        with torch.no_grad():
            qformer.queries[3] += torch.randn(24)
        after = qformer(features)
        assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6) == causal
        assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_stage_1_learns_with_every_parameter_and_ignores_padding() -> None:
    config = replace(QFORMER, text_vocab=20, text_length=9)
    model = SEEDContrastive(SEEDContrastiveConfig(qformer=config, embed_width=8)).train()
    features, text = torch.randn(4, 7, 32), torch.randint(0, 20, (4, 6))
    valid = torch.arange(6) < torch.tensor([6, 3, 4, 5])[:, None]
    loss = model(features, text, valid)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    other = torch.where(valid, text, (text + 1) % 20)
    assert torch.allclose(model(features, other, valid), loss, atol=1e-6)


def test_contrastive_loss_is_small_only_on_the_diagonal() -> None:
    good = contrastive_loss(20 * torch.eye(4), 0.0)
    bad = contrastive_loss(20 * torch.eye(4).roll(1, 0), 0.0)
    assert good < 1e-4
    assert bad > 10
