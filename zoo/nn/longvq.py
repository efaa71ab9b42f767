"""LongVQ: a state space, and attention to a vector-quantized memory of the past (arXiv:2404.11163).

The authors published no code. This is a reconstruction from the paper's description: a gated union of a diagonal
state space and attention whose keys are codebook vectors, so that everything before a local window is held as one
mean value and one count for each code, while near tokens are seen one by one with a learned bias of their distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.code_attention import code_attention
from zoo.nn.longconv import long_conv
from zoo.nn.memory import join, rest
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.rows import RowMixer
from zoo.nn.ssm import DiagonalSSM, SSMState, work_dtype
from zoo.nn.state import State

_SPAN = 16  # blocks mixed at once; of longer sequences the attention weights are recomputed in the backward pass


@config
class LongVQConfig:
    """LongVQ layer.

    Attributes:
        num_heads: of the attention.
        key_dim: width of a head's queries and keys.
        codes: codebook size of each head.
        block: local window: a token sees its own block and the one before token by token.
        d_state: real state size of the state space.
        commitment: weight of mean((k - sg(code))²), added to whatever loss the output is trained with.
        lr: learning rate of the state space's dt and A, which never decay; None follows the optimiser's.
    """

    num_heads: int = 4
    key_dim: int = 32
    codes: int = 64
    block: int = 64
    d_state: int = 32
    commitment: float = 0.01
    lr: float | None = 1e-3


@dataclass
class LongVQState(State):
    """State of a LongVQ layer.

    Attributes:
        ssm: state of the state space.
        sums: [B, H, S, dv + 1] values and counts of each code, over all blocks before `last`.
        last: [B, block, H dk + D] keys and values of the last complete block.
        held: [B, block - 1, H dk + D] those of the block that is not complete yet.
        seen: [B] tokens consumed.
    """

    ssm: SSMState
    sums: Tensor
    last: Tensor
    held: Tensor
    seen: Tensor


class _Attach(torch.autograd.Function):
    """y unchanged, with a scalar loss that rides along: its gradient is 1 whatever y's is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, g.new_ones(())


