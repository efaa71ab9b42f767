"""LongVQ against all pairs of tokens, and the two-directional wrapper against plain flips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import ConfigError
from zoo.nn.backbone import make_mixer
from zoo.nn.bidirectional import Bidirectional, BidirectionalConfig
from zoo.nn.code_attention import code_attention
from zoo.nn.layout import CAUSAL, FULL, Layout
from zoo.nn.longvq import LongVQ, LongVQConfig


def dense(layer: LongVQ, x: Tensor) -> Tensor:
    """Every token to every earlier one, its key replaced by the nearest code; a bias of the distance when near."""
    cfg, length = layer.config, x.shape[1]
    u = x.transpose(1, 2)
    kernel = layer.system.kernel(length, x.dtype)[0]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp_min(0)], 0.0)
    m = torch.nn.functional.silu(torch.einsum("dts,bds->bdt", toeplitz, u) + layer.skip[:, None] * u).transpose(1, 2)
    z = layer.z_proj(m)
    split = lambda t: t.unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)
    q, k = (split(z * layer.scale[i] + layer.shift[i]) for i in (0, 1))
    v = split(torch.nn.functional.silu(layer.v_proj(x)))
    away = (k[:, :, :, None] - layer.codebook[:, None]).square().sum(-1)  # [B, H, L, S]
    code = away.argmin(-1)
    chosen = torch.stack([layer.codebook[h][code[:, h]] for h in range(cfg.num_heads)], 1)
    scores = q @ chosen.transpose(-1, -2) * cfg.key_dim**-0.5
    block = torch.arange(length) // cfg.block
    near = (lag >= 0) & (block[:, None] - block <= 1)
    bias = torch.where(near, layer.distance[:, lag.clamp(0, 2 * cfg.block - 1)], 0.0)
    weights = (scores + bias).masked_fill(lag < 0, -torch.inf).softmax(-1)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2) * layer.gate(m).sigmoid())


@pytest.mark.parametrize("length", [1, 4, 9, 30])
def test_sums_over_codes_are_attention_to_all_tokens(length: int) -> None:
    layer = LongVQ(8, LongVQConfig(num_heads=2, key_dim=3, codes=4, block=4, d_state=4)).double().eval()
    with torch.no_grad():
        layer.distance.normal_()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, CAUSAL)[0], dense(layer, x), rtol=1e-8, atol=1e-10)


def test_code_attention_has_the_gradients_of_its_definition() -> None:
    size, n, codes = 3, 2, 4
    shapes = [(2, 2, n, size, 3), (2, 2, (n + 1) * size, 3), (2, 2, (n + 1) * size, 5), (2, codes, 3)]
    shapes += [(2, 2, n, codes, 5), (2, 2 * size)]
    q, k, v, book, mean, distance = inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    counted = torch.rand(2, 2, n, codes, dtype=torch.float64)
    counted[..., 1] = -torch.inf
    first = torch.tensor([True, False])
    pairs = lambda t: torch.stack([t[:, :, i * size : (i + 2) * size] for i in range(n)], 2)
    away = size + torch.arange(size)[:, None] - torch.arange(2 * size)
    near = q @ pairs(k).transpose(-1, -2) * 3**-0.5 + distance[:, away.clamp_min(0)][:, None]
    hidden = (away < 0).expand(2, 1, n, -1, -1).clone()
    hidden[0, :, 0, :, :size] = True
    far = torch.einsum("bhntd,hsd->bhnts", q, book) * 3**-0.5 + counted[..., None, :]
    weights = torch.cat([near.masked_fill(hidden, -torch.inf), far], -1).softmax(-1)
    expected = weights @ torch.cat([pairs(v), mean], 3)
    actual = code_attention(q, k, v, book, mean, counted, distance, first)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(torch.autograd.grad((actual * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_commitment_pulls_keys_to_their_codes_without_touching_the_output() -> None:
    layer = LongVQ(8, LongVQConfig(num_heads=2, key_dim=3, codes=4, block=4, d_state=4, commitment=5.0)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    y, _ = layer.train()(x, CAUSAL)
    (pulled,) = torch.autograd.grad(y.sum(), layer.shift, retain_graph=True)
    z, _ = layer.eval()(x, CAUSAL)
    (plain,) = torch.autograd.grad(z.sum(), layer.shift)
    torch.testing.assert_close(y, z)
    m = layer.system.kernel(11, torch.float64)[0]
    m = torch.nn.functional.silu(
        torch.stack([(m[:, : t + 1].flip(-1) * x.transpose(1, 2)[..., : t + 1]).sum(-1) for t in range(11)], 1)
        + layer.skip * x
    )
    k = (layer.z_proj(m) * layer.scale[1] + layer.shift[1]).unflatten(-1, (2, -1)).transpose(1, 2)
    chosen = torch.stack([layer.codebook[h][layer.nearest(k)[:, h]] for h in range(2)], 1)
    (expected,) = torch.autograd.grad(5.0 * (k - chosen.detach()).square().mean(), layer.shift)
    torch.testing.assert_close(pulled - plain, expected, rtol=1e-7, atol=1e-10)


def test_many_blocks_are_recomputed_with_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LongVQ(8, LongVQConfig(num_heads=2, key_dim=3, codes=4, block=2, d_state=4)).double()
    x = torch.randn(1, 15, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x, CAUSAL)[0].square().sum(), x)
    monkeypatch.setattr("zoo.nn.longvq._SPAN", 3)
    (again,) = torch.autograd.grad(layer(x, CAUSAL)[0].square().sum(), x)
    torch.testing.assert_close(again, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("mode", "shared"), [("sum", True), ("concat", False)])
def test_two_directions(mode: str, shared: bool) -> None:
    config = BidirectionalConfig(mixer="s4d", options={"d_state": 4}, mode=mode, shared=shared)
    layer = Bidirectional(6, config).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    back = layer.ahead if shared else layer.back
    for row, places in ((0, slice(0, 9)), (1, slice(3, 8))):
        alone = x[row : row + 1, places]
        parts = [layer.ahead(alone, CAUSAL)[0], back(alone.flip(1), CAUSAL)[0].flip(1)]
        expected = parts[0] + parts[1] if mode == "sum" else layer.out_proj(torch.cat(parts, -1))
        valid = torch.ones(2, 9, dtype=torch.bool)
        valid[1, :3] = valid[1, 8:] = False
        y, _ = layer(x, Layout("full", valid=valid))
        torch.testing.assert_close(y[row, places], expected[0], rtol=1e-9, atol=1e-11)
    assert len({id(p) for p in layer.parameters()}) == len(list(layer.ahead.parameters())) * (2 - shared) + 2 * (
        mode == "concat"
    )


def test_only_causal_mixers_can_be_turned() -> None:
    with pytest.raises(ConfigError, match="causal"):
        make_mixer("bidirectional", 8, {"mixer": "ponet", "options": {"num_heads": 2}})
    with pytest.raises(ConfigError, match="decode"):
        make_mixer("bidirectional", 8, {"mixer": "s4d"}).init_state(1, 4)
    hyena = make_mixer("bidirectional", 8, {"mixer": "hyena", "options": {"max_len": 16, "filter_width": 8}})
    assert hyena.info.needs_max_len
    assert hyena(torch.randn(1, 9, 8), FULL)[0].shape == (1, 9, 8)
