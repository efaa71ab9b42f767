"""PoNet: token mixing by pooling over the whole sequence, a segment and a window (arXiv:2110.02442)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.layout import Layout
from zoo.nn.mixer import Cost, MixerInfo
from zoo.nn.rows import RowMixer, Rows
from zoo.nn.ssm import work_dtype


@config
class PoNetConfig:
    """PoNet's pooling layer.

    Attributes:
        num_heads: heads of the global pooling.
        segments: the sequence is cut into blocks of floor(n / segments) + 1 tokens, unless the layout names blocks.
        isolate: where the layout names blocks, those of even index hold one separator (CLS, EOS) each, which takes
            no part in segment and local pooling (official `clsgsepg`; see `separator_blocks`).
        window: tokens of the local pooling, odd.
    """

    num_heads: int = 8
    segments: int = 32
    isolate: bool = True
    window: int = 3


def separator_blocks(ids: Tensor, separators: tuple[int, ...]) -> Tensor:
    """Block index [B, L] of each token of ids [B, L]: separators have blocks of their own, and even indices.

    index_t = 2 · (separators before t) - 1, or one more if t is one itself; -1 before the first.
    """
    is_one = torch.isin(ids, torch.tensor(separators, device=ids.device)).long()
    return 2 * (is_one.cumsum(1) - is_one) + is_one - 1


class PoNet(RowMixer):
    """y = (g + s) · o + l (§3). x [B, L, D] -> [B, L, D], bidirectional, O(L D).

    g pools the whole sequence: softmax over (mean query)·k / sqrt(dh), with the keys as values too; s is the maximum
    of a segment, l that of a window; o gates. Padding takes part in no mean and no maximum.

    Raises:
        ConfigError: num_heads does not divide d_model, or the window is even.
    """

    Config = PoNetConfig

    def __init__(self, d_model: int, config: PoNetConfig, layer_index: int = 0) -> None:
        super().__init__()
        if d_model % config.num_heads or config.window % 2 == 0:
            raise ConfigError(
                f"ponet needs num_heads that divide d_model {d_model} and an odd window, "
                f"got {config.num_heads} and {config.window}"
            )
        self.config = config
        self.d_model = d_model
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)
        self.segment_proj = nn.Linear(d_model, d_model)
        self.local_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.info = MixerInfo(layouts=frozenset({"full"}), step="none", packing=True, split="gather")

    def forward(self, x: Tensor, layout: Layout, state: Any = None) -> tuple[Tensor, None]:
        """Mix x [B, L, D]; `layout.block` [L] or [B, L] names the segments, where given."""
        if layout.block is None:
            return super().forward(x, layout)
        block = layout.block.expand(x.shape[:2])
        block = block - block.min(1, keepdim=True).values.clamp_max(0) // 2 * 2  # not below 0; odd stays odd
        if layout.valid is None and layout.segment is None:
            return self.out_proj(self.pool(x, None, block)), None
        rows = Rows.of(layout, x.shape[0], x.shape[1], x.device)
        return rows.scatter(self.out_proj(self.pool(rows.gather(x), rows.count, rows.gather(block)))), None

    def mix(self, x: Tensor, count: Tensor | None, state: Any) -> tuple[Tensor, None]:
        return self.out_proj(self.pool(x, count, None)), None

    def pool(self, x: Tensor, count: Tensor | None, block: Tensor | None) -> Tensor:
        """The three poolings of rows x [B, L, D], before the output projection."""
        work, length = work_dtype(x), x.shape[1]
        heads = self.config.num_heads
        projections = (self.q_proj, self.k_proj, self.o_proj, self.segment_proj, self.local_proj)
        q, k, o, segment, local = (proj(x) for proj in projections)
        with torch.autocast(x.device.type, enabled=False):
            q, k = (t.to(work).unflatten(-1, (heads, -1)) for t in (q, k))  # [B, L, H, dh]
            o, segment, local = o.to(work), segment.to(work), local.to(work)
            least = torch.finfo(work).min
            pad = None
            if count is not None:
                pad = (torch.arange(length, device=x.device) >= count[:, None])[..., None]
                segment, local = segment.masked_fill(pad, least), local.masked_fill(pad, least)
            whole = self._global(q, k, pad, count).flatten(-2)[:, None]  # [B, 1, D]
            single = None if block is None or not self.config.isolate else (block % 2 == 0)[..., None]
            if single is not None:
                local = local.masked_fill(single, least)
            half = self.config.window // 2
            local = F.max_pool1d(local.transpose(1, 2), self.config.window, stride=1, padding=half).transpose(1, 2)
            segment = self._segment_max(segment, count, block)
            if single is not None:
                local, segment = local.masked_fill(single, 0), segment.masked_fill(single, 0)
            y = (whole + segment) * o + local
            y = y if pad is None else y.masked_fill(pad, 0)
        return y.to(x.dtype)

    def _global(self, q: Tensor, k: Tensor, pad: Tensor | None, count: Tensor | None) -> Tensor:
        if pad is None or count is None:
            mean = q.mean(1)
        else:
            mean = q.masked_fill(pad[..., None], 0).sum(1) / count.clamp_min(1)[:, None, None].to(q.dtype)
        scores = torch.einsum("bhd,blhd->blh", mean, k) * q.shape[-1] ** -0.5
        if pad is not None:
            scores = scores.masked_fill(pad, torch.finfo(scores.dtype).min)
        return torch.einsum("blh,blhd->bhd", scores.softmax(1), k)

    def _segment_max(self, v: Tensor, count: Tensor | None, block: Tensor | None) -> Tensor:
        batch, length, width = v.shape
        if block is None and count is None:
            size = length // self.config.segments + 1
            padded = F.pad(v, (0, 0, 0, -length % size), value=torch.finfo(v.dtype).min)
            top = padded.view(batch, -1, size, width).amax(2, keepdim=True)
            return top.expand(-1, -1, size, -1).reshape(batch, -1, width)[:, :length]
        if block is None:
            assert count is not None
            sizes = count // self.config.segments + 1
            block = torch.arange(length, device=v.device) // sizes[:, None]
        index = block[..., None].expand_as(v)
        many = int(block.max()) + 1
        least = v.new_full((batch, many, width), torch.finfo(v.dtype).min)
        return least.scatter_reduce(1, index, v, "amax").gather(1, index)

    def cost(self, length: int, batch: int = 1) -> Cost:
        weights = sum(p.numel() for p in self.parameters())
        return Cost(flops=float(2 * batch * length * (weights + 6 * self.d_model)), state_bytes=0)
