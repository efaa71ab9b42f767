"""From a Layout to a kernel: attention over whole sequences without building L x L masks where they can be avoided.

Tensors are token-major, [B, L, H, d]; queries may have more heads than keys and values (grouped queries). `attend`
chooses: SDPA's own causal and full paths; blocks for windows, prefixes and blocks of tokens; documents one by one for
padding and packing on CPU, where a document costs no more than its own length; FlexAttention on GPU; and a dense mask
for what is left. `attend_dense` is the plain form that every other one is tested against.

ALiBi's bias depends on j - i alone, so it is a vector per head. Reversing the queries makes its L x L matrix a view of
that vector with strides (1, 1): the kernel reads it, and nothing is ever materialised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.layout import Layout

T = TypeVar("T")
Slopes = tuple[float, ...]
_INF = float("inf")
_BIAS_UP_TO = 1024  # tokens of the longest document for which one bias matrix a forward pass is built
_MAX_BLOCKS = 256  # block-causal layouts of more blocks take one dense mask instead of one call a block


def shared(layout: Layout, key: Any, build: Callable[[], T], *depends: Any) -> T:
    """*build()*, computed once for all layers that get this layout; again when an object of *depends* is another."""
    if torch.compiler.is_compiling():
        return build()
    memo = layout.__dict__.setdefault("_memo", {})  # dies with the layout; no field, so equality ignores it
    if key in memo and len(memo[key][0]) == len(depends) and all(a is b for a, b in zip(memo[key][0], depends)):  # noqa: B905
        return memo[key][1]
    with torch.inference_mode(False), torch.no_grad():
        value = build()
    memo[key] = (depends, value)
    return value


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    """SDPA on [B, H, L, d]; k and v may have fewer heads, and v another width (padded: the fast kernel wants one)."""
    k, v = lift_heads(k, q.shape[1]), lift_heads(v, q.shape[1])
    width = v.shape[-1]
    if width < q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - width))
    elif width > q.shape[-1]:
        q, k = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, dropout_p=dropout)
    return y[..., :width] if y.shape[-1] != width else y


def lift_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each head of x [B, H, L, d] so that there are *heads* (grouped queries)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    slopes: Slopes | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over whole sequences. Outputs of padded positions are arbitrary but finite.

    Args:
        q: [B, L, H, d].
        k: [B, L, H_k, d], H_k dividing H.
        v: [B, L, H_v, d_v], H_v dividing H.
        layout: who sees whom.
        scale: of the logits.
        slopes: ALiBi slopes of the heads; the bias is -slope · |distance|.
        dropout: on the attention weights.

    Returns:
        [B, L, H, d_v].
    """
    batch, length = q.shape[:2]
    if layout.parent is not None:
        return attend_dense(q, k, v, layout, scale, slopes, dropout)
    if layout.valid is None and layout.segment is None:
        return _rows(q, k, v, layout, scale, slopes, dropout)
    simple = layout.kind in ("causal", "full", "window")
    if simple and q.device.type == "cpu" and not torch.compiler.is_compiling():
        return _documents(q, k, v, layout, scale, slopes, dropout)
    if q.is_cuda and not dropout and not torch.compiler.is_compiling() and batch * length >= 4096:
        return attend_flex(q, k, v, layout, scale, slopes)
    return attend_dense(q, k, v, layout, scale, slopes, dropout)


def attend_dense(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None = None, dropout: float = 0.0
) -> Tensor:
    """The same by one dense mask [B, 1, L, L] (or bias [B, H, L, L]), built once for all layers."""
    batch, length = q.shape[:2]

    def build() -> Tensor:
        seen = layout.dense(length, batch, q.device)
        # a row that sees nothing would be 0/0
        seen = (seen | torch.eye(length, dtype=torch.bool, device=q.device))[:, None]
        if slopes is None:
            return seen
        place = layout.with_(position=None).positions(batch, length, q.device)
        distance = (place[:, None, :, None] - place[:, None, None, :]).abs()
        bias = -distance * torch.tensor(slopes, device=q.device, dtype=torch.float32)[:, None, None]
        return bias.masked_fill(~seen, -_INF)

    mask = shared(layout, ("dense", slopes, batch, length, q.device), build)
    mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
    y = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, False, scale, dropout)
    return y.transpose(1, 2)


