"""Where a token stands: rotary angles and their stretched bases, ALiBi slopes, learned and sine tables.

Rotary embedding: Su et al. 2021, arXiv:2104.09864, §3.2. Channel pair j of a head of width d turns by
position * f_j, f_j = base^(-2j/d). Positions may be fractional (V2PE) and may have several axes (pictures, clips).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError


@config
class RotaryConfig:
    """Rotary angles.

    Attributes:
        base: of the geometric series of frequencies.
        dim: channels of each head that turn, 0 for all.
        scaling: how the frequencies are stretched for inputs longer than the trained ones: `linear` divides all by
            factor (position interpolation, arXiv:2306.15595); `ntk` raises the base so that the slowest one is
            divided by factor; `yarn` divides the slow ones, keeps the fast ones and blends between (arXiv:2309.00071).
        factor: of the stretching.
        original_len: trained length in tokens, which `yarn` needs.
        beta_fast, beta_slow: turns over original_len above which a frequency is kept, and below which it is divided.
        attention_factor: `yarn` multiplies cosine and sine by it; None takes 0.1 ln(factor) + 1.
        power: Giraffe's power basis, f_j (1 - j/J)^power with J = d/2 (arXiv:2308.10882, §3).
        truncate: Giraffe's truncated basis for a length in tokens, with t = 2 pi / truncate: frequencies from t on
            are kept, those from t/8 on become t/16, the rest 0. Applied after scaling and power.
        interleaved: pairs are neighbouring channels (GPT-J) instead of the two halves of a head (Llama).
        axes: channels of each axis where positions are [B, L, axes]; they sum to `dim`.
    """

    base: float = 10000.0
    dim: int = 0
    scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    factor: float = 1.0
    original_len: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    power: float = 0.0
    truncate: int = 0
    interleaved: bool = False
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dim % 2 or any(axis % 2 for axis in self.axes):
            raise ValueError("rotary channels come in pairs: dim and axes must be even")
        if self.scaling == "yarn" and self.original_len < 1:
            raise ValueError("yarn needs original_len, the trained length in tokens")
        if self.factor <= 0:
            raise ValueError(f"factor must be positive, got {self.factor}")


def frequencies(options: RotaryConfig, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Angular frequencies [dim / 2] of one axis with *dim* channels, float32, in radians a token."""
    half = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    base = options.base
    if options.scaling == "ntk" and dim > 2:
        base = base * options.factor ** (dim / (dim - 2))
    freq = 1.0 / base ** (half / dim)
    if options.scaling == "linear":
        freq = freq / options.factor
    elif options.scaling == "yarn":
        freq = _yarn(options, dim, freq)
    if options.power:
        freq = freq * (1 - torch.arange(len(half), device=device) / len(half)) ** options.power
    if options.truncate:
        edge = 2 * math.pi / options.truncate
        kept = torch.where(freq >= edge, freq, torch.full_like(freq, edge / 16))
        freq = torch.where(freq >= edge / 8, kept, torch.zeros_like(freq))
    return freq


