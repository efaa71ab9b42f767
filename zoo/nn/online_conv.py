"""Long convolution one token at a time, exactly and without O(t) work per token: the relaxed (online) schedule.

    y[b, d, t] = sum_{j <= t} k[d, t - j] u[b, d, j] + skip[d] u[b, d, t]

Each input must reach every later output once. When the number n of inputs pushed is a multiple of 2^i (and of no higher
power), the last p = 2^i of them are convolved at once with the lags 1 .. 2p - 1 and added to the next p outputs, which
nobody has read yet; the dyadic blocks tile the triangle j < t. A block costs O(p log p), so L tokens cost O(L log^2 L)
per channel (van der Hoeven, "Relax, but don't be too lazy", 2002, for a kernel known in advance). Blocks shorter than
`base` are replaced by one direct product per token, which is cheaper than their transforms.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.nn.spectra import ring_size
from zoo.nn.state import State

_SLICE = 1 << 17


@dataclasses.dataclass
class OnlineConvState(State):
    """What one batch of sequences carries: every input so far, and what they already add to later outputs.

    Attributes:
        history: [B, D, M] inputs; columns from `position` on are zero.
        pending: [B, D, M] sums for outputs not read yet; a column at `position` or later is still growing.
        position: tokens consumed.
        origin: tokens whose effect on every later output is already in `pending` (the prefill).
    """

    history: Tensor
    pending: Tensor
    position: int = 0
    origin: int = 0


class OnlineConv:
    """The decoding side of `long_conv` for one filter bank, shared by all sequences; states are held by the caller.

    Args:
        k: [D, M] filters; at most M tokens can be consumed.
        skip: [D] weight of the direct path, or None.
        base: a power of two; inputs within a block of that many tokens are summed directly.
    """

    def __init__(self, k: Tensor, skip: Tensor | None = None, *, base: int = 64) -> None:
        if base < 1 or base & (base - 1):
            raise ZooError(f"OnlineConv's base must be a power of two, got {base}")
        work = torch.float64 if k.dtype == torch.float64 else torch.float32
        self.k = k.detach().to(work)
        if skip is not None:
            self.k = self.k.clone()
            self.k[:, 0] += skip.detach().to(work)  # the direct path is one more tap at lag 0
        self.width, self.max_len = self.k.shape
        self.base = base
        self._recent = self.k[:, :base].flip(-1).contiguous()  # [D, base], lag 0 last
        self._reversed: Tensor | None = None
        self._spectra: dict[int, Tensor] = {}

    def init_state(self, batch: int) -> OnlineConvState:
        """The state of *batch* empty sequences."""
        empty = self.k.new_zeros(batch, self.width, self.max_len)
        return OnlineConvState(empty, empty.clone())

    @torch.no_grad()
    def push(self, u: Tensor, state: OnlineConvState) -> tuple[Tensor, OnlineConvState]:
        """Consume one token: u [B, D] to y [B, D] in its dtype; *state* is updated in place and returned.

        Raises:
            ZooError: M tokens were consumed already.
        """
        t = state.position
        self._check(t + 1)
        state.history[:, :, t] = u
        since = t - state.origin
        block = since % self.base + 1  # inputs of the unfinished base block, this one included
        near = torch.linalg.vecdot(state.history[:, :, t - block + 1 : t + 1], self._recent[:, -block:])
        y = near.add_(state.pending[:, :, t])
        state.position = t + 1
        if block == self.base and state.position < self.max_len:
            self._finish_block(state, (since + 1) & -(since + 1))
        return y.to(u.dtype), state

    @torch.no_grad()
    def extend(self, u: Tensor, state: OnlineConvState) -> tuple[Tensor, OnlineConvState]:
        """Consume a chunk (prefill): u [B, D, n] to y [B, D, n]; one transform then settles all later outputs.

        Raises:
            ZooError: more than M tokens in all.
        """
        start, stop = state.position, state.position + u.shape[-1]
        self._check(stop)
        state.history[:, :, start:stop] = u
        # Outputs before `start` are already read, so that lags wrapping round onto them do no harm.
        ring = ring_size(max(2, self.max_len + stop - start - 1))
        reach = torch.fft.rfft(self.k, n=ring)
        reach = torch.fft.irfft(torch.fft.rfft(state.history[:, :, :stop], n=ring).mul_(reach), n=ring)
        state.pending[:, :, stop:] = reach[..., stop : self.max_len]
        state.position = state.origin = stop
        return reach[..., start:stop].to(u.dtype), state

    @torch.no_grad()
    def push_direct(self, u: Tensor, state: OnlineConvState) -> tuple[Tensor, OnlineConvState]:
        """The same as `push` by the whole dot product, O(t) a token: the reference, and what the schedule must beat."""
        t = state.position
        self._check(t + 1)
        state.history[:, :, t] = u
        if self._reversed is None:
            self._reversed = self.k.flip(-1).contiguous()  # [D, M], lag 0 last
        past, taps = state.history[:, :, : t + 1], self._reversed[:, self.max_len - t - 1 :]
        # by channels: the product of the whole would be written to fresh memory
        channels = max(1, _SLICE // (len(past) * (t + 1)))
        slices = zip(past.split(channels, dim=1), taps.split(channels), strict=True)
        y = torch.cat([torch.linalg.vecdot(a, b) for a, b in slices], dim=1)
        state.position = t + 1
        return y.to(u.dtype), state

    def _check(self, tokens: int) -> None:
        if tokens > self.max_len:
            raise ZooError(f"a long convolution with filters of {self.max_len} taps cannot consume {tokens} tokens")

    def _finish_block(self, state: OnlineConvState, size: int) -> None:
        """Add the last *size* inputs to the next *size* outputs."""
        now = state.position
        count = min(size, self.max_len - now)
        # A ring of 2 size: what wraps round lands in the first half, which is not used.
        block = torch.fft.rfft(state.history[:, :, now - size : now], n=2 * size)
        far = torch.fft.irfft(block.mul_(self._spectrum(size)), n=2 * size)
        state.pending[:, :, now : now + count] += far[..., size : size + count]

    def _spectrum(self, size: int) -> Tensor:
        if size not in self._spectra:
            self._spectra[size] = torch.fft.rfft(self.k[:, : 2 * size], n=2 * size)  # [D, size + 1]
        return self._spectra[size]
