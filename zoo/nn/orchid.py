"""Orchid: long convolution whose kernel a small network draws from the input itself (arXiv:2402.18508)."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError, ZooError
from zoo.nn.hyena import HyenaConfig, HyenaFilter
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.rows import RowMixer
from zoo.nn.shortconv import causal_short_conv
from zoo.nn.ssm import work_dtype


@config
class OrchidConfig:
    """Orchid operator.

    Attributes:
        max_len: longest sequence; the static kernel is a function of position / max_len.
        transform: `fft` or `fft-o` (circular convolution, of scale 1/n or 1/sqrt n), `dct` (type II) or `dct1`
            (symmetric convolution).
        kernel: how the conditioning network makes the kernel: from the power spectrum (`absfreq`), the spectrum
            (`freq`), or the correlation of two convolutions of the input (`corr`).
        network: domain its convolutions stand in: time and frequency (`convtf`), time (`convt`), frequency (`convf`).
        conv_size, conv_layers, conv_norm, conv_bias, padding: of those convolutions.
        actq: activation of the query's spectrum, for `corr`.
        cut: the adaptive kernel comes from a transform of twice the length and is cut to the sequence's in time
            (official default `causal=True`, whose published code mixes the samples of a batch; here it does not).
        residual: a static long convolution of the raw input beside the chain (official `sconv`).
        short_filter: taps of the short convolution.
        filter_width, emb_dim, num_inner_mlps, sin_freq: of the static kernel's network, as in Hyena.
        filter_lr: learning rate of the static kernel's network; positions_lr: of its position features.
    """

    max_len: int = 1024
    transform: Literal["fft", "fft-o", "dct", "dct1"] = "fft-o"
    kernel: Literal["absfreq", "freq", "corr"] = "absfreq"
    network: Literal["convtf", "convt", "convf"] = "convtf"
    conv_size: int = 3
    conv_layers: int = 1
    conv_norm: Literal["layernorm", "none"] = "layernorm"
    conv_bias: bool = True
    padding: Literal["zeros", "reflect"] = "zeros"
    actq: Literal["id", "gelu", "tanh", "sigmoid"] = "id"
    cut: bool = False
    residual: bool = True
    short_filter: int = 3
    filter_width: int = 64
    emb_dim: int = 3
    num_inner_mlps: int = 2
    sin_freq: float = 1.0
    filter_lr: float | None = 1e-3
    positions_lr: float | None = 1e-5


def dct2(x: Tensor) -> Tensor:
    """Type-II discrete cosine transform 2 sum_n x_n cos(pi k (2n + 1) / 2N) of the last axis."""
    n = x.shape[-1]
    even = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    turn = torch.exp(-0.5j * torch.pi * torch.arange(n, device=x.device, dtype=x.dtype) / n)
    return 2 * (torch.fft.fft(even) * turn).real


def idct2(x: Tensor) -> Tensor:
    """Inverse of `dct2`."""
    n = x.shape[-1]
    turn = torch.exp(0.5j * torch.pi * torch.arange(n, device=x.device, dtype=x.dtype) / n)
    imag = torch.cat([torch.zeros_like(x[..., :1]), -x.flip(-1)[..., :-1]], dim=-1)
    even = torch.fft.ifft(torch.complex(x, imag) * turn / 2).real
    y = torch.empty_like(x)
    y[..., ::2] = even[..., : n - n // 2]
    y[..., 1::2] = even.flip(-1)[..., : n // 2]
    return y


def dct1(x: Tensor) -> Tensor:
    """Type-I discrete cosine transform of the last axis (at least 2 long): that of its even extension."""
    return torch.fft.rfft(torch.cat([x, x.flip(-1)[..., 1:-1]], dim=-1)).real


def forward_transform(x: Tensor, kind: str, size: int) -> Tensor:
    """Transform the last axis to *size* points (Fourier) or as long as it is (cosine)."""
    if kind == "fft":
        return torch.fft.rfft(x, n=size) / size
    if kind == "fft-o":
        return torch.fft.rfft(x, n=size, norm="ortho")
    return dct2(x) if kind == "dct" else dct1(x)


def inverse_transform(x: Tensor, kind: str, size: int) -> Tensor:
    """Inverse of `forward_transform`."""
    if kind.startswith("fft"):
        return torch.fft.irfft(x, n=size, norm="forward" if kind == "fft" else "ortho")
    return idct2(x) if kind == "dct" else dct1(x) / (2 * (x.shape[-1] - 1))


class ConvNet(nn.Module):
    """Grouped convolutions along the second axis with norms after them: [B, L, in] -> [B, L, out]."""

    def __init__(self, width_in: int, width_out: int, groups: int, config: OrchidConfig) -> None:
        super().__init__()
        self.size = config.conv_size
        self.mode = "constant" if config.padding == "zeros" else "reflect"
        widths = [width_in, *[width_out] * config.conv_layers]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, config.conv_size, groups=groups, bias=config.conv_bias)
            for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(width_out) if config.conv_norm == "layernorm" else nn.Identity() for _ in self.convs
        )

    def forward(self, x: Tensor) -> Tensor:
        length, half = x.shape[1], (self.size - 1) // 2
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, nn.Conv1d)
            bias = None if conv.bias is None else conv.bias.to(x.dtype)
            many, one_each = conv.out_channels // conv.groups, conv.in_channels == conv.groups
            if one_each and self.mode == "constant" and self.size == 2 * half + 1:  # channels stay last
                x = F.pad(x if many == 1 else x.repeat_interleave(many, -1), (0, 0, 0, half))
                x = causal_short_conv(x, conv.weight.to(x.dtype), bias)[:, half:]
            else:
                x = F.pad(x.transpose(1, 2), (half, half), mode=self.mode)
                x = F.conv1d(x, conv.weight.to(x.dtype), bias, groups=conv.groups)[..., :length].transpose(1, 2)
            x = F.gelu(x) if i < len(self.convs) - 1 else x
            if isinstance(norm, nn.LayerNorm):
                x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        return x


class Orchid(RowMixer):
    """Orchid operator of order 2, bidirectional. x [B, L, D] -> [B, L, D].

    With projections x0, x1, v: y = T^-1[(T k + H(v)) · T(v x1)] + b (v x1), then W_out(x0 · y [+ k' * x + b' x]).
    The convolutions have the length of each sequence (circular or symmetric), so padding and packing are done row by
    row of equal length.

    Raises:
        ConfigError: the cosine transforms have no power spectrum of two parts to be cut (`cut` with `dct`).
    """

    Config = OrchidConfig

    def __init__(self, d_model: int, config: OrchidConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        fourier = config.transform.startswith("fft")
        if config.cut and not fourier:
            raise ConfigError("orchid can cut its kernel in time (cut) only with a Fourier transform")
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.short_filter = nn.Conv1d(3 * d_model, 3 * d_model, config.short_filter, groups=3 * d_model)
        network = HyenaConfig(
            max_len=config.max_len, filter_width=config.filter_width, emb_dim=config.emb_dim,
            num_inner_mlps=config.num_inner_mlps, sin_freq=config.sin_freq, shift=0.0, learn_positions=True,
        )  # fmt: skip
        self.filter = HyenaFilter(d_model, network)
        self.residual = HyenaFilter(d_model, network) if config.residual else None
        complex_parts = 2 if fourier else 1
        taken = 1 if config.kernel == "absfreq" else complex_parts

        def net(width_in: int, width_out: int) -> ConvNet:
            return ConvNet(width_in * d_model, width_out * d_model, d_model, config)

        self.nets = nn.ModuleDict()
        if config.kernel == "corr":
            self.nets.update({"k": net(1, 1), "q": net(1, 1)})
        elif config.network != "convf":
            self.nets["time"] = net(1, 1)
        if config.network == "convtf" or (config.network == "convf" and config.kernel != "corr"):
            self.nets["freq"] = net(taken, complex_parts)
        self.info = MixerInfo(
            layouts=frozenset({"full"}), step="none", needs_max_len=True, packing=True, split="gather"
        )

    def mix(self, x: Tensor, count: Tensor | None, state: Any) -> tuple[Tensor, None]:
        if x.shape[1] > self.config.max_len:
            raise ZooError(
                f"orchid got {x.shape[1]} tokens, but its kernel was made for {self.config.max_len} (max_len)"
            )
        if count is None:
            return self.operate(x), None
        y = torch.zeros_like(x)
        for length in count.unique().tolist():
            if length:
                rows = (count == length).nonzero()[:, 0]
                part = F.pad(self.operate(x[rows, :length]), (0, 0, 0, x.shape[1] - length))
                y = y.index_add(0, rows, part.to(y.dtype))
        return y, None

    def operate(self, x: Tensor) -> Tensor:
        """Sequences x [B, L, D] of one length, without padding."""
        kind, length, work = self.config.transform, x.shape[1], work_dtype(x)
        u = self.in_proj(x)
        shape = u[..., -self.d_model :]
        u = causal_short_conv(u, self.short_filter.weight, self.short_filter.bias)
        with torch.autocast(x.device.type, enabled=False):
            gate, first, v = (t.transpose(1, 2) for t in u.to(work).split(self.d_model, dim=-1))  # [B, D, L]
            y = self.convolve(v * first, self.adaptive(shape.to(work))) * gate
            if self.residual is not None:
                raw, kernel = x.to(work).transpose(1, 2), self.residual(length).to(work)
                spectrum = forward_transform(raw, kind, length) * forward_transform(kernel, kind, length)
                y = y + inverse_transform(spectrum, kind, length) + self.residual.skip.to(work)[:, None] * raw
            y = y.transpose(1, 2).to(x.dtype)
        return self.out_proj(y)

    def convolve(self, v: Tensor, adaptive: Tensor) -> Tensor:
        """v [B, D, L] with the static and the adaptive kernel, plus the direct path."""
        kind, length = self.config.transform, v.shape[-1]
        static = self.filter(length).to(v.dtype)
        if self.config.cut:
            spectrum = forward_transform(static + adaptive, kind, length)
        else:
            spectrum = forward_transform(static, kind, length) + adaptive
        y = inverse_transform(forward_transform(v, kind, length) * spectrum, kind, length)
        return y + self.filter.skip.to(v.dtype)[:, None] * v

    def adaptive(self, v: Tensor) -> Tensor:
        """The kernel drawn from v [B, L, D]: its spectrum [B, D, n], or the kernel [B, D, L] where it is cut."""
        cfg, length = self.config, v.shape[1]
        size = 2 * length if cfg.cut else length
        fourier = cfg.transform.startswith("fft")

        def spectrum(t: Tensor) -> Tensor:  # [B, L, D] -> [B, n, D]
            return forward_transform(t.transpose(1, 2), cfg.transform, size).transpose(1, 2)

        if cfg.kernel == "corr":
            q = spectrum(self.nets["q"](v))
            act = {"id": lambda t: t, "gelu": F.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[cfg.actq]
            q = torch.complex(act(q.real), act(q.imag)) if fourier else act(q)
            h = spectrum(self.nets["k"](v)).conj() * q
        else:
            h = spectrum(self.nets["time"](v) if "time" in self.nets else v)
            if cfg.kernel == "absfreq":
                h = h.real.square() + h.imag.square() if fourier else h.abs()
        if "freq" in self.nets:
            h = self.nets["freq"](torch.cat([h.real, h.imag], dim=-1) if h.is_complex() else h)
            if fourier and cfg.kernel == "corr":
                h = torch.complex(*h.chunk(2, dim=-1))
            elif fourier:
                h = torch.complex(h[..., 0::2], h[..., 1::2])
        h = h.transpose(1, 2)  # [B, D, n]
        return inverse_transform(h, cfg.transform, size)[..., :length] if cfg.cut else h

    def cost(self, length: int, batch: int = 1) -> Cost:
        weights = sum(p.numel() for part in (self.in_proj, self.out_proj, self.nets) for p in part.parameters())
        filters = [part for part in (self.filter, self.residual) if part is not None]
        network = sum(p.numel() for part in filters for p in part.network())
        transforms = (20 + 10 * len(filters)) * self.d_model * length * max(1, length.bit_length())
        return Cost(flops=float(batch * (2 * length * weights + transforms) + 2 * length * network), state_bytes=0)

    def param_groups(self) -> list[ParamGroup]:
        """The static kernels' networks do not decay and have their own rate; their position features another."""
        groups: list[ParamGroup] = []
        for part in (self.filter, self.residual):
            if part is None:
                continue
            network: ParamGroup = {"params": part.network(), "weight_decay": 0.0}
            positions: ParamGroup = {"params": [p for p in (part.positions,) if p is not None], "weight_decay": 0.0}
            if self.config.filter_lr is not None:
                network["lr"] = self.config.filter_lr
            if self.config.positions_lr is not None:
                positions["lr"] = self.config.positions_lr
            groups += [network, positions]
        return groups
