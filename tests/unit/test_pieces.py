"""Evaluation in pieces gives the values and gradients of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig
from zoo.nn import pieces
from zoo.nn.hyena import Hyena, HyenaConfig
from zoo.nn.layout import CAUSAL, Layout
from zoo.nn.pieces import in_pieces, last_linear


@pytest.fixture(params=[1, 2])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces always, on one thread and on two."""
    monkeypatch.setattr(pieces, "WHOLE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("piece", [1, 8 * 5, 8 * 30, 8 * 1000])
@pytest.mark.parametrize("shape", [(1, 50), (3, 50), (7, 10)])
def test_a_pointwise_network(small: None, monkeypatch: pytest.MonkeyPatch, piece: int, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(pieces, "PIECE", piece)
    first, last = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()
    x = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    params = [*first.parameters(), *last.parameters()]
    (y,) = in_pieces(lambda _c, h: (last_linear(last, torch.tanh(first(h))),), [x], params, 8)
    expected = last(torch.tanh(first(x)))
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad((y * weight).sum(), [x, *params]),
        torch.autograd.grad((expected * weight).sum(), [x, *params]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("halo", [1, 4])
def test_a_piece_sees_the_rows_before_it(small: None, monkeypatch: pytest.MonkeyPatch, halo: int) -> None:
    monkeypatch.setattr(pieces, "PIECE", 6 * 7)
    weight = nn.Parameter(torch.randn(6, 1, halo + 1, dtype=torch.float64))

    def conv(context: int, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv1d(F.pad(x.transpose(1, 2), (halo, 0)), weight, groups=6).transpose(1, 2)[:, context:]
        return y, 2 * x[:, context:]

    x = torch.randn(2, 40, 6, dtype=torch.float64, requires_grad=True)
    y, z = in_pieces(conv, [x], [weight], 6, halo)
    whole, double = conv(0, x)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(z, double)
    a = torch.autograd.grad((y.square() + y * z).sum(), [x, weight])
    b = torch.autograd.grad((whole.square() + whole * double).sum(), [x, weight])
    torch.testing.assert_close(a, b)


def test_frozen_parameters_and_inputs_get_no_gradient(small: None) -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    x = torch.randn(1, 9, 4)
    (y,) = in_pieces(lambda _c, h: (torch.relu(layer(h)),), [x], [*layer.parameters()], 4)
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is None


def test_a_parameter_that_is_not_used_is_an_error(small: None) -> None:
    layer, other = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
    x = torch.randn(1, 9, 4)
    (y,) = in_pieces(lambda _c, h: (layer(h),), [x], [*layer.parameters(), other], 4)
    with pytest.raises(RuntimeError, match="not have been used"):
        y.sum().backward()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_hyena_in_pieces(monkeypatch: pytest.MonkeyPatch, order: int, padded: bool) -> None:
    mixer = Hyena(6, HyenaConfig(max_len=64, order=order, filter_width=8, short_filter=4))
    x = torch.randn(2, 50, 6, requires_grad=True)
    layout = Layout("causal", valid=torch.arange(50) < torch.tensor([[50], [33]])) if padded else CAUSAL
    weight = torch.randn(2, 50, 6)

    def run() -> tuple[Tensor, ...]:
        y, _ = mixer(x, layout)
        return y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])

    whole = run()
    monkeypatch.setattr(pieces, "WHOLE", 0)
    monkeypatch.setattr(pieces, "PIECE", 24 * 7)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_backward_pass_repeats_the_same_precision(small: None) -> None:
    layer = nn.Linear(16, 16)
    x = torch.randn(1, 20, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = in_pieces(lambda _c, h: (torch.tanh(layer(h)),), [x], [*layer.parameters()], 16)
        expected = torch.tanh(layer(x))
    assert y.dtype == torch.bfloat16
    a = torch.autograd.grad(y.float().sum(), [x, layer.weight])
    b = torch.autograd.grad(expected.float().sum(), [x, layer.weight])
    for ours, wanted in zip(a, b, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.05)


def test_pieces_inside_a_recomputed_block(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HyenaDNAConfig(d_model=8, n_layer=2, max_len=40, hyena=HyenaConfig(filter_width=8), embed_dropout=0.0)
    model, ids = HyenaDNA(config), torch.randint(7, 11, (2, 40))
    grads = []
    for whole, recompute in ((1 << 24, False), (0, False), (0, True)):
        monkeypatch.setattr(pieces, "WHOLE", whole)
        monkeypatch.setattr(pieces, "PIECE", 32 * 9)
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_two_threads_give_the_same_bits_every_time(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 16 * 50)
    layer, x = nn.Linear(16, 16), torch.randn(1, 3000, 16)
    seen = []
    for _ in range(5):
        (y,) = in_pieces(lambda _c, h: (torch.tanh(layer(h)),), [x], [*layer.parameters()], 16)
        seen.append(torch.autograd.grad(y.square().sum(), layer.weight)[0])
    assert all(torch.equal(seen[0], other) for other in seen[1:])
