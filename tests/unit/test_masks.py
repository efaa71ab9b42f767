"""Every fast way to serve a layout equals the dense mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.nn.flex import attend_flex
from zoo.nn.kernels import shared
from zoo.nn.layout import Layout
from zoo.nn.masks import attend, attend_dense, documents
from zoo.nn.positions import alibi_slopes
from zoo.nn.relative import relative_mask

B, L, H, D = 2, 150, 4, 8
LAYOUTS: dict[str, dict[str, Any]] = {
    "causal": {"kind": "causal"},
    "full": {"kind": "full"},
    "prefix": {"kind": "prefix", "prefix": 11},
    "prefix-none": {"kind": "prefix", "prefix": 0},
    "prefix-all": {"kind": "prefix", "prefix": L + 5},
    "prefix-rows": {"kind": "prefix", "prefix": torch.tensor([3, 40])},
    "blocks": {"kind": "block_causal", "block": torch.arange(L) // 7},
    "blocks-rows": {"kind": "block_causal", "block": torch.stack([torch.arange(L) // 7, torch.arange(L) // 5])},
    "window": {"kind": "window", "window": (5, 0)},
    "window-both": {"kind": "window", "window": (9, 4)},
    "window-ahead": {"kind": "window", "window": (0, 3)},
    "window-wide": {"kind": "window", "window": (200, 0)},
    "window-sinks": {"kind": "window", "window": (12, 0), "sinks": 3},
    "window-sinks-both": {"kind": "window", "window": (6, 5), "sinks": 2},
}


def packing(name: str) -> dict[str, Tensor]:
    valid = torch.ones(B, L, dtype=torch.bool)
    segment = torch.zeros(B, L, dtype=torch.long)
    if name == "right":
        valid[0, 90:] = False
    elif name == "left":
        valid[0, :33] = False
        valid[1, :1] = False
    elif name == "holes":
        valid[0, 20:30] = False
    elif name == "packed":
        segment[0, 40:] = 1
        segment[0, 120:] = 4
        segment[1, 75:] = 2
    elif name == "packed-right":
        segment[:, 60:] = 1
        valid[1, 110:] = False
    return {"valid": valid, "segment": segment} if "packed" in name else {"valid": valid}


def tensors(kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(B, L, H, D, dtype=dtype),
        torch.randn(B, L, kv_heads, D, dtype=dtype),
        torch.randn(B, L, 1, 6, dtype=dtype),
    )


def naive(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, slopes: tuple[float, ...] | None, place: Tensor) -> Tensor:
    """Softmax attention written out; seen [B, L, L]."""
    k, v = (t.repeat_interleave(H // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(D)
    if slopes is not None:
        distance = (place[:, :, None] - place[:, None, :]).abs()
        scores = scores - torch.tensor(slopes, dtype=q.dtype)[:, None, None] * distance[:, None]
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(H)], ids=["plain", "alibi"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_equal_attention_written_out(name: str, slopes: tuple[float, ...] | None) -> None:
    layout = Layout(**LAYOUTS[name])
    q, k, v = (t.requires_grad_() for t in tensors())
    place = torch.arange(L).expand(B, L)
    want = naive(q, k, v, layout.dense(L, B).expand(B, L, L), slopes, place)
    got = attend(q, k, v, layout, D**-0.5, slopes)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(want)
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("slopes", [None, alibi_slopes(H)], ids=["plain", "alibi"])
@pytest.mark.parametrize("pad", ["right", "left", "holes", "packed", "packed-right"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_and_packing_equal_attention_written_out(name: str, pad: str, slopes: tuple[float, ...] | None) -> None:
    fields = packing(pad)
    layout = Layout(**LAYOUTS[name], **fields)
    q, k, v = tensors()
    place = (
        (layout.valid.long().cumsum(1) - 1).clamp_min(0) if layout.valid is not None else torch.arange(L).expand(B, L)
    )
    want = naive(q, k, v, layout.dense(L, B), slopes, place)
    got = attend(q, k, v, layout, D**-0.5, slopes)
    real = fields["valid"]
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[real], want[real], rtol=1e-9, atol=1e-9)
    dense = attend_dense(q, k, v, layout, D**-0.5, slopes)
    torch.testing.assert_close(dense[real], want[real], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("slopes", [None, alibi_slopes(H)], ids=["plain", "alibi"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_attention_serves_the_same_layouts(name: str, slopes: tuple[float, ...] | None) -> None:
    layout = Layout(**LAYOUTS[name], **packing("packed-right"))
    q, k, _ = tensors(dtype=torch.float32)
    v = torch.randn(B, L, 2, D)
    real = packing("packed-right")["valid"]
    got = attend_flex(q, k, v, layout, D**-0.5, slopes)
    want = attend_dense(q, k, v, layout, D**-0.5, slopes)
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)


def test_relative_masks_take_no_memory() -> None:
    mask = relative_mask(5000, 5000, 0, (5000, 5000), alibi_slopes(12), torch.empty(0))
    assert mask.shape == (1, 12, 5000, 5000)
    assert mask.untyped_storage().nbytes() < 12 * 4 * 17000
    small = relative_mask(4, 6, 2, (2, 1), (0.5,), torch.empty(0))[0, 0].flip(0)
    inf = math.inf
    assert small.tolist() == [
        [-1.0, -0.5, 0.0, -0.5, -inf, -inf],
        [-inf, -1.0, -0.5, 0.0, -0.5, -inf],
        [-inf, -inf, -1.0, -0.5, 0.0, -0.5],
        [-inf, -inf, -inf, -1.0, -0.5, 0.0],
    ]


def test_documents_of_equal_length_stand_side_by_side() -> None:
    valid = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool)
    place, lengths = documents(Layout("full", valid=valid), 3, 4, torch.device("cpu"))
    assert lengths == [2, 3, 3]
    assert place is not None
    assert place.tolist() == [5, 6, 0, 1, 2, 8, 9, 10]
    whole = Layout("full", segment=torch.tensor([[0, 0, 1, 1, 1]]))
    assert documents(whole, 1, 5, torch.device("cpu")) == (None, [2, 3])


def test_work_is_shared_between_layers_but_not_between_layouts() -> None:
    layout, calls = Layout("causal", valid=torch.ones(1, 3, dtype=torch.bool)), []
    start = torch.tensor([1])
    for depends in (start, start, torch.tensor([1])):
        shared(layout, "key", lambda: calls.append(1), depends)
    assert len(calls) == 2
    shared(layout.with_(kind="full"), "key", lambda: calls.append(1), start)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["causal", "full", "window", "window-sinks", "prefix", "blocks"])
def test_the_path_without_padding_compiles_as_one_graph(name: str) -> None:
    layout = Layout(**LAYOUTS[name])
    slopes = alibi_slopes(H) if name in ("causal", "full") else None
    q, k, v = tensors(dtype=torch.float32)
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, layout, D**-0.5, slopes), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, layout, D**-0.5, slopes), rtol=1e-4, atol=1e-5)
