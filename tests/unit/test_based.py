"""BASED and JRT against the quadratic form with the official feature map."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.convert import rows_to_official, rows_to_ours
from zoo.convert.based import baseconv_rows, taylor_rows
from zoo.errors import ConfigError, ZooError
from zoo.nn import taylor
from zoo.nn.baseconv import BaseConv, BaseConvConfig
from zoo.nn.based import JRT, Based, BasedConfig, JRTConfig, taylor_features
from zoo.nn.layout import CAUSAL, Layout


def full_map(x: Tensor, scale: float) -> Tensor:
    """1, x / d^(1/4), vec(x x^T) / sqrt(2 d): the map as published."""
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * scale)
    return torch.cat([torch.ones_like(x[..., :1]), x / scale**0.25, square], dim=-1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def dense(layer: Based, x: Tensor, prefix: int = 0) -> Tensor:
    """All pairs at once, O(L²)."""
    count = layer.config.num_heads
    q = full_map(heads(layer.q_proj(x), count), layer.scale)
    k, v = full_map(heads(layer.k_proj(x), count), layer.scale), heads(layer.v_proj(x), count)
    scores = (q @ k.transpose(-1, -2)).tril()
    top, bottom = scores @ v, scores.sum(-1, keepdim=True)
    if prefix:
        assert isinstance(layer, JRT)
        k = full_map(heads(layer.k_enc_proj(x[:, :prefix]), count), layer.scale)
        scores = q @ k.transpose(-1, -2)
        top = top + scores @ heads(layer.v_enc_proj(x[:, :prefix]), count)
        bottom = bottom + scores.sum(-1, keepdim=True)
    return layer.out_proj((top / (bottom + layer.config.eps)).transpose(1, 2).flatten(2))


def test_triangular_features_give_the_taylor_polynomial() -> None:
    q, k = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    s = (q * k).sum(-1) / 3
    triangle = (taylor_features(q, 9.0) * taylor_features(k, 9.0)).sum(-1)
    torch.testing.assert_close(triangle, 1 + s + s**2 / 2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(triangle, (full_map(q, 9.0) * full_map(k, 9.0)).sum(-1), rtol=1e-10, atol=1e-12)
    assert taylor_features(q, 9.0).shape[-1] == 1 + 5 + 15


@pytest.mark.parametrize("length", [1, 9, 40])
@pytest.mark.parametrize("options", [{}, {"head_dim": 3}, {"scale_dim": 7}])
def test_linear_form_is_the_quadratic_form(length: int, options: dict) -> None:
    layer = Based(8, BasedConfig(num_heads=2, feature_dim=4, chunk=16, **options)).double()
    x = torch.randn(2, length, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x, CAUSAL)[0], dense(layer, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("prefix", [0, 1, 6, 21, 30])
def test_prefix_form_is_the_quadratic_form(prefix: int) -> None:
    layer = JRT(8, JRTConfig(num_heads=2, feature_dim=4, chunk=8, enc_length=prefix)).double()
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    expected = dense(layer, x, min(prefix, 21))
    torch.testing.assert_close(layer(x, Layout("prefix", prefix=prefix))[0], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(x, Layout("prefix"))[0], expected, rtol=1e-9, atol=1e-11)


def test_rows_have_prefixes_of_their_own_and_pads_are_no_part_of_them() -> None:
    layer = JRT(8, JRTConfig(num_heads=2, feature_dim=3, chunk=4)).double()
    x = torch.randn(3, 18, 8, dtype=torch.float64)
    valid = torch.ones(3, 18, dtype=torch.bool)
    valid[1, :5] = valid[2, 11:] = False
    state = layer.init_state(3, 20, dtype=torch.float64)
    y, state = layer(x, Layout("prefix", prefix=torch.tensor([7, 9, 4]), valid=valid), state)
    more = torch.randn(3, 2, 8, dtype=torch.float64)
    after, _ = layer(more, CAUSAL, state)
    for row, (prefix, places) in enumerate([(7, slice(0, 18)), (4, slice(5, 18)), (4, slice(0, 11))]):
        alone = torch.cat([x[row : row + 1, places], more[row : row + 1]], 1)
        expected = dense(layer, alone, prefix)[0]
        torch.testing.assert_close(y[row, places], expected[:-2], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(after[row], expected[-2:], rtol=1e-9, atol=1e-11)
    assert not y[~valid].any()


def test_a_prefix_cannot_be_packed() -> None:
    layer = JRT(8, JRTConfig(num_heads=2, feature_dim=3))
    with pytest.raises(ZooError, match="prefix"):
        layer(torch.randn(1, 4, 8), Layout("prefix", prefix=2, segment=torch.zeros(1, 4, dtype=torch.long)))


def test_long_sequences_recompute_their_features(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Based(8, BasedConfig(num_heads=2, feature_dim=4, chunk=4)).double()
    x = torch.randn(2, 26, 8, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x, CAUSAL)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    monkeypatch.setattr(taylor, "SPAN", 8)
    again, _ = layer(x, CAUSAL)
    (other,) = torch.autograd.grad(again.square().sum(), x)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other, grad, rtol=1e-9, atol=1e-11)


def test_gated_convolution_is_a_sum_of_taps() -> None:
    layer = BaseConv(4, BaseConvConfig(kernel=3, conv_bias=True)).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    u, gate = layer.in_proj(x).chunk(2, -1)
    conv = layer.conv_bias.expand_as(u).clone()
    for t in range(9):
        for j in range(3):
            if t - j >= 0:
                conv[:, t] += layer.conv_weight[:, 0, 2 - j] * u[:, t - j]
    expected = layer.out_proj(torch.nn.functional.silu(conv) * gate)
    torch.testing.assert_close(layer(x, CAUSAL)[0], expected, rtol=1e-9, atol=1e-11)


def test_heads_must_fit() -> None:
    with pytest.raises(ConfigError, match="num_heads 3"):
        Based(8, BasedConfig(num_heads=3))


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (JRT(8, JRTConfig(num_heads=2)), taylor_rows("a.", "", True)),
        (Based(8, BasedConfig(num_heads=2)), taylor_rows("", "")),
        (BaseConv(8, BaseConvConfig()), baseconv_rows("m.", "", BaseConvConfig())),
    ],
)
def test_conversion_is_a_bijection(layer: torch.nn.Module, rows: list) -> None:
    state = layer.state_dict()
    official = rows_to_official(rows, state, "x")
    back = rows_to_ours(rows, official, "x")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
