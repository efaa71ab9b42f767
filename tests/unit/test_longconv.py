"""The long convolution: equal to its definition in every layout, with right gradients, wherever it is called from."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import ZooError
from zoo.nn import longconv, spectra
from zoo.nn.longconv import long_conv, long_conv_naive, two_sided


@pytest.fixture(params=["kept", "kept, padded", "short", "padded", "split", "split, kept", "sliced", "sliced, kept"])
def transforms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way through at any length, with blocks so small that several tasks and sample groups arise."""
    monkeypatch.setattr(
        spectra, "SPLIT_FROM", 1 if request.param.startswith("s") and request.param != "short" else 1 << 40
    )
    monkeypatch.setattr(longconv, "BLOCK", 128)
    monkeypatch.setattr(longconv, "KEPT", 1 << 40 if request.param.startswith("kept") else 0)
    monkeypatch.setattr(longconv, "KEPT_SPLIT", 1 << 40 if request.param.endswith(", kept") else 0)
    if "sliced" in request.param:
        monkeypatch.setattr(spectra, "SLICE", 4)
    if "padded" in request.param:  # the transforms of other devices
        monkeypatch.setattr(longconv, "spectra_for", lambda length, dtype, cpu: spectra.Plain(length, dtype))
    spectra.spectra_for.cache_clear()
    yield request.param
    spectra.spectra_for.cache_clear()


def inputs(
    batch: int, width: int, length: int, *, bidirectional: bool, per_sample: bool, last: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    u = torch.randn(batch, width, length, dtype=dtype)
    if last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    lead = (batch, width) if per_sample else (width,)
    k = torch.randn(*lead, 2 * length - 1 if bidirectional else length, dtype=dtype)
    return tuple(x.requires_grad_() for x in (u, k, torch.randn(width, dtype=dtype)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 61])
def test_equals_the_definition(transforms: str, length: int, last: bool, per_sample: bool, bidirectional: bool) -> None:
    u, k, skip = inputs(
        3, 5, length, bidirectional=bidirectional, per_sample=per_sample, last=last, dtype=torch.float64
    )
    y = long_conv(u, k, skip, bidirectional=bidirectional)
    expected = long_conv_naive(u, k, skip, bidirectional=bidirectional)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * length)
    assert y.stride() == u.stride() or length == 1
    g = torch.randn_like(y)
    for ours, right in zip(
        torch.autograd.grad(y, (u, k, skip), g), torch.autograd.grad(expected, (u, k, skip), g), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-11 * length)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(transforms: str, per_sample: bool, bidirectional: bool) -> None:
    args = inputs(2, 3, 6, bidirectional=bidirectional, per_sample=per_sample, last=False, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: long_conv(*a, bidirectional=bidirectional), args)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_asked_for_alone(transforms: str, wanted: tuple[int, ...]) -> None:
    args = inputs(2, 3, 9, bidirectional=False, per_sample=False, last=False, dtype=torch.float64)
    every = torch.autograd.grad(long_conv(*args).square().sum(), args)
    some = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(args)]
    long_conv(*some).square().sum().backward()
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in wanted)
        if x.grad is not None:
            torch.testing.assert_close(x.grad, every[i])


@pytest.mark.parametrize("length", [8191, 8192, 9000, 20000])
def test_long_float32_agrees_with_padded_rfft(length: int) -> None:
    u, k, skip = inputs(1, 3, length, bidirectional=False, per_sample=False, last=True, dtype=torch.float32)
    n = 2 * length
    reference = [x.detach().double().requires_grad_() for x in (u, k, skip)]
    ud, kd, sd = reference
    expected = torch.fft.irfft(torch.fft.rfft(ud, n=n) * torch.fft.rfft(kd, n=n), n=n)[..., :length] + sd[:, None] * ud
    y, g = long_conv(u, k, skip), torch.randn(u.shape)
    assert (y - expected).abs().max() <= 2e-6 * expected.abs().max()
    for ours, right in zip(
        torch.autograd.grad(y, (u, k, skip), g), torch.autograd.grad(expected, reference, g.double()), strict=True
    ):
        assert (ours - right).abs().max() <= 3e-6 * right.abs().max()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [9000, 16384])
def test_slices_of_frequencies_change_only_rounding(
    length: int, bidirectional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longconv, "KEPT_SPLIT", 0)
    args = inputs(2, 3, length, bidirectional=bidirectional, per_sample=False, last=False, dtype=torch.float32)
    halves = [x.detach().bfloat16().requires_grad_() for x in args]
    results = []
    for points in (1 << 40, 1 << 11):
        monkeypatch.setattr(spectra, "SLICE", points)
        spectra.spectra_for.cache_clear()
        for given in (args, halves):
            y = long_conv(*given, bidirectional=bidirectional)
            results.append([y, *torch.autograd.grad(y.float().square().sum(), given)])
    spectra.spectra_for.cache_clear()
    for whole, sliced in ((0, 2), (1, 3)):
        for a, b in zip(results[whole], results[sliced], strict=True):
            bound = 3e-6 if a.dtype == torch.float32 else 1e-2
            assert a.dtype == b.dtype
            assert (a - b).abs().max() <= bound * a.abs().max()