class LongVQ(RowMixer):
    """x [B, L, D] -> [B, L, D], causal, constant state.

    m = SiLU(SSM(x)); z = W_z m; q, k = two affine maps of z per channel; v = SiLU(W_v x); a = attention of q to the
    nearest codes of k; y = W_o(σ(W_r m) · a).

    Raises:
        ConfigError: num_heads does not divide d_model.
    """

    Config = LongVQConfig

    def __init__(self, d_model: int, config: LongVQConfig, layer_index: int = 0) -> None:
        super().__init__()
        if d_model % config.num_heads:
            raise ConfigError(f"longvq needs num_heads that divide d_model {d_model}, got {config.num_heads}")
        self.config = config
        self.d_model = d_model
        keys = config.num_heads * config.key_dim
        self.keys = keys
        self.system = DiagonalSSM(d_model, config.d_state // 2)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.z_proj = nn.Linear(d_model, keys)
        self.scale = nn.Parameter(torch.ones(2, keys) + 0.02 * torch.randn(2, keys))
        self.shift = nn.Parameter(torch.zeros(2, keys))
        self.v_proj = nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model)
        self.codebook = nn.Parameter(torch.randn(config.num_heads, config.codes, config.key_dim) * 0.5)
        self.distance = nn.Parameter(torch.zeros(config.num_heads, 2 * config.block))
        self.out_proj = nn.Linear(d_model, d_model)
        self.info = MixerInfo(layouts=frozenset({"causal"}), step="constant", packing=True, split="heads")

    def mix(self, x: Tensor, count: Tensor | None, state: LongVQState | None) -> tuple[Tensor, LongVQState | None]:
        cfg, work = self.config, work_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            u = x.to(work).transpose(1, 2)
            if state is None:
                m, ssm = long_conv(u, self.system.kernel(u.shape[-1], work)[0]), None
            else:
                m, ssm = self.system.advance(u, state.ssm, count)
                m = m[:, 0]
            m = F.silu(m + self.skip.to(work)[:, None] * u).transpose(1, 2).to(x.dtype)
        z = self.z_proj(m)
        q, k = (z * scale + shift for scale, shift in zip(self.scale, self.shift, strict=True))
        keyed = torch.cat([k, F.silu(self.v_proj(x)).to(k.dtype)], dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            old = self._begin(x.shape[0], x.device, work) if state is None else state
            if state is None:
                total = old.seen + x.shape[1] if count is None else count
                rows = keyed.to(work)
                y, sums, last, loss = self._blocks(q.to(work), rows, total, old)
                y = y[:, : x.shape[1]].to(x.dtype)
            else:
                rows, total, place = join(keyed.to(work), count, old.held, old.seen % cfg.block)
                queries = torch.zeros_like(rows[..., : self.keys])
                index = place.clamp_max(rows.shape[1] - 1)[..., None].expand(-1, -1, self.keys)
                queries = queries.scatter(1, index, q.to(work))
                y, sums, last, loss = self._blocks(queries, rows, total, old)
                y = y.gather(1, place[..., None].expand(-1, -1, self.d_model)).to(x.dtype)
        y = self.out_proj(y * self.gate(m).sigmoid())
        if self.training and torch.is_grad_enabled() and cfg.commitment:
            y = _Attach.apply(y, cfg.commitment * loss)
        if ssm is None:
            return y, None
        seen = old.seen + (x.shape[1] if count is None else count)
        return y, LongVQState(ssm, sums, last, rest(rows, total, cfg.block), seen)

    def _blocks(
        self, q: Tensor, rows: Tensor, total: Tensor, old: LongVQState
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size, length = self.config.block, rows.shape[1]
        blocks = -(-length // size)
        q, rows = (F.pad(t, (0, 0, 0, blocks * size - length)).unflatten(1, (-1, size)) for t in (q, rows))
        sums, last, before = old.sums, old.last, old.seen // size
        parts, loss = [], q.new_zeros(())
        for start in range(0, blocks, _SPAN):
            here = slice(start, min(start + _SPAN, blocks))
            left = total - start * size  # tokens of each row from here on
            inputs = (q[:, here], rows[:, here], last, sums, left, before + start)
            if blocks > _SPAN and torch.is_grad_enabled():
                y, last, sums, miss = checkpoint(self._span, *inputs, use_reentrant=False)
            else:
                y, last, sums, miss = self._span(*inputs)
            loss = loss + miss
            parts.append(y)
        loss = loss / (total.sum().clamp_min(1) * self.keys)
        return torch.cat(parts, 1), sums, last, loss

    def _span(
        self, q: Tensor, rows: Tensor, last: Tensor, sums: Tensor, left: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Blocks of queries, each on its own and the block before's keys and, by code, on all earlier ones.

        Args:
            q, rows: [B, n, T, .] queries; keys and values.
            last, sums: of the blocks before the first of these.
            left: [B] how many of these tokens are real.
            before: [B] complete blocks before these.

        Returns:
            y [B, n·T, D], last, sums, and the summed squared distance of real keys to their codes.
        """
        cfg, size = self.config, self.config.block
        n, device = q.shape[1], q.device
        split = lambda t: t.unflatten(-1, (cfg.num_heads, -1)).transpose(1, 2)  # [B, H, ., d]
        line = torch.cat([last, rows.flatten(1, 2)], 1)  # the block before, then these: [B, (n + 1) T, .]
        q, k, v = (
            split(q.flatten(1, 2)).unflatten(2, (n, size)),
            split(line[..., : self.keys]),
            split(line[..., self.keys :]),
        )
        book = self.codebook.to(q.dtype)
        code = self.nearest(k)
        hot = torch.zeros(*code.shape, cfg.codes, dtype=q.dtype, device=device).scatter_(-1, code[..., None], 1.0)
        chosen = hot @ book
        straight = chosen + (k - k.detach())  # the code's value, and k's gradient
        # the block before becomes part of the sums when this one is complete
        before_first = before == 0
        hot = hot[:, :, : n * size].unflatten(2, (n, size))
        added = hot.transpose(-1, -2) @ F.pad(v[:, :, : n * size], (0, 1), value=1.0).unflatten(2, (n, size))
        block = torch.arange(n, device=device)
        whole = (block + 1) * size <= left[:, None]
        counts = whole & ((block > 0) | ~before_first[:, None])  # [B, n]: it is complete and follows another
        added = added * counts[:, None, :, None, None]  # [B, H, n, S, dv + 1]
        past = sums[:, :, None] + added.cumsum(2) - added
        amount = past[..., -1].detach()
        counted = amount.clamp_min(1).log().masked_fill(amount == 0, -torch.inf)
        mean = past[..., :-1] / amount.clamp_min(1)[..., None]
        y = code_attention(q, straight, v, book, mean, counted, self.distance.to(q.dtype), before_first)
        done = whole.sum(1)
        ended = rows.gather(1, (done - 1).clamp_min(0)[:, None, None, None].expand(-1, 1, *rows.shape[2:]))[:, 0]
        last = torch.where((done > 0)[:, None, None], ended, last)
        real = torch.arange(n * size, device=device).view(n, size) < left[:, None, None]
        missed = (k - chosen.detach())[:, :, size:].square().sum(-1).unflatten(2, (n, size))
        miss = (missed * real[:, None]).sum()
        return y.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2), last, sums + added.sum(2), miss

    def nearest(self, k: Tensor) -> Tensor:
        """Index of the nearest code of keys [B, H, L, dk] -> [B, H, L]."""
        with torch.no_grad():
            book = self.codebook.to(k.dtype)
            return (book.square().sum(-1)[:, None] - 2 * (k @ book.transpose(1, 2))).argmin(-1)

    def _begin(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> LongVQState:
        cfg = self.config
        zeros = lambda *shape: torch.zeros(batch, *shape, device=device, dtype=dtype)
        kept = self.keys + self.d_model
        return LongVQState(
            ssm=self.system.init_state(batch, device, dtype),
            sums=zeros(cfg.num_heads, cfg.codes, self.d_model // cfg.num_heads + 1),
            last=zeros(cfg.block, kept),
            held=zeros(cfg.block - 1, kept),
            seen=torch.zeros(batch, dtype=torch.long, device=device),
        )

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LongVQState:
        """The empty state: constant in max_len."""
        return self._begin(batch, device, dtype if dtype == torch.float64 else torch.float32)

    def cost(self, length: int, batch: int = 1) -> Cost:
        cfg, kept = self.config, self.keys + self.d_model
        state = self.d_model * 2 * (cfg.d_state // 2) + (2 * cfg.block - 1) * kept
        state += cfg.codes * (self.d_model + cfg.num_heads)
        per_token = 4 * self.d_model * (self.d_model + self.keys) + 2 * (2 * cfg.block + cfg.codes) * kept
        return Cost(flops=float(batch * length * 2 * per_token), state_bytes=batch * (4 * state + 8))

    def param_groups(self) -> list[ParamGroup]:
        """dt and A: no decay, own rate; codebook, skip and biases of distance: no decay."""
        own: ParamGroup = {"params": self.system.own_parameters(), "weight_decay": 0.0}
        if self.config.lr is not None:
            own["lr"] = self.config.lr
        return [own, {"params": [self.skip, self.codebook, self.distance, self.scale, self.shift], "weight_decay": 0.0}]