def _yarn(options: RotaryConfig, dim: int, freq: Tensor) -> Tensor:
    """Blend of kept and divided frequencies (arXiv:2309.00071, §3.2)."""

    def channel(turns: float) -> float:  # the pair that makes *turns* turns over the trained length
        return dim * math.log(options.original_len / (turns * 2 * math.pi)) / (2 * math.log(options.base))

    low = max(math.floor(channel(options.beta_fast)), 0)
    high = min(math.ceil(channel(options.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, device=freq.device, dtype=torch.float32) - low) / max(high - low, 1e-3)
    divided = ramp.clamp(0, 1)
    return freq / options.factor * divided + freq * (1 - divided)


def rotary(options: RotaryConfig, dim: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., dim / 2], float32, of positions [...] or, with several axes, [..., axes].

    Raises:
        ZooError: positions that have not the axes of the config.
    """
    with torch.autocast(position.device.type, enabled=False):
        position = position.to(torch.float32)
        if not options.axes:
            angle = position[..., None] * frequencies(options, dim, position.device)
        else:
            if position.shape[-1] != len(options.axes) or sum(options.axes) != dim:
                raise ZooError(
                    f"rotary axes {list(options.axes)} need positions [B, L, {len(options.axes)}] and sum to the "
                    f"{dim} rotated channels, got positions {list(position.shape)}"
                )
            parts = zip(position.unbind(-1), options.axes, strict=True)
            angle = torch.cat([p[..., None] * frequencies(options, size, p.device) for p, size in parts], dim=-1)
        gain = 1.0
        if options.scaling == "yarn":
            gain = options.attention_factor or (0.1 * math.log(options.factor) + 1 if options.factor > 1 else 1.0)
        return angle.cos() * gain, angle.sin() * gain


@lru_cache(maxsize=16)
def _kept_table(options: RotaryConfig, dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():  # the table is kept, and may later meet autograd
        return rotary(options, dim, torch.arange(length, device=device))


def rotary_table(options: RotaryConfig, dim: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length or more, dim / 2] of the positions 0, 1, ...; shared by all layers of equal options."""
    size = max(256, 1 << (length - 1).bit_length())  # few sizes, so that decoding does not compute one a step
    if torch.compiler.is_compiling():
        return rotary(options, dim, torch.arange(length, device=device))
    return _kept_table(options, dim, size, device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first channels of x [..., L, H, d] by angles given as cos, sin [..., L, n]: pairs (a, b) of n each.

    (a, b) -> (a cos - b sin, b cos + a sin); channels beyond 2n stay as they are.
    """
    n = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    rest = x[..., 2 * n :]
    if interleaved:
        a, b = x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = x[..., :n], x[..., n : 2 * n]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def slope_vector(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """Slopes [H] as float32.

    In a traced graph they are computed: a tensor made from a list is a constant of the graph, which the ONNX exporter
    loses.
    """
    if not torch.compiler.is_compiling():
        return torch.tensor(slopes, device=device, dtype=torch.float32)
    return torch.stack([torch.full((), slope, device=device, dtype=torch.float32) for slope in slopes])


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Slopes of ALiBi (Press et al. 2021, arXiv:2108.12409, §3): 2^(-8i/n) for n heads, n a power of two; otherwise
    those of the next smaller power, then every second one of the next larger."""
    power = 1 << (heads.bit_length() - 1)
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < heads:
        first += [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)][: heads - power]
    return tuple(first)


class LearnedPositions(nn.Module):
    """A learned vector for each of max_len positions (GPT-2, BERT), drawn from N(0, 0.02^2)."""

    def __init__(self, max_len: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(max_len, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, position: Tensor) -> Tensor:
        """Integer positions [...] -> [..., D].

        Raises:
            ZooError: a position of max_len or more.
        """
        if not torch.compiler.is_compiling() and position.numel() and int(position.max()) >= len(self.weight):
            raise ZooError(f"position {int(position.max())} lies beyond the {len(self.weight)} learned ones")
        return nn.functional.embedding(position, self.weight)


def sincos(position: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Fixed embedding [..., width] of positions [...] (fractions allowed): all sines, then all cosines.

    Vaswani et al. 2017, arXiv:1706.03762, §3.5, with the frequencies base^(-j / (width/2)).
    """
    half = width // 2
    freq = base ** -(torch.arange(half, dtype=torch.float64, device=position.device) / half)
    angle = position.double()[..., None] * freq
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def sincos_grid(shape: tuple[int, ...], width: int, base: float = 10000.0) -> Tensor:
    """Fixed embedding [n_1, ..., n_k, width] of a grid: each axis has its own share of the channels, in axis order.

    The shares are equal and even; what is left over goes to the last axis.

    Raises:
        ZooError: fewer than two channels an axis, or an odd width.
    """
    axes = len(shape)
    share = width // axes // 2 * 2
    if share < 2 or width % 2:
        raise ZooError(f"a {axes}-axis sine embedding needs an even width of at least {2 * axes}, got {width}")
    parts = []
    for axis, size in enumerate(shape):
        channels = share if axis < axes - 1 else width - share * (axes - 1)
        line = sincos(torch.arange(size), channels, base)
        parts.append(line.view(*[size if i == axis else 1 for i in range(axes)], channels).expand(*shape, channels))
    return torch.cat(parts, dim=-1)