def attend_padding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    slopes: Slopes | None = None,
    dropout: float = 0.0,
    uniform: bool = True,
) -> Tensor:
    """`attend_dense`, but padded queries see the valid keys of their past.

    Where there is none they take the mean over all keys, which is what adding the lowest finite number does in
    transformers' eager attention, or (`uniform=False`) 0, as its SDPA does.
    """
    batch, length = q.shape[:2]
    assert layout.valid is not None
    seen = layout.with_(valid=None).dense(length, batch, q.device) & layout.valid[:, None, :]
    none = ~seen.any(-1)
    q = q.masked_fill(none[..., None, None], 0)
    seen = (seen | none[..., None])[:, None]
    if slopes is not None:
        place = torch.arange(length, device=q.device)
        bias = -(place[:, None] - place).abs() * torch.tensor(slopes, device=q.device)[:, None, None]
        seen = bias.masked_fill(none[:, None, :, None], 0).masked_fill(~seen, -_INF).to(q.dtype)
    y = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, False, scale, dropout).transpose(1, 2)
    return y if uniform else y.masked_fill(none[..., None, None], 0)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None, dropout: float
) -> Tensor:
    """Rows of equal length without padding or packing."""
    length = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, d]
    if layout.kind == "prefix" and isinstance(layout.prefix, int) and slopes is None:
        n = min(layout.prefix, length)
        first = sdpa(q[:, :, :n], k[:, :, :n], v[:, :, :n], None, False, scale, dropout)
        after = _relative(q[:, :, n:], k, v, (length, 0), None, scale, dropout, offset=n) if n < length else q[:, :, :0]
        y = torch.cat([first, after], dim=2) if n < length else first
    elif layout.kind == "block_causal" and slopes is None and (ends := _block_ends(layout, length)) is not None:
        parts, start = [], 0
        for end in ends:
            parts.append(sdpa(q[:, :, start:end], k[:, :, :end], v[:, :, :end], None, False, scale, dropout))
            start = end
        y = torch.cat(parts, dim=2)
    elif layout.kind in ("causal", "full"):
        reach = (length, 0) if layout.kind == "causal" else (length, length)
        if slopes is None:
            y = sdpa(q, k, v, None, layout.kind == "causal", scale, dropout)
        else:
            y = _relative(q, k, v, reach, slopes, scale, dropout)
    elif layout.kind == "window" and layout.window is not None and not (layout.sinks and slopes):
        y = _windowed(q, k, v, layout.window, layout.sinks, slopes, scale, dropout)
    else:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return attend_dense(q, k, v, layout, scale, slopes, dropout)
    return y.transpose(1, 2)


def _block_ends(layout: Layout, length: int) -> list[int] | None:
    """Ends of the runs of equal block index, where all rows share them and they are few."""
    block = layout.block
    if block is None or torch.compiler.is_compiling():
        return None
    if block.ndim > 1 and len(block) > 1:
        return None

    def build() -> list[int]:
        line = block.reshape(-1)
        return [*((line[1:] != line[:-1]).nonzero()[:, 0] + 1).tolist(), length]

    ends = shared(layout, ("block_ends", length), build, block)
    return ends if len(ends) <= _MAX_BLOCKS else None


# --- masks that depend on j - i alone


