"""The Hyena mixer against its equation, written out naively here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn import hyena as module
from zoo.nn import implicit_filter
from zoo.nn.hyena import Hyena, HyenaConfig
from zoo.nn.implicit_filter import position_grid
from zoo.nn.layout import CAUSAL, FULL, Layout


def naive(mixer: Hyena, x: Tensor, interleaved: bool) -> Tensor:
    """Poli et al., §3, by explicit sums: O(L^2)."""
    c, d, length = mixer.config, mixer.d_model, x.shape[1]
    u = x @ mixer.in_proj.weight.T + mixer.in_proj.bias
    weight, taps = mixer.short_filter.weight[:, 0], c.short_filter
    short = torch.zeros_like(u) + mixer.short_filter.bias
    for t in range(length):
        for j in range(taps):
            if t - j >= 0:
                short[:, t] = short[:, t] + weight[:, taps - 1 - j] * u[:, t - j]
    t = torch.linspace(0, 1, c.max_len)[:length].to(x.dtype)
    w = 2 * math.pi * torch.arange(length, dtype=x.dtype) / c.max_len
    bands = (c.emb_dim - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands).to(x.dtype)
    h = torch.cat([t[:, None], torch.cos(f * w[:, None]), -torch.sin(f * w[:, None])], 1)
    for layer in mixer.filter.layers:
        h = torch.sin(mixer.filter.freq * (h @ layer.weight.T + layer.bias))
    h = h @ mixer.filter.out.weight.T  # [L, (order - 1) D]
    channels = h.shape[1]
    slow, fast = math.log(c.decay_target) / c.slow_decay_pct, math.log(c.decay_target) / c.fast_decay_pct
    rate = torch.tensor([slow + (fast - slow) * i / (channels - 1) for i in range(channels)], dtype=x.dtype).abs()
    h = h * (torch.exp(-t[:, None] * rate) + c.shift)
    streams = short.split(d, -1)
    v = streams[-1]
    for i in range(c.order - 1):
        v = v * streams[c.order - 1 - i]
        index = torch.arange(d) * (c.order - 1) + i if interleaved else torch.arange(d) + i * d
        kernel, skip = h[:, index], mixer.filter.skip[index]
        y = skip * v
        for a in range(length):
            for b in range(a + 1):
                y[:, a] = y[:, a] + kernel[a - b] * v[:, b]
        v = y
    return (v * streams[0]) @ mixer.out_proj.weight.T + mixer.out_proj.bias


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_it_is_the_papers_operator(order: int, interleaved: bool) -> None:
    config = HyenaConfig(
        max_len=40, order=order, filter_width=8, emb_dim=7, num_inner_mlps=3, interleaved=interleaved,
        fast_decay_pct=0.2, slow_decay_pct=1.1, sin_freq=3.0, shift=0.02,
    )  # fmt: skip
    mixer = Hyena(6, config).double()
    x = torch.randn(2, 21, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, CAUSAL)[0], naive(mixer, x, interleaved), rtol=1e-5, atol=1e-6)


def test_the_filter_belongs_to_max_len_and_is_only_sliced() -> None:
    short = Hyena(4, HyenaConfig(max_len=64, filter_width=8))
    longer = Hyena(4, HyenaConfig(max_len=128, filter_width=8))
    longer.load_state_dict(short.state_dict())
    torch.testing.assert_close(short.filter(20), short.filter(64)[:, :20])
    assert (short.filter(20) - longer.filter(20)).abs().max() > 1e-3


def test_no_recomputable_buffer_is_stored() -> None:
    names = set(Hyena(4, HyenaConfig(max_len=64)).state_dict())
    assert "filter.positions" not in names
    assert not Hyena(4, HyenaConfig(max_len=64))._buffers
    assert "filter.positions" in Hyena(4, HyenaConfig(max_len=64, learn_positions=True)).state_dict()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("interleaved", [False, True])
def test_long_inference_equals_the_short_form(monkeypatch: pytest.MonkeyPatch, order: int, interleaved: bool) -> None:
    mixer = Hyena(10, HyenaConfig(max_len=100, order=order, filter_width=8, interleaved=interleaved)).eval()
    x = torch.randn(2, 90, 10)
    valid = torch.arange(90) < torch.tensor([[90], [70]])
    layout = Layout("causal", valid=valid)
    with torch.no_grad():
        expected = mixer(x, layout)[0]
        monkeypatch.setattr(implicit_filter, "CHUNK", 32)
        monkeypatch.setattr(module, "_GROUP", 4)
        torch.testing.assert_close(mixer(x, layout)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_filter_in_pieces_has_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Hyena(4, HyenaConfig(max_len=100, filter_width=8, learn_positions=True)).filter
    weight = torch.randn(4, 90)
    whole = net(90)
    expected = torch.autograd.grad((whole * weight).sum(), [*net.network(), net.positions])
    monkeypatch.setattr(implicit_filter, "CHUNK", 16)
    pieces = net(90)
    torch.testing.assert_close(pieces, whole)
    for actual, wanted in zip(
        torch.autograd.grad((pieces * weight).sum(), [*net.network(), net.positions]), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(90), whole)


def test_two_sided_is_the_mirror_of_itself() -> None:
    """With equal filters to both sides, reversing the input reverses the long convolution."""
    mixer = Hyena(4, HyenaConfig(max_len=64, filter_width=8, bidirectional="two_sided", short_filter=1)).double()
    with torch.no_grad():
        half = mixer.filter.channels // 2
        mixer.filter.out.weight[half:] = mixer.filter.out.weight[:half]
        mixer.config = mixer.filter.config = HyenaConfig(
            max_len=64, filter_width=8, bidirectional="two_sided", short_filter=1, modulate=False
        )
        kernel, _ = mixer.kernels(20)[0]
        assert kernel.shape == (4, 39)
        torch.testing.assert_close(kernel[:, :19], mixer.filter(20)[half:, :19].flip(-1))
        x = torch.randn(1, 20, 4, dtype=torch.float64)
        y = mixer(x, FULL)[0]
        assert (mixer(torch.cat([x[:, :19], x[:, 19:] + 1], 1), FULL)[0] - y)[:, 0].abs().max() > 0


def test_the_ring_delays_its_input_by_half_its_length() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=64, filter_width=8, bidirectional="ring")).double()
    length, x = 21, torch.randn(2, 21, 4, dtype=torch.float64)
    u = mixer.in_proj(x).transpose(1, 2)
    u = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u, (2, 0)), mixer.short_filter.weight, mixer.short_filter.bias, groups=12
    )
    gate, x1, v = u.split(4, 1)
    v = v * x1
    ring = torch.fft.rfft(torch.nn.functional.pad(v, (length // 2, length // 2)), n=2 * length)
    y = torch.fft.irfft(ring * torch.fft.rfft(mixer.filter(length), n=2 * length), n=2 * length)[..., :length]
    y = (y + v * mixer.filter.skip[:, None]) * gate
    torch.testing.assert_close(mixer(x, FULL)[0], mixer.out_proj(y.transpose(1, 2)))


def test_too_long_a_sequence_names_both_numbers_also_while_decoding() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=10, filter_width=8))
    with pytest.raises(ZooError, match=r"11 tokens.*at most 10"):
        mixer(torch.randn(1, 11, 4), CAUSAL)
    _, state = mixer(torch.randn(1, 10, 4), CAUSAL, mixer.init_state(1, 10))
    assert state is not None
    with pytest.raises(ZooError, match=r"11 tokens.*at most 10"):
        mixer.step(torch.randn(1, 4), state)


def test_parameter_groups_follow_the_official_hints() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=16, filter_width=8, learn_positions=True, positions_lr=1e-5, filter_lr=3e-4))
    network, positions = mixer.param_groups()
    assert network["weight_decay"] == 0.0
    assert network["lr"] == 3e-4
    assert {id(p) for p in network["params"]} == {
        id(p) for n, p in mixer.filter.named_parameters() if n not in ("skip", "positions")
    }
    assert positions["params"] == [mixer.filter.positions]
    assert positions["lr"] == 1e-5
    assert positions["weight_decay"] == 0.0


@pytest.mark.parametrize("phase", ["complex", "split"])
def test_the_grid_runs_over_max_len(phase: str) -> None:
    z, t = position_grid(50, 5, phase, torch.device("cpu"))
    assert z.shape == (50, 5)
    assert float(t[0]) == 0
    assert float(t[-1]) == 1
    angle = torch.arange(50) * 2 * math.pi / 50
    torch.testing.assert_close(z[:, 2], torch.cos(angle), atol=1e-6, rtol=0)
    torch.testing.assert_close(z[:, 4], -torch.sin(angle), atol=1e-6, rtol=0)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        HyenaConfig(emb_dim=4)
    with pytest.raises(ValueError, match="order"):
        HyenaConfig(order=1)


def test_filters_kept_for_decoding_follow_the_weights() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=40, filter_width=8)).eval()
    x = torch.randn(1, 20, 4)

    def decode() -> Tensor:
        state, steps = mixer.init_state(1, 20), []
        for t in range(20):
            y, state = mixer.step(x[:, t], state)
            steps.append(y)
        return torch.stack(steps, 1)

    with torch.no_grad():
        torch.testing.assert_close(decode(), mixer(x, CAUSAL)[0], rtol=1e-4, atol=1e-5)
        kept = mixer._kept
        decode()
        assert mixer._kept is kept
        mixer.filter.out.weight.mul_(2)
        torch.testing.assert_close(decode(), mixer(x, CAUSAL)[0], rtol=1e-4, atol=1e-5)
        mixer.load_state_dict(Hyena(4, mixer.config).state_dict())
        torch.testing.assert_close(decode(), mixer(x, CAUSAL)[0], rtol=1e-4, atol=1e-5)
        mixer.train()
        assert mixer._kept is None


def test_gradients_flow_through_a_continued_state() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=40, filter_width=8, order=3)).double()
    x = torch.randn(1, 20, 4, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x[:, :11], CAUSAL, mixer.init_state(1, 20, dtype=torch.float64))
    z, state = mixer(x[:, 11:19], CAUSAL, state)
    assert state is not None
    last, _ = mixer.step(x[:, 19], state)
    joined = torch.cat([y, z, last[:, None]], 1)
    weight = torch.randn_like(joined)
    a = torch.autograd.grad((joined * weight).sum(), [x, *mixer.parameters()])
    b = torch.autograd.grad((mixer(x, CAUSAL)[0] * weight).sum(), [x, *mixer.parameters()])
    torch.testing.assert_close(a, b)


def test_a_state_holds_no_more_than_it_was_made_for() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=40, filter_width=8))
    with pytest.raises(ZooError, match=r"made for 5 tokens.*not for 6"):
        mixer(torch.randn(1, 6, 4), CAUSAL, mixer.init_state(1, 5))
    with pytest.raises(ZooError, match=r"41 tokens.*at most 40"):
        mixer.init_state(1, 41)


def test_decoding_goes_on_after_steps_that_autograd_followed() -> None:
    mixer = Hyena(4, HyenaConfig(max_len=300, filter_width=8, order=3)).eval()
    x = torch.randn(2, 300, 4)
    parts = []
    with torch.no_grad():
        y, state = mixer(x[:, :150], CAUSAL, mixer.init_state(2, 300))
        parts.append(y)
    y, state = mixer(x[:, 150:160], CAUSAL, state)
    parts.append(y.detach())
    assert state is not None
    state = state.detach()
    with torch.no_grad():
        for t in range(160, 300):
            y, state = mixer.step(x[:, t], state)
            parts.append(y[:, None])
        torch.testing.assert_close(torch.cat(parts, 1), mixer(x, CAUSAL)[0], rtol=1e-4, atol=1e-5)


def test_long_inference_with_two_threads_in_inference_mode() -> None:
    mixer = Hyena(16, HyenaConfig(max_len=70000, filter_width=8)).eval()
    x = torch.randn(1, 70000, 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            y, _ = mixer(x, CAUSAL)
        with torch.no_grad():
            torch.testing.assert_close(mixer(x, CAUSAL)[0], y, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(threads)
