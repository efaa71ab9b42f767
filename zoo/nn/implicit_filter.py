"""Hyena's implicit filter: a small network of the position, times an exponential window (arXiv:2302.10866, §3.3)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from zoo.nn.hyena import HyenaConfig

CHUNK = 32768  # positions evaluated at once: the hidden layers are wide next to the filter


@lru_cache(maxsize=4)
def position_grid(max_len: int, emb_dim: int, phase: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position features z [max_len, emb_dim] = [t, Re e^(-i f w), Im e^(-i f w)] and times t [max_len], float32.

    t runs from 0 to 1, w = 2 pi n / max_len, and f from 1e-4 to bands - 1 in equal steps (§3.3).
    """
    with torch.inference_mode(False), torch.no_grad():  # the grid is kept, and may later meet autograd
        bands = (emb_dim - 1) // 2
        t = torch.linspace(0, 1, max_len, device=device)
        w = 2 * math.pi * torch.linspace(0, max_len - 1, max_len, device=device) / max_len
        f = torch.linspace(1e-4, bands - 1, bands, device=device)
        if phase == "split":
            return torch.cat([t[:, None], torch.cos(-f * w[:, None]), torch.sin(-f * w[:, None])], dim=1), t
        wave = torch.exp(-1j * f * w[:, None])
        return torch.cat([t[:, None], wave.real, wave.imag], dim=1), t


def decay_rates(channels: int, options: HyenaConfig, device: torch.device | str = "cpu") -> Tensor:
    """Signed rates of the exponential windows [channels], equally spaced from the slowest to the fastest."""
    target = math.log(options.decay_target)
    return torch.linspace(target / options.slow_decay_pct, target / options.fast_decay_pct, channels, device=device)


class HyenaFilter(nn.Module):
    """The implicit filter: Linear - sin - [Linear - sin] * num_inner_mlps - Linear of the position, times its window.

    All sines share one learned frequency. `skip` weighs the direct path of each convolution.
    """

    def __init__(self, channels: int, config: HyenaConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        width = config.filter_width
        self.layers = nn.ModuleList([nn.Linear(config.emb_dim, width)])
        self.layers.extend(nn.Linear(width, width) for _ in range(config.num_inner_mlps))
        self.out = nn.Linear(width, channels, bias=False)
        self.freq = nn.Parameter(torch.full((width,), config.sin_freq)) if config.train_freq else None
        self.skip = nn.Parameter(torch.randn(channels))
        self.positions: nn.Parameter | None = None
        if config.learn_positions:
            self.positions = nn.Parameter(self._grid(torch.device("cpu"))[0].clone())

    def forward(self, length: int) -> Tensor:
        """Taps 0 .. length - 1 of all channels: [channels, length], at least float32.

        Hidden layers are recomputed in the backward pass where they would outweigh the filter itself.
        """
        if length <= CHUNK:
            return self.taps(self.hidden(0, length), 0)
        spans = [(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
        part = lambda start, stop: self.taps(self.hidden(start, stop), start)
        if torch.is_grad_enabled():
            return torch.cat(
                [checkpoint(part, *span, use_reentrant=False, preserve_rng_state=False) for span in spans], dim=1
            )
        taps = torch.empty(self.channels, length, device=self.out.weight.device, dtype=self.work)
        for start, stop in spans:
            taps[:, start:stop] = part(start, stop)
        return taps

    @property
    def work(self) -> torch.dtype:
        """The dtype filters are computed in: that of the weights, but at least float32."""
        return torch.promote_types(self.out.weight.dtype, torch.float32)

    def hidden(self, start: int, stop: int) -> Tensor:
        """Last hidden layer at positions start .. stop - 1: [filter_width, n]."""
        work = self.work
        z = (self._grid(self.out.weight.device)[0] if self.positions is None else self.positions)[start:stop]
        freq = self.config.sin_freq if self.freq is None else self.freq.to(work)[:, None]
        h = z.to(work).T  # [emb_dim, n]: channels first, so that the taps need no transpose
        with torch.autocast(h.device.type, enabled=False):
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                h = torch.sin(freq * torch.addmm(layer.bias.to(work)[:, None], layer.weight.to(work), h))
        return h

    def taps(self, hidden: Tensor, start: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Windowed taps [len(rows), n] of the channels *rows*, from the hidden layer at positions from *start*."""
        weight, config = self.out.weight, self.config
        with torch.autocast(weight.device.type, enabled=False):
            h = weight[rows].to(hidden.dtype) @ hidden
            if config.modulate:
                rate = decay_rates(self.channels, config, weight.device)[rows].to(hidden.dtype).abs()
                t = self._grid(weight.device)[1][start : start + hidden.shape[1]].to(hidden.dtype)
                h = h * (torch.exp(-rate[:, None] * t) + config.shift)
        return h

    def _grid(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return position_grid(self.config.max_len, self.config.emb_dim, self.config.phase, device)

    def network(self) -> list[nn.Parameter]:
        """Parameters of the filter network without the skip weights and position features."""
        params = [p for layer in (*self.layers, self.out) for p in layer.parameters()]
        return params if self.freq is None else [*params, self.freq]
