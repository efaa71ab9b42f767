"""MaskGIT and RAR: laws of masking and of causal decoding, sampling schedules, learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zoo.config import from_dict, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.generate.autoregressive_image import generate_rar
from zoo.generate.maskgit import MaskGITSampling, guidance_at, masked_after, maskgit, power_cosine
from zoo.models.maskgit import MaskGIT, MaskGITConfig, mask_tokens, masked_loss
from zoo.models.rar import RAR, RARConfig, random_orders, random_share, rar_vit
from zoo.nn.mlp import MLPConfig
from zoo.nn.vit import ViTConfig

VIT = ViTConfig(width=32, layers=2, heads=4, mlp=MLPConfig(kind="gelu", width=64))


def tiny_maskgit(kind: str) -> MaskGIT:
    vit = VIT if kind == "uvit" else replace(VIT, prenorm=False, eps=1e-12)
    return MaskGIT(MaskGITConfig(kind=kind, codes=12, classes=3, length=9, vit=vit))


def tiny_rar() -> RAR:
    model = RAR(
        RARConfig(codes=12, classes=3, length=9, vit=rar_vit(32, 2, 4, 64, 0.0, 0.0), spare_positions=2, spare_steps=2)
    )
    for parameter in model.parameters():
        if not parameter.abs().sum() > 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("kind", ["bert", "uvit"])
def test_maskgit_learns_with_every_parameter(kind: str) -> None:
    model = tiny_maskgit(kind).train()
    ids = torch.randint(0, 12, (8, 9))
    masked, mask = mask_tokens(ids, model.mask_id)
    logits = model(masked, model.drop_classes(torch.arange(8) % 3))
    loss, correct = masked_loss(logits, ids, mask)
    loss.backward()
    assert 0 <= correct <= 1
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("kind", ["bert", "uvit"])
@pytest.mark.parametrize("decay", ["constant", "linear", "power-cosine"])
def test_maskgit_fills_every_place_and_repeats_with_a_seed(kind: str, decay: str) -> None:
    model = tiny_maskgit(kind).eval()
    sampling = MaskGITSampling(steps=4, temperature=2.0, guidance=3.0, decay=decay)
    classes, none = torch.tensor([0, 1]), torch.full((2,), model.dropped)
    counts: list[int] = []
    watch = lambda x: counts.append(int((x[0] == model.mask_id).sum()))

    def run() -> torch.Tensor:
        source = torch.Generator().manual_seed(1)
        counts.clear()
        return maskgit(
            lambda x, u: model(x, none if u else classes), 2, 9, model.mask_id, sampling,
            lambda shape: torch.rand(shape, generator=source), watch,
        )  # fmt: skip

    ids = run()
    assert ids.max() < 12
    assert torch.equal(ids, run())
    assert counts == [9, 7, 6, 4]  # 9 acos(r) / (π/2), rounded down


def test_schedules() -> None:
    sampling = MaskGITSampling(steps=10, guidance=5.0)
    assert guidance_at(sampling, 0) == 0
    assert guidance_at(sampling, 5) == 2.5
    assert power_cosine(5.0, 0.0, 3.0) == 1
    assert abs(power_cosine(5.0, 1.0, 3.0) - 5) < 1e-12
    assert masked_after(100, 10, 9, 3) == 1
    assert masked_after(8, 100, 0, 8) == 7  # at least one token a step


def test_training_masks_are_everything_between_one_and_all() -> None:
    ids = torch.zeros(2000, 16, dtype=torch.long)
    masked, mask = mask_tokens(ids, 5)
    assert torch.equal(masked == 5, mask)
    counts = mask.sum(1)
    assert counts.min() >= 1
    assert abs(counts.float().mean().item() / 16 - 2 / torch.pi) < 0.02  # the mean of acos(u) / (π/2)


def test_rar_never_sees_ahead_in_its_order() -> None:
    model = tiny_rar().eval()
    classes, orders = torch.tensor([1]), random_orders(1, 9, 1.0)
    ids = torch.randint(0, 12, (1, 9))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 12
    a, b = model(ids, classes, orders), model(other, classes, orders)
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert not torch.allclose(a[:, 6], b[:, 6])


def test_rar_step_by_step_equals_all_at_once() -> None:
    model = tiny_rar().eval()
    ids, classes = torch.randint(0, 12, (2, 9)), torch.tensor([0, 2])
    caches = model.init_caches(2)
    steps = torch.cat([model(ids[:, :n], classes, caches=caches) for n in range(9)], 1)
    assert torch.allclose(steps, model(ids, classes)[:, :9], atol=1e-5)


def test_rar_generates_and_guidance_of_one_changes_nothing() -> None:
    model = tiny_rar().eval()
    classes = torch.tensor([0, 1, 2])
    plain = generate_rar(model, classes, guidance=0.0, temperature=0.0)
    assert plain.shape == (3, 9)
    assert torch.equal(generate_rar(model, classes, guidance=1.0, temperature=0.0), plain)
    sampled = [generate_rar(model, classes, 4.0, generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*sampled)
    assert torch.equal(generate_rar(model, classes, 0.0, temperature=0.0, tokens=4), plain[:, :4])
    with pytest.raises(ZooError, match="1 to 9 tokens, 10"):
        generate_rar(model, classes, tokens=10)
    logits = model(plain[:, :-1], classes)
    assert torch.equal(logits.argmax(-1), plain)


def test_rar_learns_with_every_parameter() -> None:
    model = tiny_rar().train()
    loss = model.loss(torch.randint(0, 12, (4, 9)), torch.tensor([0, 1, 2, 3]), random_orders(4, 9, 0.5))
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_random_orders_fade() -> None:
    assert torch.equal(random_orders(4, 9, 0.0), torch.arange(9).expand(4, -1))
    assert torch.equal(random_orders(4, 9, 1.0).sort(1).values, torch.arange(9).expand(4, -1))
    assert [random_share(s) for s in (0, 125_000, 156_250, 187_500, 250_000)] == [1, 1, 0.5, 0, 0]


def test_words_for_wrong_input() -> None:
    with pytest.raises(ZooError, match="9 tokens, got 10"):
        tiny_maskgit("bert")(torch.zeros(1, 10, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(ZooError, match="9 tokens, got 10"):
        tiny_rar()(torch.zeros(1, 10, dtype=torch.long), torch.tensor([0]))
    with pytest.raises(ConfigError, match="even number of layers"):
        from_dict(MaskGITConfig, {"kind": "uvit", "vit": to_dict(replace(VIT, layers=3))})
