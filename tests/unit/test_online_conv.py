"""Decoding a long convolution token by token equals the parallel form, from any start, at the promised cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.longconv import long_conv
from zoo.nn.online_conv import OnlineConv, OnlineConvState


def case(batch: int = 2, width: int = 3, length: int = 150) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    return (
        torch.randn(batch, width, length, dtype=torch.float64),
        torch.randn(width, length, dtype=torch.float64),
        torch.randn(width, dtype=torch.float64),
    )


@pytest.mark.parametrize("base", [1, 4, 128])
@pytest.mark.parametrize("length", [1, 2, 31, 64, 150])
@pytest.mark.parametrize("prefill", [0, 1, 13, 30])
def test_pushed_tokens_equal_the_parallel_form(base: int, length: int, prefill: int) -> None:
    u, k, skip = case(length=length)
    expected, conv = long_conv(u, k, skip), OnlineConv(k, skip, base=base)
    state, parts, prefill = conv.init_state(2), [], min(prefill, length)
    if prefill:
        y, state = conv.extend(u[..., :prefill], state)
        parts.append(y)
    for t in range(prefill, length):
        y, state = conv.push(u[..., t], state)
        parts.append(y[..., None])
    assert (torch.cat(parts, -1) - expected).abs().max() < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_chunks_and_tokens_in_any_order(seed: int) -> None:
    u, k, skip = case()
    expected, conv = long_conv(u, k, skip), OnlineConv(k, skip, base=8)
    state, parts, done = conv.init_state(2), [], 0
    generator = torch.Generator().manual_seed(seed)
    while done < u.shape[-1]:
        n = int(torch.randint(1, 40, (), generator=generator))
        chunk = u[..., done : done + n]
        done += chunk.shape[-1]
        if torch.rand((), generator=generator) < 0.4:
            y, state = conv.extend(chunk, state)
            parts.append(y)
        else:
            for t in range(chunk.shape[-1]):
                y, state = conv.push(chunk[..., t], state)
                parts.append(y[..., None])
    assert (torch.cat(parts, -1) - expected).abs().max() < 1e-9


def test_direct_form_agrees() -> None:
    u, k, skip = case(length=40)
    conv = OnlineConv(k, skip)
    state, direct = conv.init_state(2), []
    for t in range(40):
        y, state = conv.push_direct(u[..., t], state)
        direct.append(y)
    assert (torch.stack(direct, -1) - long_conv(u, k, skip)).abs().max() < 1e-9


def test_float32_and_bfloat16() -> None:
    u, k, skip = (x.float() for x in case(length=700))
    expected, conv = long_conv(u, k, skip), OnlineConv(k, skip)
    state, parts = conv.init_state(2), []
    for t in range(700):
        y, state = conv.push(u[..., t], state)
        parts.append(y)
    assert (torch.stack(parts, -1) - expected).abs().max() < 1e-5 * expected.abs().max()
    y, _ = conv.push(u[..., 0].bfloat16(), conv.init_state(2))
    assert y.dtype == torch.bfloat16


def test_state_is_batch_first_selects_copies_and_counts_its_bytes() -> None:
    u, k, skip = case(batch=3, length=64)
    conv = OnlineConv(k, skip, base=4)
    _, state = conv.extend(u[..., :21], conv.init_state(3))
    assert isinstance(state, OnlineConvState)
    assert state.nbytes() == 2 * 3 * 3 * 64 * 8
    rows = torch.tensor([2, 0, 2])
    branch = state.detach().select(rows)
    for _ in range(21, 40):  # the original goes on without touching the branch
        _, state = conv.push(torch.full((3, 3), 7.0, dtype=torch.float64), state)
    parts = []
    for t in range(21, 64):
        y, branch = conv.push(u[rows, :, t], branch)
        parts.append(y)
    assert (torch.stack(parts, -1) - long_conv(u, k, skip)[rows][..., 21:]).abs().max() < 1e-9


def test_transforms_touch_each_token_log_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in transforms grows as L log L points, not L^2: counted, not timed."""
    points: dict[int, int] = {}
    for length in (1 << 9, 1 << 11):
        u, k, skip = case(1, 1, length)
        conv, count, real = OnlineConv(k, skip, base=4), 0, OnlineConv._finish_block

        def counted(self: OnlineConv, state: OnlineConvState, size: int, real: object = real) -> None:
            nonlocal count
            count += 2 * size
            real(self, state, size)

        monkeypatch.setattr(OnlineConv, "_finish_block", counted)
        state = conv.init_state(1)
        for t in range(length):
            _, state = conv.push(u[..., t], state)
        points[length] = count
        monkeypatch.setattr(OnlineConv, "_finish_block", real)
    assert points[1 << 9] <= (1 << 9) * 9
    assert points[1 << 11] <= (1 << 11) * 11
    assert points[1 << 11] > points[1 << 9]


def test_refusals() -> None:
    u, k, skip = case(length=8)
    conv = OnlineConv(k, skip)
    _, state = conv.extend(u, conv.init_state(2))
    with pytest.raises(ZooError, match="8 taps cannot consume 9"):
        conv.push(u[..., 0], state)
    with pytest.raises(ZooError, match="8 taps cannot consume 9"):
        conv.extend(u[..., :1], state)
    with pytest.raises(ZooError, match="power of two"):
        OnlineConv(k, base=12)
