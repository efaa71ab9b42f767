"""Mamba-2: a selective state space with one decay a head, computed by chunks (SSD, arXiv:2405.21060)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.rows import RowMixer, row_mask, row_tail
from zoo.nn.shortconv import causal_short_conv
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State

_LONG = 16384  # tokens from which on a sequence is computed by spans, recomputed in the backward pass
_SPAN = 4096


@config
class Mamba2Config:
    """Mamba-2 block.

    Attributes:
        d_state: N, state size a channel.
        expand: inner width over d_model.
        head_dim: P, channels that share one decay.
        n_groups: G, groups of heads that share B and C.
        conv_kernel: taps of the short convolution on x, B and C.
        chunk: tokens mixed by one matrix product; changes the speed, not the result.
        bias: biases of the two projections.
        conv_bias: bias of the short convolution.
        dt_min, dt_max, dt_floor: range of the log-uniform initial step sizes, and their floor.
        dt_limit: (least, largest) step size after the softplus; None for no limit.
        norm_per_group: the gated norm is taken within each group (mamba_ssm with several groups; the Hugging Face
            port norms the whole width).
        eps: of the gated norm.
    """

    d_state: int = 128
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    conv_kernel: int = 4
    chunk: int = 64
    bias: bool = False
    conv_bias: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float] | None = None
    norm_per_group: bool = False
    eps: float = 1e-5


@dataclass
class Mamba2State(State):
    """history [B, K-1, channels]: the last inputs of the short convolution; ssm [B, H, P, N]."""

    history: Tensor
    ssm: Tensor


def ssd(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """S_t = exp(a dt_t) S_{t-1} + dt_t x_t b_t^T, y_t = S_t c_t, by chunks (§6).

    Within a chunk the recurrence is attention with the mask exp(sum of a dt); between chunks only states travel.

    Args:
        x: [B, L, H, P].
        dt: [B, L, H] step sizes; 0 leaves the state as it is.
        a: [H] negative.
        b, c: [B, L, G, N], G dividing H.
        state: [B, H, P, N] before the first token; zeros if None.
        chunk: tokens a chunk.

    Returns:
        y [B, L, H, P] and the state after the last token.
    """
    batch, length, heads, width = x.shape
    groups, size = b.shape[2:]
    chunk = min(chunk, 1 << max(0, (length - 1).bit_length()))
    padding = -length % chunk
    if padding:
        x, b, c = (F.pad(v, (0, 0, 0, 0, 0, padding)) for v in (x, b, c))
        dt = F.pad(dt, (0, 0, 0, padding))
    n, per = (length + padding) // chunk, heads // groups
    log_decay = (dt * a).view(batch, n, chunk, groups, per).permute(0, 1, 3, 4, 2)  # [B, n, G, R, Q]
    total = log_decay.cumsum(-1)
    taken = (x * dt[..., None]).view(batch, n, chunk, groups, per, width).permute(0, 1, 3, 4, 2, 5)  # [B,n,G,R,Q,P]
    b = b.view(batch, n, chunk, groups, size).transpose(2, 3)  # [B, n, G, Q, N]
    c = c.view(batch, n, chunk, groups, size).transpose(2, 3)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(above, -math.inf).exp()  # [B, n, G, R, Q, Q]
    scores = (c @ b.transpose(-1, -2))[:, :, :, None] * decay
    y = scores @ taken
    # state that each chunk adds, and what the next one starts from
    left = (total[..., -1:] - total).exp()
    added = (taken * left[..., None]).transpose(-1, -2) @ b[:, :, :, None]  # [B, n, G, R, P, N]
    whole = total[..., -1].exp()[..., None, None]
    now = x.new_zeros(batch, groups, per, width, size) if state is None else state.view(batch, groups, per, width, size)
    starts = []
    for part, kept in zip(added.unbind(1), whole.unbind(1), strict=True):
        starts.append(now)
        now = torch.addcmul(part, now, kept)
    if n > 1 or state is not None:
        before = torch.stack(starts, 1)
        y = y + (c[:, :, :, None] @ before.transpose(-1, -2)) * total.exp()[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, n * chunk, heads, width)
    return y[:, :length], now.reshape(batch, heads, width, size)


class Mamba2(RowMixer):
    """Mamba-2 (Dao & Gu 2024). x [B, L, D] -> [B, L, D].

    [z, x, B, C, dt] = W_in u; [x, B, C] pass a short convolution and SiLU; dt = softplus(dt + dt_bias); the state
    space with A = -exp(A_log) and skip D; then RMSNorm(y · SiLU(z)) and W_out.

    Raises:
        ConfigError: the inner width is not a multiple of head_dim, or the heads not of n_groups.
    """

    Config = Mamba2Config

    def __init__(self, d_model: int, config: Mamba2Config, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.inner = config.expand * d_model
        if self.inner % config.head_dim or (self.inner // config.head_dim) % config.n_groups:
            raise ConfigError(
                f"mamba2 needs an inner width (expand x d_model = {self.inner}) that head_dim {config.head_dim} "
                f"divides into heads that n_groups {config.n_groups} divides"
            )
        self.heads = self.inner // config.head_dim
        self.mixed = self.inner + 2 * config.n_groups * config.d_state  # channels of the short convolution
        self.in_proj = nn.Linear(d_model, self.inner + self.mixed + self.heads, bias=config.bias)
        bound = config.conv_kernel**-0.5
        self.conv_weight = nn.Parameter(torch.empty(self.mixed, 1, config.conv_kernel).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.mixed).uniform_(-bound, bound)) if config.conv_bias else None
        spread = math.log(config.dt_max / config.dt_min)
        dt = (torch.rand(self.heads) * spread + math.log(config.dt_min)).exp().clamp_min(config.dt_floor)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus
        self.a_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, d_model, bias=config.bias)
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="heads")

    def mix(self, x: Tensor, count: Tensor | None, state: Mamba2State | None) -> tuple[Tensor, Mamba2State | None]:
        cfg, work = self.config, work_dtype(x)
        batch, length, _ = x.shape
        gate, mixed, dt = self.in_proj(x).split([self.inner, self.mixed, self.heads], dim=-1)
        history = state.history if state is not None else None
        after = row_tail(mixed, history, count) if history is not None else None
        past = history.to(mixed.dtype) if history is not None else None
        mixed = F.silu(causal_short_conv(mixed, self.conv_weight, self.conv_bias, past))
        with torch.autocast(x.device.type, enabled=False):
            parts = mixed.to(work).split([self.inner, *[cfg.n_groups * cfg.d_state] * 2], dim=-1)
            u = parts[0].reshape(batch, length, self.heads, cfg.head_dim)
            b, c = (part.reshape(batch, length, cfg.n_groups, cfg.d_state) for part in parts[1:])
            dt = F.softplus(dt.to(work) + self.dt_bias.to(work))
            if cfg.dt_limit is not None:
                dt = dt.clamp(*cfg.dt_limit)
            dt = row_mask(dt, count)
            a = -self.a_log.to(work).exp()
            before = state.ssm.to(work) if state is not None else None
            if length == 1 and before is not None:
                y, end = self._one(u[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], before)
            else:
                y, end = self._scan(u, dt, a, b, c, before)
            y = (y + self.skip.to(work)[:, None] * u).flatten(2)
            y = self._gated_norm(y, gate.to(work))
        out = self.out_proj(y.to(x.dtype))
        return out, (None if after is None else Mamba2State(after, end))

    def _scan(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`ssd`, long sequences a span at a time: the masks within chunks would outweigh everything else."""
        if x.shape[1] <= _LONG:
            return ssd(x, dt, a, b, c, state, self.config.chunk)
        parts = []
        if state is None:
            state = x.new_zeros(x.shape[0], self.heads, self.config.head_dim, self.config.d_state)
        for start in range(0, x.shape[1], _SPAN):
            here = slice(start, start + _SPAN)
            arguments = (x[:, here], dt[:, here], a, b[:, here], c[:, here], state, self.config.chunk)
            if torch.is_grad_enabled():
                y, state = checkpoint(ssd, *arguments, use_reentrant=False)
            else:
                y, state = ssd(*arguments)
            parts.append(y)
        assert state is not None
        return torch.cat(parts, 1), state

    def _one(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        per = self.heads // self.config.n_groups
        b, c = b.repeat_interleave(per, 1), c.repeat_interleave(per, 1)  # [B, H, N]
        state = state * (dt * a).exp()[..., None, None] + (x * dt[..., None])[..., None] * b[:, :, None]
        return (state @ c[..., None])[:, None, ..., 0], state

    def _gated_norm(self, y: Tensor, gate: Tensor) -> Tensor:
        y = y * F.silu(gate)
        groups = self.config.n_groups if self.config.norm_per_group else 1
        split = y.unflatten(-1, (groups, -1))
        split = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + self.config.eps)
        return split.flatten(-2) * self.norm_weight.to(y.dtype)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Mamba2State:
        """The empty state: constant in max_len."""
        cfg, dtype = self.config, dtype if dtype == torch.float64 else torch.float32
        return Mamba2State(
            torch.zeros(batch, cfg.conv_kernel - 1, self.mixed, device=device, dtype=dtype),
            torch.zeros(batch, self.heads, cfg.head_dim, cfg.d_state, device=device, dtype=dtype),
        )

    def cost(self, length: int, batch: int = 1) -> Cost:
        cfg = self.config
        state = self.inner * cfg.d_state
        projections = 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        mixing = (
            2 * self.mixed * cfg.conv_kernel + 2 * cfg.chunk * (cfg.n_groups * cfg.d_state + self.inner) + 4 * state
        )
        return Cost(
            flops=float(batch * length * (projections + mixing)),
            state_bytes=4 * batch * ((cfg.conv_kernel - 1) * self.mixed + state),
        )

    def param_groups(self) -> list[ParamGroup]:
        """Decays, step sizes and skips do not decay."""
        return [{"params": [self.a_log, self.dt_bias, self.skip], "weight_decay": 0.0}]