@lru_cache(maxsize=32)
def _line(reach: tuple[int, int], slopes: Slopes | None, before: int, after: int, device: torch.device) -> Tensor:
    """Bias [H or 1, before + after + 1] of a key at distance -before .. after from its query; -inf out of reach."""
    with torch.inference_mode(False), torch.no_grad():
        delta = torch.arange(-before, after + 1, device=device, dtype=torch.float32)
        line = torch.zeros(1, len(delta), device=device)
        if slopes is not None:
            line = -delta.abs() * torch.tensor(slopes, device=device, dtype=torch.float32)[:, None]
        return line.masked_fill((delta < -reach[0]) | (delta > reach[1]), -_INF)


def relative_mask(
    rows: int, keys: int, offset: int, reach: tuple[int, int], slopes: Slopes | None, like: Tensor
) -> Tensor:
    """Bias [1, H or 1, rows, keys] of queries offset .. offset + rows - 1 in *reversed* order over keys 0 .. keys - 1.

    A view of one vector per head: row r, key j reads element r + j.
    """
    before, after = offset + rows - 1, keys - 1 - offset
    # rounded up, so that batches of many lengths share few vectors
    wide_before, wide_after = (max(64, 1 << max(n, 1).bit_length()) for n in (before, after))
    line = _line.__wrapped__ if torch.compiler.is_compiling() else _line
    reach = (min(reach[0], wide_before), min(reach[1], wide_after))
    vector = line(reach, slopes, wide_before, wide_after, like.device).to(like.dtype)
    size = vector.shape[1]
    return vector.as_strided((1, len(vector), rows, keys), (0, size, 1, 1), wide_before - before)


