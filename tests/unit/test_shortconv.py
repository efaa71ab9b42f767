"""The short convolution: equal to the grouped Conv1d it replaces, continued by its history, stepped token by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn import shortconv
from zoo.nn.shortconv import causal_short_conv, short_conv_history, short_conv_step


@pytest.fixture(params=[1 << 17, 8])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices longer than the sequence, and slices of two rows."""
    monkeypatch.setattr(shortconv, "SLICE", request.param)


def case(length: int, taps: int, channels: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(10 * length + taps)
    shapes = ((2, length, channels), (channels, 1, taps), (channels,), (2, taps - 1, channels))
    x, weight, bias, history = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, weight, bias, history


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> Tensor:
    padded = torch.cat([history, x], dim=1).transpose(1, 2)
    return F.conv1d(padded, weight, bias, groups=x.shape[2]).transpose(1, 2)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 33])
@pytest.mark.parametrize("continued", [False, True])
def test_equals_grouped_conv1d(length: int, taps: int, continued: bool) -> None:
    x, weight, bias, history = case(length, taps)
    past = history if continued else torch.zeros_like(history)
    wanted = (x, weight, bias, history) if continued and taps > 1 else (x, weight, bias)
    y, expected = causal_short_conv(x, weight, bias, history if continued else None), conv1d(x, weight, bias, past)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, g), torch.autograd.grad(expected, wanted, g))


@pytest.mark.usefixtures("slices")
def test_gradcheck() -> None:
    x, weight, bias, history = case(5, 3)
    assert torch.autograd.gradcheck(causal_short_conv, (x, weight, bias, history))
    assert torch.autograd.gradcheck(causal_short_conv, (x, weight))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
def test_chunks_and_steps_continue_the_sequence(cut: int) -> None:
    x, weight, bias, _ = case(9, 4)
    whole = causal_short_conv(x, weight, bias)
    history = short_conv_history(x[:, :cut], 4)
    rest = causal_short_conv(x[:, cut:], weight, bias, history)
    torch.testing.assert_close(rest, whole[:, cut:])
    torch.testing.assert_close(short_conv_history(x[:, cut:], 4, history), x[:, -3:])
    for t in range(cut, 9):
        y, history = short_conv_step(x[:, t], weight, bias, history)
        torch.testing.assert_close(y, whole[:, t])


def test_strided_input_and_half_precision() -> None:
    x, weight, bias, _ = (p.detach().float() for p in case(50, 3, 6))
    expected = causal_short_conv(x, weight, bias)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(causal_short_conv(turned, weight, bias), expected)
    half = x.bfloat16().requires_grad_()
    y = causal_short_conv(half, weight, bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, causal_short_conv(half.float(), weight, bias).bfloat16())
    y.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_compiles_into_one_graph() -> None:
    x, weight, bias, history = case(12, 3)
    compiled = torch.compile(causal_short_conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias, history), causal_short_conv(x, weight, bias, history))
    torch.library.opcheck(shortconv._operator, (x, weight, bias, history))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ZooError, match=r"needs weights \[4, 1, K\]"):
        causal_short_conv(torch.zeros(1, 5, 4), torch.zeros(3, 1, 3))
    with pytest.raises(ZooError, match="history"):
        causal_short_conv(torch.zeros(1, 5, 4), torch.zeros(4, 1, 3), None, torch.zeros(1, 3, 4))
