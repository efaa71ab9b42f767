"""H3: a shift and a diagonal state space between three projections (arXiv:2212.14052)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.longconv import long_conv
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.rows import RowMixer, row_mask, row_tail
from zoo.nn.ssm import DiagonalSSM, SSMState, complex_of, work_dtype
from zoo.nn.state import State


@config
class H3Config:
    """H3 layer.

    Attributes:
        d_state: N, taps of the shift and real state size of the diagonal system.
        head_dim: keys and values of a head are multiplied as an outer product of this size.
        init: imaginary parts of A: `lin`, `inv` or `real`, as in S4D.
        disc: discretisation of the diagonal system.
        dt_min, dt_max: range of the log-uniform initial step sizes.
        lr: learning rate of dt, A and B, which never decay; None follows the optimiser's.
    """

    d_state: int = 64
    head_dim: int = 1
    init: Literal["lin", "inv", "real"] = "lin"
    disc: Literal["zoh", "bilinear"] = "bilinear"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    lr: float | None = None


@dataclass
class H3State(State):
    """history [B, N-1, D]: the last keys; h [B, dh², H, N/2]: state of the diagonal system, complex."""

    history: Tensor
    h: Tensor


class H3(RowMixer):
    """y = W_o (q · SSM_diag(SSM_shift(k) ⊗ v)), per head of size dh (§3). x [B, L, D] -> [B, L, D].

    Raises:
        ConfigError: head_dim does not divide d_model.
    """

    Config = H3Config

    def __init__(self, d_model: int, config: H3Config, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        if d_model % config.head_dim:
            raise ConfigError(f"h3 needs a head_dim that divides d_model {d_model}, got {config.head_dim}")
        self.heads = d_model // config.head_dim
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        # the shift system's state moves one place a token: B = e_1 makes it the list of the last N keys
        self.shift_b = nn.Parameter(F.one_hot(torch.zeros(d_model, dtype=torch.long), config.d_state).float())
        self.shift_c = nn.Parameter(torch.empty(d_model, config.d_state).uniform_(-1, 1) * config.d_state**-0.5)
        self.shift_skip = nn.Parameter(torch.randn(d_model))
        self.system = DiagonalSSM(
            self.heads, config.d_state // 2, init=config.init, disc=config.disc, dt_min=config.dt_min,
            dt_max=config.dt_max, input_vector=True,
        )  # fmt: skip
        self.skip = nn.Parameter(torch.randn(self.heads))
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="state")

    def shift_kernel(self, dtype: torch.dtype) -> Tensor:
        """[D, N] taps: the correlation of B and C."""
        size = 2 * self.config.d_state
        b, c = torch.fft.rfft(self.shift_b.to(dtype), n=size), torch.fft.rfft(self.shift_c.to(dtype), n=size)
        return torch.fft.irfft(b.conj() * c, n=size)[:, : self.config.d_state]

    def mix(self, x: Tensor, count: Tensor | None, state: H3State | None) -> tuple[Tensor, H3State | None]:
        work, length = work_dtype(x), x.shape[1]
        q, k, v = (proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        with torch.autocast(x.device.type, enabled=False):
            q, v = q.to(work).transpose(1, 2), v.to(work).transpose(1, 2)  # [B, D, L]
            k = row_mask(k.to(work), count)
            history = None if state is None else state.history
            after = None if history is None else row_tail(k, history, count)
            past = k if history is None else torch.cat([history.to(work), k], 1)
            k = self._shift(past.transpose(1, 2), length)
            y, h = self._mix_heads(q, k, v, count, state)
            y = y.transpose(1, 2).to(x.dtype)
        return self.out_proj(y), (None if after is None or h is None else H3State(after, h))

    def _shift(self, k: Tensor, length: int) -> Tensor:
        """Keys [B, D, past + L] -> shifted keys [B, D, L]."""
        taps = self.shift_kernel(k.dtype)
        if length == 1:
            taps = taps[:, : k.shape[-1]].flip(-1)
            return ((k[..., -taps.shape[1] :] * taps).sum(-1) + self.shift_skip.to(k.dtype) * k[..., -1])[..., None]
        taps = F.pad(taps[:, : k.shape[-1]], (0, max(0, k.shape[-1] - taps.shape[1])))
        return long_conv(k, taps, self.shift_skip.to(k.dtype))[..., -length:]

    def _mix_heads(
        self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, state: H3State | None
    ) -> tuple[Tensor, Tensor | None]:
        size, heads, (batch, _, length) = self.config.head_dim, self.heads, q.shape
        q, k, v = (t.view(batch, heads, size, length).transpose(1, 2) for t in (q, k, v))  # [B, dh, H, L]
        kv = (k[:, :, None] * v[:, None]).reshape(batch * size * size, heads, length)
        h = None
        if state is None:
            y = long_conv(kv, self.system.kernel(length, kv.dtype)[0], self.skip.to(kv.dtype))
        else:
            rows = None if count is None else count.repeat_interleave(size * size)
            flat = SSMState(state.h.reshape(batch * size * size, heads, -1))
            y, flat = self.system.advance(kv, flat, rows)
            y = y[:, 0] + self.skip.to(kv.dtype)[:, None] * kv
            h = flat.h.view_as(state.h)
        y = y.view(batch, size, size, heads, length)
        # the official code puts heads last in its output though not in its inputs; out_proj has learned that order
        return (y * q[:, :, None]).sum(1).flatten(1, 2), h

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> H3State:
        """The empty state: constant in max_len."""
        cfg, dtype = self.config, dtype if dtype == torch.float64 else torch.float32
        return H3State(
            torch.zeros(batch, cfg.d_state - 1, self.d_model, device=device, dtype=dtype),
            torch.zeros(batch, cfg.head_dim**2, self.heads, cfg.d_state // 2, device=device, dtype=complex_of(dtype)),
        )

    def cost(self, length: int, batch: int = 1) -> Cost:
        cfg = self.config
        rows = cfg.head_dim**2 * self.heads
        transforms = 15 * (rows + self.d_model) * length * max(1, (2 * length).bit_length())
        kernel = 4 * self.heads * length * cfg.d_state
        projections = 8 * length * self.d_model**2
        state = 4 * batch * ((cfg.d_state - 1) * self.d_model + rows * 2 * (cfg.d_state // 2))
        return Cost(flops=float(batch * (transforms + projections) + kernel), state_bytes=state)

    def param_groups(self) -> list[ParamGroup]:
        """dt, A and both B: no decay, own rate; the skips: no decay."""
        own: ParamGroup = {"params": [*self.system.own_parameters(), self.shift_b], "weight_decay": 0.0}
        if self.config.lr is not None:
            own["lr"] = self.config.lr
        return [own, {"params": [self.skip, self.shift_skip], "weight_decay": 0.0}]