def _relative(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: tuple[int, int],
    slopes: Slopes | None,
    scale: float,
    dropout: float,
    offset: int = 0,
) -> Tensor:
    """Queries offset, offset + 1, ... over keys 0, 1, ... within *reach* (left, right), with ALiBi where given."""
    mask = relative_mask(q.shape[2], k.shape[2], offset, reach, slopes, q)
    return sdpa(q.flip(2), k, v, mask, False, scale, dropout).flip(2)


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    sinks: int,
    slopes: Slopes | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """A sliding window in blocks of queries, each over only the keys it can reach: O(L (window + block)) time."""
    batch, _, length, _ = q.shape
    left, right = min(window[0], length), min(window[1], length)
    block = window_block(left + right)
    first = -(-(left + sinks) // block) * block  # from here on no block reaches below key `sinks`
    count = (length - right - first) // block
    if count < 1:
        return _edge(q, k, v, (left, right), sinks, slopes, scale, dropout)
    last = first + count * block
    span = left + block + right
    parts = [
        _edge(q[:, :, :first], k[:, :, : first + right], v[:, :, : first + right], (left, right), sinks, slopes, scale,
              dropout)
    ]  # fmt: skip
    if not first:
        parts = []
    low, high = first - left, last + right
    # [B, H, n, span, d] views of overlapping blocks, then blocks beside the batch
    kb, vb = (t[:, :, low:high].unfold(2, span, block).transpose(-1, -2) for t in (k, v))
    qb = q[:, :, first:last].unflatten(2, (count, block))
    if sinks:
        kb, vb = (
            torch.cat([t[:, :, None, :sinks].expand(-1, -1, count, -1, -1), b], dim=3)
            for t, b in ((k, kb), (v, vb))
        )  # fmt: skip
    qb, kb, vb = (t.transpose(1, 2).flatten(0, 1) for t in (qb, kb, vb))  # [B n, H, block or span, d]
    mask = _block_mask(block, span, left, right, sinks, slopes, q.device, q.dtype)
    y = sdpa(qb, kb, vb, mask, False, scale, dropout)
    parts.append(y.unflatten(0, (batch, count)).transpose(1, 2).flatten(2, 3))
    if last < length:
        start = last - left
        tail_q, tail_k, tail_v = q[:, :, last:], k[:, :, start:], v[:, :, start:]
        if sinks:
            tail_k, tail_v = (torch.cat([t[:, :, :sinks], b], dim=2) for t, b in ((k, tail_k), (v, tail_v)))
            rows, keys = length - last, length - start
            tail = _dense_reach(rows, keys, left, (left, right), None, q.device)
            tail = F.pad(tail, (sinks, 0)).to(q.dtype)
            parts.append(sdpa(tail_q, tail_k, tail_v, tail, False, scale, dropout))
        else:
            parts.append(_relative(tail_q, tail_k, tail_v, (left, right), slopes, scale, dropout, offset=left))
    return torch.cat(parts, dim=2)


def window_block(window: int) -> int:
    """Queries a block: large enough to feed the matrix units, small enough to waste few keys beside the window."""
    return max(64, min(256, 1 << (max(window, 1) // 2).bit_length()))


def _edge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    reach: tuple[int, int],
    sinks: int,
    slopes: Slopes | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Queries and keys that both start at token 0."""
    if not sinks:
        if slopes is None and reach[0] >= k.shape[2] and not reach[1] and q.shape[2] == k.shape[2]:
            return sdpa(q, k, v, None, True, scale, dropout)
        return _relative(q, k, v, reach, slopes, scale, dropout)
    mask = _dense_reach(q.shape[2], k.shape[2], 0, reach, None, q.device)
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)[None]
    return sdpa(q, k, v, mask.masked_fill((key < sinks) & (key <= row), 0).to(q.dtype), False, scale, dropout)


def _dense_reach(
    rows: int, keys: int, offset: int, reach: tuple[int, int], slopes: Slopes | None, device: torch.device
) -> Tensor:
    """[H or 1, rows, keys] float32 bias in the ordinary order of queries."""
    like = torch.empty(0, device=device)
    return relative_mask(rows, keys, offset, reach, slopes, like)[0].flip(1)


@lru_cache(maxsize=16)
def _kept_block_mask(
    block: int, span: int, left: int, right: int, sinks: int, slopes: Slopes | None, device: torch.device
) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        mask = _dense_reach(block, span, left, (left, right), slopes, device)
        return F.pad(mask, (sinks, 0)) if sinks else mask


def _block_mask(
    block: int,
    span: int,
    left: int,
    right: int,
    sinks: int,
    slopes: Slopes | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    build = _kept_block_mask.__wrapped__ if torch.compiler.is_compiling() else _kept_block_mask
    return build(block, span, left, right, sinks, slopes, device).to(dtype)


# --- padding and packing


def documents(layout: Layout, batch: int, length: int, device: torch.device) -> tuple[Tensor | None, list[int]]:
    """The valid tokens of every document, one document after the other.

    Returns:
        Their places [T] in the flattened batch (None where that is all of them in order), and the lengths of the
        documents, equal lengths side by side.
    """

    def build() -> tuple[Tensor | None, list[int]]:
        valid = layout.valid
        row = torch.arange(batch, device=device)[:, None].expand(batch, length)
        if layout.segment is None:
            document = row
        else:
            segment = layout.segment.expand(batch, length)
            low = segment.min()
            document = segment - low + row * (segment.max() - low + 1)
        document = document.reshape(-1)
        place = torch.arange(batch * length, device=device) if valid is None else valid.reshape(-1).nonzero()[:, 0]
        _, name, count = torch.unique(document[place], return_inverse=True, return_counts=True)
        size = count[name]  # of the document each token is in
        order = torch.argsort(size * len(count) + name, stable=True)  # by length, then by document
        place = place[order]
        lengths = torch.sort(count).values.tolist()
        identity = len(place) == batch * length and bool((place[1:] > place[:-1]).all())
        return (None if identity else place), lengths

    return shared(layout, ("documents", batch, length), build)


def _documents(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None, dropout: float
) -> Tensor:
    batch, length = q.shape[:2]
    place, lengths = documents(layout, batch, length, q.device)
    plain = Layout(layout.kind, window=layout.window, sinks=layout.sinks)
    bias = _bias_of_all(layout, slopes, lengths[-1] if lengths else 0, q)
    flat = [t.flatten(0, 1) if place is None else t.flatten(0, 1)[place] for t in (q, k, v)]  # [T, H, d]
    parts, start, i = [], 0, 0
    while i < len(lengths):
        size = lengths[i]
        n = lengths.count(size)
        end = start + n * size
        one = [t[start:end].unflatten(0, (n, size)) for t in flat]
        if bias is None:
            y = _rows(one[0], one[1], one[2], plain, scale, slopes, dropout)
        else:
            qd, kd, vd = (t.transpose(1, 2) for t in one)
            y = sdpa(qd, kd, vd, bias[:, :, :size, :size], False, scale, dropout).transpose(1, 2)
        parts.append(y.reshape(n * size, *q.shape[2:3], -1))
        start, i = end, i + n
    y = torch.cat(parts) if len(parts) != 1 else parts[0]
    if place is not None:
        y = y.new_zeros(batch * length, *y.shape[1:]).index_copy(0, place, y)
    return y.unflatten(0, (batch, length))


def _bias_of_all(layout: Layout, slopes: Slopes | None, longest: int, like: Tensor) -> Tensor | None:
    """ALiBi's bias [1, H, longest, longest], whose corner serves every shorter document: once for all layers.

    None where a document is so long that the view of a vector, which costs two reversals a call, is the cheaper.
    """
    if slopes is None or longest > _BIAS_UP_TO or layout.kind not in ("causal", "full"):
        return None
    reach = (longest, 0) if layout.kind == "causal" else (longest, longest)
    return shared(
        layout,
        ("bias", slopes, longest, like.dtype, like.device),
        lambda: _dense_reach(longest, longest, 0, reach, slopes, like.device)[None].to(like.dtype),
    )


# --- FlexAttention


def mask_mod(layout: Layout, batch: int, length: int, device: torch.device) -> Callable[..., Tensor]:
    """The layout as FlexAttention's predicate (b, h, query, key) -> bool. Draft trees have none."""
    block = layout.block.expand(batch, length) if layout.block is not None else None
    segment = layout.segment.expand(batch, length) if layout.segment is not None else None
    prefix = torch.as_tensor(layout.prefix if layout.prefix is not None else 0, device=device).expand(batch)
    left, right = layout.window or (0, 0)
    rank = layout.ranks(batch, length, device) if layout.kind == "window" else None

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if layout.kind == "causal":
            yes = k <= q
        elif layout.kind == "prefix":
            yes = (k <= q) | (k < prefix[b])
        elif layout.kind == "block_causal":
            assert block is not None
            yes = block[b, k] <= block[b, q]
        elif layout.kind == "window":
            assert rank is not None
            step = rank[b, k] - rank[b, q]
            yes = ((step >= -left) & (step <= right)) | ((rank[b, k] < layout.sinks) & (k <= q))
        else:
            yes = k >= 0
        if segment is not None:
            yes = yes & (segment[b, k] == segment[b, q])
        if layout.valid is not None:
            yes = yes & layout.valid[b, k]
        return yes

    return seen


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None = None) -> Tensor:
    """The same by FlexAttention, which skips blocks that the mask leaves empty; on CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, length, heads, _ = q.shape
    block_mask = shared(
        layout,
        ("flex", batch, length, q.device),
        lambda: create_block_mask(
            mask_mod(layout, batch, length, q.device), batch, None, length, length, device=str(q.device)
        ),
    )
    score_mod = None
    if slopes is not None:
        slope = torch.tensor(slopes, device=q.device)
        place = shared(
            layout,
            ("place", batch, length, q.device),
            lambda: layout.with_(position=None).positions(batch, length, q.device).expand(batch, length).contiguous(),
        )

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score - slope[h] * (place[b, i] - place[b, j]).abs()

    run = _compiled_flex() if q.is_cuda else flex_attention
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = lift_heads(k, heads), lift_heads(v, heads)
    y = run(q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale)
    return y.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