def test_two_sided_is_the_padded_ring_of_s4() -> None:
    u, k0, k1 = (torch.randn(2, 12, dtype=torch.float64) for _ in range(3))
    ring = nn.functional.pad(k0, (0, 12)) + nn.functional.pad(k1.flip(-1), (12, 0))
    expected = torch.fft.irfft(torch.fft.rfft(u, n=24) * torch.fft.rfft(ring, n=24), n=24)[:, :12]
    torch.testing.assert_close(long_conv(u[None], two_sided(k0, k1), bidirectional=True)[0], expected)


@pytest.mark.parametrize("length", [50, 9000])
def test_half_precision_and_autocast(length: int) -> None:
    u, k, skip = inputs(2, 4, length, bidirectional=False, per_sample=False, last=False, dtype=torch.float32)
    full = long_conv(u.bfloat16().float(), k, skip)
    y = long_conv(u.bfloat16(), k, skip)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, full.bfloat16())
    outside = long_conv(u, k, skip)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(long_conv(u, k, skip), outside)
    y.float().sum().backward()
    assert k.grad is not None
    assert k.grad.dtype == torch.float32


def test_threads_change_nothing_and_stay_as_set() -> None:
    u, k, skip = inputs(2, 40, 9000, bidirectional=False, per_sample=False, last=False, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = long_conv(u, k, skip)
            results.append([y, *torch.autograd.grad(y.square().sum(), (u, k, skip))])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][2], other[2])


def test_training_after_inference_mode_in_the_same_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    u, k, skip = inputs(1, 4, 9000, bidirectional=False, per_sample=False, last=False, dtype=torch.float32)
    monkeypatch.setattr(spectra, "_local", threading.local())
    with torch.inference_mode():
        first = long_conv(u, k, skip)
    y = long_conv(u, k, skip)
    y.sum().backward()
    assert torch.equal(first, y)
    assert u.grad is not None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k, self.skip = nn.Parameter(torch.randn(4, 30)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        return long_conv(x.transpose(1, 2), self.k, self.skip).transpose(1, 2).relu()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph_in_both_layouts(transforms: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 30, 4)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    compiled(x).sum().backward()  # first of all: what a compiler's trace leaves behind must serve real tensors
    layer(x).sum().backward()
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled.k.grad, layer.k.grad)
    arguments = (x.transpose(1, 2).requires_grad_(), layer.k, layer.skip, False)
    if transforms.startswith("kept"):
        torch.library.opcheck(longconv._kept, arguments)
    else:
        torch.library.opcheck(longconv._long_conv, (*arguments, transforms.endswith(", kept")))


def test_checkpointing_and_meta() -> None:
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(2, 30, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    (again,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, again)
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert torch.equal(x.grad, plain)
    assert Layer().to("meta")(torch.empty(2, 30, 4, device="meta")).shape == (2, 30, 4)


def test_of_long_signals_only_the_inputs_are_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longconv, "KEPT_SPLIT", 4 * 2 * 9000 - 1)
    u, k, skip = inputs(1, 4, 9000, bidirectional=False, per_sample=False, last=False, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        long_conv(u, k, skip)
    assert set(kept) <= {u.data_ptr(), k.data_ptr(), skip.data_ptr(), torch.empty(0).data_ptr()}


def test_causal_by_gradient() -> None:
    u, k, skip = inputs(1, 2, 40, bidirectional=False, per_sample=False, last=False, dtype=torch.float64)
    (du,) = torch.autograd.grad(long_conv(u, k, skip)[..., 11].sum(), u)
    assert du[..., 12:].abs().max() < 1e-12
    assert du[..., :12].abs().min() > 1e-9


def test_ring_sizes_hold_the_request_with_little_waste() -> None:
    for need in [*range(1, 300), 2 * 160_000 // 16, 2 * 1_000_002 // 32]:
        size = spectra.ring_size(need)
        assert size >= need
        assert size % 2 == 0
        assert size <= max(2 * need if need < 17 else need * 1.26, 2)


def test_wrong_shapes_are_refused_in_one_sentence() -> None:
    u = torch.zeros(1, 3, 8)
    with pytest.raises(ZooError, match="filters of 8 taps"):
        long_conv(u, torch.zeros(3, 9))
    with pytest.raises(ZooError, match="filters of 15 taps"):
        long_conv(u, torch.zeros(3, 8), bidirectional=True)
    with pytest.raises(ZooError, match="skip"):
        long_conv(u, torch.zeros(3, 8), torch.zeros(2))
