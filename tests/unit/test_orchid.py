"""Orchid against dense circular convolution, and its transforms against SciPy's."""

from __future__ import annotations

import pytest
import scipy.fft
import torch

from zoo.convert.orchid import config_from_official, to_official, to_zoo
from zoo.errors import ConfigError, ZooError
from zoo.nn.layout import FULL, Layout
from zoo.nn.mixer import split_param_groups
from zoo.nn.orchid import Orchid, OrchidConfig, dct1, dct2, forward_transform, idct2, inverse_transform

SMALL = {"max_len": 24, "filter_width": 8}


@pytest.mark.parametrize("length", [2, 5, 16])
def test_cosine_transforms(length: int) -> None:
    x = torch.randn(3, length, dtype=torch.float64)
    torch.testing.assert_close(dct2(x), torch.from_numpy(scipy.fft.dct(x.numpy(), type=2)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dct1(x), torch.from_numpy(scipy.fft.dct(x.numpy(), type=1)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(idct2(dct2(x)), x, rtol=1e-10, atol=1e-12)
    for kind in ("fft", "fft-o", "dct", "dct1"):
        there = forward_transform(x, kind, length)
        torch.testing.assert_close(inverse_transform(there, kind, length), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", ["fft", "fft-o"])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_it_is_a_circular_convolution_with_a_kernel_of_each_sample(transform: str, length: int) -> None:
    layer = Orchid(4, OrchidConfig(transform=transform, **SMALL)).double()
    v, shape = torch.randn(2, 4, length, dtype=torch.float64), torch.randn(2, length, 4, dtype=torch.float64)
    adaptive = layer.adaptive(shape)
    scale = length if transform == "fft" else length**0.5
    static = torch.fft.rfft(layer.filter(length), n=length) / scale
    kernel = torch.fft.irfft(static + adaptive, n=length)
    expected = layer.filter.skip[:, None] * v
    for t in range(length):
        for s in range(length):
            expected[..., t] += kernel[..., (t - s) % length] * v[..., s]
    torch.testing.assert_close(layer.convolve(v, adaptive), expected, rtol=1e-8, atol=1e-10)


def test_power_spectrum_makes_the_kernel() -> None:
    layer = Orchid(3, OrchidConfig(conv_norm="none", **SMALL)).double()
    v = torch.randn(1, 8, 3, dtype=torch.float64)
    time, freq = layer.nets["time"].convs[0], layer.nets["freq"].convs[0]
    u = torch.nn.functional.conv1d(v.transpose(1, 2), time.weight, time.bias, padding=1, groups=3)
    power = torch.fft.rfft(u, norm="ortho").abs() ** 2
    h = torch.nn.functional.conv1d(power, freq.weight, freq.bias, padding=1, groups=3)
    torch.testing.assert_close(layer.adaptive(v), torch.complex(h[:, 0::2], h[:, 1::2]), rtol=1e-9, atol=1e-11)


def test_correlation_makes_the_kernel() -> None:
    layer = Orchid(3, OrchidConfig(kernel="corr", network="convt", conv_norm="none", **SMALL)).double()
    v = torch.randn(1, 8, 3, dtype=torch.float64)
    k, q = layer.nets["k"](v)[0], layer.nets["q"](v)[0]
    lags = torch.stack([(k * q.roll(-lag, 0)).sum(0) for lag in range(8)], -1)  # circular correlation
    kernel = torch.fft.irfft(layer.adaptive(v)[0], n=8) * 8
    torch.testing.assert_close(kernel, lags, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cut", [False, True])
def test_samples_of_a_batch_keep_their_own_kernels(cut: bool) -> None:
    layer = Orchid(4, OrchidConfig(cut=cut, **SMALL)).double()
    x = torch.randn(3, 12, 4, dtype=torch.float64)
    whole, _ = layer(x, FULL)
    for row in range(3):
        alone, _ = layer(x[row : row + 1], FULL)
        torch.testing.assert_close(whole[row], alone[0], rtol=1e-9, atol=1e-11)


def test_it_is_bidirectional_and_bounded() -> None:
    layer = Orchid(4, OrchidConfig(**SMALL))
    with pytest.raises(ConfigError, match="decode"):
        layer.init_state(1, 4)
    with pytest.raises(ZooError, match="24"):
        layer(torch.randn(1, 25, 4), FULL)
    with pytest.raises(ConfigError, match="Fourier"):
        Orchid(4, OrchidConfig(transform="dct", cut=True))
    y, _ = layer(torch.randn(2, 6, 4), Layout("full", valid=torch.tensor([[True] * 6, [False] * 6])))
    assert not y[1].any()


def test_rates_of_the_kernel_network() -> None:
    groups = split_param_groups(Orchid(4, OrchidConfig(**SMALL)))
    assert [group.get("lr") for group in groups] == [1e-3, 1e-5, 1e-3, 1e-5, None]


@pytest.mark.parametrize(
    "kernel",
    [
        {"type": "absfreq", "nn": "convtf"}, {"type": "freq", "nn": "conv2f", "n_layer": 2},
        {"type": "corrTime", "nn": "convtf"}, {"type": "corrTime", "nn": "convt", "norm": "none"},
    ],
)  # fmt: skip
def test_conversion_is_a_bijection(kernel: dict) -> None:
    official = {"d_model": 4, "l_max": 16, "filter_order": 8, "dxt": "fft-o", "causal": False, "conv_kernel": kernel}
    config = config_from_official(official)
    state = Orchid(4, config).state_dict()
    back = to_zoo(to_official(state, config), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ConfigError, match="order"):
        config_from_official({**official, "order": 3})
