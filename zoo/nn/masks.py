"""From a Layout to a kernel: attention over whole sequences without building L x L masks where they can be avoided.

Tensors are token-major, [B, L, H, d]; queries may have more heads than keys and values (grouped queries). `attend`
chooses: SDPA's own causal and full paths; blocks for windows, prefixes and blocks of tokens; documents one by one for
padding and packing on CPU, where a document costs no more than its own length; FlexAttention on GPU; and a dense mask
for what is left. `attend_dense` is the plain form that every other one is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.nn.flex import attend_flex
from zoo.nn.kernels import Slopes, sdpa, shared
from zoo.nn.layout import Layout
from zoo.nn.positions import slope_vector
from zoo.nn.relative import attend_relative, attend_window, reach_mask

_INF = float("inf")
_BIAS_UP_TO = 1024  # tokens of the longest document for which one bias matrix a forward pass is built
_MAX_BLOCKS = 256  # block-causal layouts of more blocks take one dense mask instead of one call a block


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
        bias = -distance * slope_vector(slopes, q.device)[:, None, None]
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
        bias = -(place[:, None] - place).abs() * slope_vector(slopes, q.device)[:, None, None]
        seen = bias.masked_fill(none[:, None, :, None], 0).masked_fill(~seen, -_INF).to(q.dtype)
    y = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen, False, scale, dropout).transpose(1, 2)
    return y if uniform else y.masked_fill(none[..., None, None], 0)


def _rows(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, slopes: Slopes | None, dropout: float
) -> Tensor:
    """Rows of equal length without padding or packing."""
    length = q.shape[1]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, d]
    if layout.kind == "prefix" and isinstance(layout.prefix, int) and layout.prefix > 0 and slopes is None:
        n = min(layout.prefix, length)
        y = sdpa(q[:, :, :n], k[:, :, :n], v[:, :, :n], None, False, scale, dropout)
        if n < length:
            after = attend_relative(q[:, :, n:], k, v, (length, 0), None, scale, dropout, offset=n)
            y = torch.cat([y, after], dim=2)
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
            y = attend_relative(q, k, v, reach, slopes, scale, dropout)
    elif layout.kind == "window" and layout.window is not None and not (layout.sinks and slopes):
        y = attend_window(q, k, v, layout.window, layout.sinks, slopes, scale, dropout)
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
        lambda: reach_mask(longest, longest, 0, reach, slopes, like.device)[None].to(like.dtype),
    )
