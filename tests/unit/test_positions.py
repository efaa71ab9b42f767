"""Rotary angles, their stretched forms, ALiBi slopes and sine tables against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.config import from_dict
from zoo.errors import ConfigError, ZooError
from zoo.nn.positions import (
    LearnedPositions,
    RotaryConfig,
    alibi_slopes,
    frequencies,
    rotary,
    rotary_table,
    rotate,
    sincos,
    sincos_grid,
)
from zoo.nn.visual_positions import image_spans, random_strides, visual_positions


def test_a_rotation_keeps_norms_and_depends_on_differences() -> None:
    options = RotaryConfig(base=100.0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    for interleaved in (False, True):

        def turned(x: torch.Tensor, p: float, pairs: bool = interleaved) -> torch.Tensor:
            cos, sin = rotary(options, 8, torch.tensor([p]))
            return rotate(x, cos, sin, pairs)

        assert torch.allclose(turned(q, 5.5).norm(), q.norm(), rtol=1e-5)
        a = (turned(q, 5.5) * turned(k, 2.25)).sum()
        b = (turned(q, 13.25) * turned(k, 10.0)).sum()
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(rotate(q, *rotary(options, 4, torch.tensor([3])))[..., 4:], q[..., 4:])


def test_pairs_as_complex_numbers() -> None:
    x = torch.randn(5, 1, 6)
    cos, sin = rotary(RotaryConfig(), 6, torch.arange(5))
    turn = torch.complex(cos, sin)[:, None]
    halves = torch.complex(x[..., :3], x[..., 3:]) * turn
    assert torch.allclose(rotate(x, cos, sin), torch.cat([halves.real, halves.imag], -1), atol=1e-6)
    neighbours = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * turn
    assert torch.allclose(rotate(x, cos, sin, True), torch.view_as_real(neighbours).flatten(-2), atol=1e-6)


def test_scaled_frequencies() -> None:
    plain = frequencies(RotaryConfig(), 16)
    assert torch.allclose(plain, 10000.0 ** (-torch.arange(8) / 8), rtol=1e-5)
    linear = frequencies(RotaryConfig(scaling="linear", factor=4.0), 16)
    assert torch.allclose(linear, plain / 4)
    ntk = frequencies(RotaryConfig(scaling="ntk", factor=4.0), 16)
    assert torch.allclose(ntk[0], plain[0])
    assert torch.allclose(ntk[-1], plain[-1] / 4, rtol=1e-4)
    yarn = RotaryConfig(scaling="yarn", factor=4.0, original_len=4096)
    fast = frequencies(yarn, 64) / frequencies(RotaryConfig(), 64)
    assert torch.allclose(fast[:8], torch.ones(8))  # more than 32 turns in the trained length
    assert torch.allclose(fast[-6:], torch.full((6,), 0.25), rtol=1e-5)  # less than one
    assert (fast.diff() <= 1e-6).all()
    cos, _ = rotary(yarn, 64, torch.zeros(1))
    assert torch.allclose(cos, torch.full_like(cos, 0.1 * math.log(4) + 1))
    power = frequencies(RotaryConfig(power=0.5), 16)
    assert torch.allclose(power, plain * (1 - torch.arange(8) / 8).sqrt())
    cut = frequencies(RotaryConfig(truncate=64), 32)
    edge, full = 2 * math.pi / 64, frequencies(RotaryConfig(), 32)
    assert torch.equal(cut[full >= edge], full[full >= edge])
    assert torch.allclose(cut[(full < edge) & (full >= edge / 8)], torch.tensor(edge / 16))
    assert not cut[full < edge / 8].any()


def test_tables_are_shared_and_hold_every_position() -> None:
    options = RotaryConfig(base=500.0)
    cos, sin = rotary_table(options, 8, 300, torch.device("cpu"))
    assert len(cos) >= 300
    assert rotary_table(options, 8, 400, torch.device("cpu"))[0] is cos
    want = rotary(options, 8, torch.tensor([299]))
    assert torch.equal(cos[299], want[0][0])
    assert torch.equal(sin[299], want[1][0])


def test_alibi_slopes() -> None:
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(12) == (*alibi_slopes(8), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5)
    assert alibi_slopes(1) == (2.0**-8,)


def test_sine_tables_and_learned_ones() -> None:
    line = sincos(torch.tensor([0.0, 1.5]), 4)
    assert torch.allclose(line[1], torch.tensor([math.sin(1.5), math.sin(0.015), math.cos(1.5), math.cos(0.015)]))
    plane = sincos_grid((3, 5), 8)
    assert plane.shape == (3, 5, 8)
    assert torch.equal(plane[1, 2], torch.cat([sincos(torch.tensor(1), 4), sincos(torch.tensor(2), 4)]))
    assert sincos_grid((2, 3, 4), 14).shape == (2, 3, 4, 14)
    with pytest.raises(ZooError, match="at least 6"):
        sincos_grid((2, 2, 2), 4)
    learned = LearnedPositions(4, 3)
    assert torch.equal(learned(torch.tensor([[2, 3]])), learned.weight[None, 2:])
    with pytest.raises(ZooError, match="4 learned"):
        learned(torch.tensor([4]))


def test_visual_tokens_take_fractions_of_a_step() -> None:
    ids = torch.tensor([5, 7, 0, 0, 0, 8, 5, 7, 0, 8])  # 7 opens a picture, 8 closes it
    want = [0, 1, 1.5, 2, 2.5, 4, 5, 6, 6.5, 8]
    assert visual_positions(ids, 7, 8, 0.5).tolist() == want
    assert visual_positions(ids, 7, 8, [0.25, 1]).tolist() == [0, 1, 1.25, 1.5, 1.75, 3, 4, 5, 6, 7]
    assert visual_positions(ids[:1], 7, 8, 0.5).tolist() == [0]
    assert image_spans(ids, 7, 8) == [(2, 5), (8, 9)]
    assert random_strides(3, [1, 2, 4], 1) == random_strides(3, [1, 2, 4], 1)
    assert set(random_strides(50, [1, 2], 0)) == {1, 2}


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="original_len"):
        from_dict(RotaryConfig, {"scaling": "yarn", "factor": 2.0})
    with pytest.raises(ConfigError, match="even"):
        from_dict(RotaryConfig, {"dim": 3})
    with pytest.raises(ZooError, match="rotary axes"):
        rotary(RotaryConfig(axes=(4, 4)), 8, torch.zeros(2, 3, 3))
