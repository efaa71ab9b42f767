"""Mamba-2: a selective state space with one decay a head, computed by chunks (SSD, arXiv:2405.21060)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.norm import gated_norm
from zoo.nn.rows import RowMixer, row_mask, row_tail
from zoo.nn.shortconv import causal_short_conv
from zoo.nn.ssd import ssd
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State


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
                y = y + self.skip.to(work)[:, None] * u
            else:
                y, end = ssd(u, dt, a, b, c, before, cfg.chunk, self.skip.to(work))
            y = y.flatten(2)
            groups = cfg.n_groups if cfg.norm_per_group else 1
            y = gated_norm(y, gate.to(work), self.norm_weight.to(work), groups, cfg.eps)
        out = self.out_proj(y.to(x.dtype))
        return out, (None if after is None else Mamba2State(after, end))

    def _one(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        per = self.heads // self.config.n_groups
        b, c = b.repeat_interleave(per, 1), c.repeat_interleave(per, 1)  # [B, H, N]
        state = state * (dt * a).exp()[..., None, None] + (x * dt[..., None])[..., None] * b[:, :, None]
        return (state @ c[..., None])[:, None, ..., 0], state

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
