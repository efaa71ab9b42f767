"""BASED: linear attention with a second-order Taylor map (arXiv:2402.18668); JRT's prefix form (arXiv:2407.05483)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError, ZooError
from zoo.nn.layout import Layout
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer, Rows, row_mask
from zoo.nn.ssm import work_dtype
from zoo.nn.state import State
from zoo.nn.taylor import taylor_mix, taylor_sums


@config
class BasedConfig:
    """Taylor linear attention.

    Attributes:
        num_heads: H.
        feature_dim: d, width of queries and keys a head; the state has 1 + d + d(d+1)/2 features.
        head_dim: width of values a head; None for d_model / num_heads.
        scale_dim: the map approximates exp(q·k / sqrt(scale_dim)); None for feature_dim.
        chunk: tokens mixed by one matrix product; changes the speed, not the result.
        eps: added to the normaliser.
    """

    num_heads: int = 16
    feature_dim: int = 16
    head_dim: int | None = None
    scale_dim: int | None = None
    chunk: int = 128
    eps: float = 1e-12


@config
class JRTConfig(BasedConfig):
    """Prefix linear attention: BASED with a second set of keys and values for a prefix that everyone sees.

    Attributes:
        enc_length: length of the prefix where the layout does not say.
    """

    enc_length: int = 1024


@dataclass
class LinearState(State):
    """[B, H, F, dv + 1]: sums of feature(k) v^T, and of feature(k) alone in the last column."""

    sums: Tensor


def taylor_features(x: Tensor, scale: float) -> Tensor:
    """[..., d] -> [..., 1 + d + d(d+1)/2] with f(q)·f(k) = 1 + s + s²/2, s = q·k / sqrt(scale) (BASED, eq. 3).

    The square's features are its upper triangle, off-diagonal ones weighted by sqrt 2: the official map keeps both
    triangles, the same kernel with nearly twice the state.
    """
    # (x A + a)(x B + b) with constant A, B, a, b: two small matrix products where indexing would be a slow gather
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, device=x.device)
    left, right = x.new_zeros(d + 1, 1 + d + len(i)), x.new_zeros(d + 1, 1 + d + len(i))
    pairs = torch.arange(1 + d, left.shape[1], device=x.device)
    left[d, 0] = 1
    left[:d, 1 : 1 + d].fill_diagonal_(scale**-0.25)
    left[i, pairs] = scale**-0.5
    left[i[i == j], pairs[i == j]] = (2 * scale) ** -0.5
    right[d, : 1 + d] = 1
    right[j, pairs] = 1
    flat = x.reshape(-1, d)
    both = torch.addmm(left[d], flat, left[:d]) * torch.addmm(right[d], flat, right[:d])
    return both.view(*x.shape[:-1], left.shape[1])


class Based(RowMixer):
    """Linear attention of BASED. x [B, L, D] -> [B, L, D]; a constant state of H · F · (dv + 1) numbers.

    y_i = f(q_i)·sum_{j<=i} f(k_j) v_j / (f(q_i)·sum_{j<=i} f(k_j) + eps)

    Raises:
        ConfigError: d_model is not a multiple of num_heads and head_dim is not given.
    """

    Config = BasedConfig

    def __init__(self, d_model: int, config: BasedConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        if config.head_dim is None and d_model % config.num_heads:
            raise ConfigError(f"num_heads {config.num_heads} must divide d_model {d_model}, or head_dim be given")
        self.head_dim = config.head_dim or d_model // config.num_heads
        features = config.num_heads * config.feature_dim
        values = config.num_heads * self.head_dim
        self.scale = float(config.scale_dim or config.feature_dim)
        self.q_proj = nn.Linear(d_model, features, bias=False)
        self.k_proj = nn.Linear(d_model, features, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.out_proj = nn.Linear(values, d_model, bias=False)
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="heads")

    def mix(self, x: Tensor, count: Tensor | None, state: LinearState | None) -> tuple[Tensor, LinearState | None]:
        sums = None if state is None else state.sums
        y, sums = self.attend(x, count, sums)
        return y, (None if state is None else LinearState(sums))

    def attend(self, x: Tensor, count: Tensor | None, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows x [B, L, D] continued from *sums*: (y [B, L, D], sums after them)."""
        work = work_dtype(x)
        heads = self.config.num_heads
        q, k, v = (proj(x).unflatten(-1, (heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = q.to(work), k.to(work), row_mask(F.pad(v.to(work), (0, 1), value=1.0), count)
            sums = self.empty(x.shape[0], x.device, work) if sums is None else sums.to(work)
            if x.shape[1] == 1:
                sums = sums + taylor_features(k[:, 0], self.scale)[..., None] * v[:, 0, :, None]
                y = (taylor_features(q[:, 0], self.scale)[:, :, None] @ sums).transpose(1, 2)  # [B, 1, H, dv + 1]
            else:
                y, sums = taylor_mix(q, k, v, sums, self.scale, self.config.chunk)
            y = y[..., :-1] / (y[..., -1:] + self.config.eps)
        return self.out_proj(y.flatten(2).to(x.dtype)), sums

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)  # [B, H, L, d]

    def empty(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The state before any token, [B, H, F, dv + 1]."""
        d = self.config.feature_dim
        shape = (batch, self.config.num_heads, 1 + d + d * (d + 1) // 2, self.head_dim + 1)
        return torch.zeros(shape, device=device, dtype=dtype)

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LinearState:
        """The empty state: constant in max_len."""
        return LinearState(self.empty(batch, device, dtype if dtype == torch.float64 else torch.float32))

    def cost(self, length: int, batch: int = 1) -> Cost:
        d, heads = self.config.feature_dim, self.config.num_heads
        size = heads * (1 + d + d * (d + 1) // 2) * (self.head_dim + 1)
        weights = sum(p.numel() for p in self.parameters())
        chunk = 2 * self.config.chunk * heads * (d + self.head_dim + 1)
        return Cost(flops=float(batch * length * (2 * weights + chunk + 4 * size)), state_bytes=4 * batch * size)


class JRT(Based):
    """Prefix linear attention of JRT-RNN. In a `prefix` layout the prefix is read twice: all positions see all of it
    through keys and values of its own, and causally through the ordinary ones; in a `causal` layout it is BASED.

    The prefix's sums are simply what the state starts from, so decoding is BASED's. The prefix must be given whole in
    the first call; later calls are causal.
    """

    Config = JRTConfig

    def __init__(self, d_model: int, config: JRTConfig, layer_index: int = 0) -> None:
        super().__init__(d_model, config, layer_index)
        self.k_enc_proj = nn.Linear(d_model, self.k_proj.weight.shape[0], bias=False)
        self.v_enc_proj = nn.Linear(d_model, self.v_proj.weight.shape[0], bias=False)
        self.info = MixerInfo(layouts=frozenset({"causal", "prefix"}), step="constant", packing=True, split="heads")

    def forward(self, x: Tensor, layout: Layout, state: Any = None) -> tuple[Tensor, Any]:
        if layout.kind != "prefix":
            return super().forward(x, layout, state)
        if layout.segment is not None:
            raise ZooError("JRT cannot part packed documents that have a prefix; give each its own row of the batch")
        batch, length, _ = x.shape
        assert isinstance(self.config, JRTConfig)
        edge = self.config.enc_length if layout.prefix is None else layout.prefix
        inside = torch.arange(length, device=x.device) < torch.as_tensor(edge, device=x.device).reshape(-1, 1)
        inside = inside.expand(batch, length)
        if layout.valid is not None:
            inside = inside & layout.valid
        longest = length if isinstance(edge, Tensor) else min(length, int(edge))
        sums = self.encode(x[:, :longest], inside[:, :longest], None if state is None else state.sums)
        rows = None if layout.valid is None else Rows.of(layout, batch, length, x.device)
        y, sums = self.attend(x if rows is None else rows.gather(x), None if rows is None else rows.count, sums)
        y = y if rows is None else rows.scatter(y)
        return y, (None if state is None else LinearState(sums))

    def encode(self, x: Tensor, inside: Tensor, sums: Tensor | None) -> Tensor:
        """Add the prefix x [B, M, D], where *inside* [B, M], to *sums*."""
        work = work_dtype(x)
        k, v = (proj(x).unflatten(-1, (self.config.num_heads, -1)) for proj in (self.k_enc_proj, self.v_enc_proj))
        with torch.autocast(x.device.type, enabled=False):
            sums = self.empty(x.shape[0], x.device, work) if sums is None else sums.to(work)
            v = F.pad(v.to(work), (0, 1), value=1.0) * inside[:, :, None, None].to(work)
            return sums + taylor_sums(k.to(work), v, self.scale) if x.shape[1] else sums
