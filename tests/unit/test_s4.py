"""S4, S4D and LSSL against the definitions: recurrences, the Vandermonde sum, the Cauchy generating function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.convert.s4 import config_from_official, table, to_official, to_zoo
from zoo.errors import ConfigError, ZooError
from zoo.nn.backbone import make_mixer
from zoo.nn.dense_ssm import dense_kernel, dense_scan
from zoo.nn.dplr import DPLRSSM, HippoSSM, hippo_legs
from zoo.nn.layout import CAUSAL, Layout
from zoo.nn.mixer import split_param_groups
from zoo.nn.s4 import S4, S4D, S4Config, S4DConfig
from zoo.nn.series import closed_loop
from zoo.nn.ssm import DiagonalSSM, diag_final, diag_sequence


def recurrence(a: Tensor, b: Tensor, c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """h = A h + B u, y = C h by a loop; a [H, N, N], b, c [H, N], u [B, H, L]."""
    h = u.new_zeros(u.shape[0], *b.shape)
    ys = []
    for t in range(u.shape[-1]):
        h = torch.einsum("hmn,bhn->bhm", a, h) + b * u[..., t, None]
        ys.append((c * h).sum(-1))
    return torch.stack(ys, -1), h


@pytest.mark.parametrize("length", [1, 2, 7, 40, 200])
def test_diagonal_kernel_is_the_vandermonde_sum(length: int) -> None:
    log_a = torch.complex(-torch.rand(3, 5), 3 * torch.randn(3, 5)).to(torch.complex128)
    coef = torch.randn(2, 3, 5, dtype=torch.complex128)
    t = torch.arange(length)
    naive = 2 * torch.einsum("kdn,dnl->kdl", coef, torch.exp(log_a[..., None] * t)).real
    torch.testing.assert_close(diag_sequence(log_a.exp(), coef, length), naive, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4d_is_its_recurrence(disc: str) -> None:
    layer = S4D(4, S4DConfig(d_state=6, disc=disc)).double()
    u = torch.randn(2, 4, 23, dtype=torch.float64)
    dt = layer.system.log_dt.exp()[:, None]
    a = torch.complex(-layer.system.a_real.exp(), layer.system.a_imag)
    if disc == "zoh":
        step, taken = (a * dt).exp(), ((a * dt).exp() - 1) / a
    else:
        step, taken = (1 + a * dt / 2) / (1 - a * dt / 2), dt / (1 - a * dt / 2)
    c = torch.view_as_complex(layer.system.c[0].contiguous())
    y, _ = recurrence(torch.diag_embed(step), taken, 2 * c, u.to(step.dtype))
    expected = y.real + layer.skip[0, :, None] * u
    torch.testing.assert_close(layer.convolve(u, None, None)[0], expected, rtol=1e-9, atol=1e-10)


def test_state_of_ragged_rows() -> None:
    system = DiagonalSSM(3, 4)
    step, _ = system.discrete(torch.float64)
    u, count = torch.randn(3, 3, 21, dtype=torch.float64), torch.tensor([0, 13, 21])
    start = torch.randn(3, 3, 4, dtype=torch.complex128)
    h = diag_final(step, u, start, count)
    for row, n in enumerate(count.tolist()):
        one = start[row]
        for t in range(n):
            one = step * one + u[row, :, t, None]
        torch.testing.assert_close(h[row], one, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("outputs", [1, 2])
def test_closed_loop_is_its_recurrence(length: int, outputs: int) -> None:
    sums = (torch.randn(2 * outputs + 2, 3, length, dtype=torch.float64) * 0.3).requires_grad_()
    driven, loop = sums[-2], sums[-1]
    inside: list[Tensor] = []
    for t in range(length):  # p = f + x h p
        inside.append(driven[:, t] + sum((loop[:, t - 1 - s] * p for s, p in enumerate(inside)), torch.zeros(())))
    rows = []
    for k in range(outputs):
        turn = [sum(sums[outputs + k, :, t - 1 - s] * inside[s] for s in range(t)) for t in range(length)]
        rows.append(torch.stack([sums[k, :, t] + turn[t] for t in range(length)], -1))
    expected, actual = torch.stack(rows), closed_loop(sums, outputs)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), sums)
    (given,) = torch.autograd.grad((actual * weight).sum(), sums)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-10)


def generating_function_kernel(system: DPLRSSM, length: int, twisted: bool) -> Tensor:
    """S4 §3 and appendix C: C~ through a Cauchy sum at the roots of unity, Woodbury for the low rank, inverse FFT."""
    dt = system.log_dt.double().exp()[:, None]
    a = torch.complex(-system.a_real.double().exp(), system.a_imag.double())
    b, p, c = (torch.view_as_complex(v.double().contiguous()) for v in (system.b, system.p[0], system.c[0]))
    full = lambda v: torch.cat([v, v.conj()], -1)
    if not twisted:  # C~ = C (I - A^L)
        generator = torch.diag_embed(full(a)) - full(p)[..., :, None] * full(p).conj()[..., None, :]
        eye = torch.eye(generator.shape[-1], dtype=generator.dtype)
        half = generator * dt[..., None] / 2
        step = torch.linalg.solve(eye - half, eye + half)
        row = full(c)
        c = (row - torch.einsum("hn,hnm->hm", row, torch.linalg.matrix_power(step, length)))[:, : c.shape[1]]
    omega = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64) / length)

    def cauchy(v: Tensor) -> Tensor:  # sum_n 2 v / (2 (1 - w) - (1 + w) dt a): finite at w = -1 too
        bottom = 2 * (1 - omega) - (1 + omega) * full(a * dt)[..., None]
        return (2 * full(v * dt)[..., None] / bottom).sum(1)

    mid = (1 + omega) / 2
    spectrum = cauchy(b * c) - cauchy(b * p.conj()) * cauchy(p * c) * mid / (1 + cauchy(p * p.conj()) * mid)
    return torch.fft.ifft(spectrum).real


@pytest.mark.parametrize(("length", "kernel_len"), [(16, 0), (33, 0), (24, 24)])
def test_dplr_kernel_is_the_generating_function(length: int, kernel_len: int) -> None:
    system = DPLRSSM(5, 8, dt_min=1e-2, kernel_len=kernel_len)
    expected = generating_function_kernel(system, length, twisted=bool(kernel_len))
    torch.testing.assert_close(system.kernel(length, torch.float64)[0], expected, rtol=1e-7, atol=1e-8)


def test_twisted_weights_reach_beyond_their_length_and_step() -> None:
    layer = S4(4, S4Config(d_state=8, kernel_len=16)).double()
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(x, CAUSAL)
        state = layer.init_state(2, 40, dtype=torch.float64)
        steps = []
        for t in range(40):
            out, state = layer.step(x[:, t], state)
            steps.append(out)
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=1e-8, atol=1e-9)


def test_dplr_starts_as_hippo() -> None:
    system = DPLRSSM(1, 4)
    a = torch.complex(-system.a_real.double().exp(), system.a_imag.double())[0]
    p = torch.view_as_complex(system.p[0, 0].double())
    low = torch.cat([p, p.conj()])
    matrix = torch.diag(torch.cat([a, a.conj()])) - torch.outer(low, low.conj())
    values = torch.linalg.eigvals(matrix).real.sort().values
    torch.testing.assert_close(values, -torch.arange(8.0, 0, -1).double(), rtol=1e-2, atol=1e-2)


def test_lssl_kernel_is_its_recurrence() -> None:
    system = HippoSSM(3, 6, kernels=2, alpha=1.0, shared=False).double()
    step, taken, c = system.matrices()
    dt = system.log_dt.exp()
    a, b = hippo_legs(6)
    for h in range(3):
        back = torch.linalg.inv(torch.eye(6) - dt[h] * a)  # backward Euler
        torch.testing.assert_close(step[h], back, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(taken[h], dt[h] * back @ b, rtol=1e-5, atol=1e-6)
    u = torch.zeros(1, 3, 19, dtype=torch.float64)
    u[..., 0] = 1
    for k in range(2):
        y, _ = recurrence(step, taken, c[k], u)
        torch.testing.assert_close(system.kernel(19, torch.float64)[k], y[0], rtol=1e-9, atol=1e-10)


def test_single_precision_keeps_the_dense_kernel_and_its_gradients() -> None:
    system = HippoSSM(5, 32)
    weight = torch.randn(1, 5, 3000)
    exact, short = (system.kernel(3000, dtype) for dtype in (torch.float64, torch.float32))
    assert float((exact - short).detach().abs().max() / exact.detach().abs().max()) < 3e-6
    grads = [torch.autograd.grad((k * weight).sum(), list(system.parameters())) for k in (exact, short)]
    for wanted, given in zip(*grads, strict=True):
        assert float((wanted - given).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("shared", [True, False])
def test_implicit_steps_have_the_gradients_of_the_solve(shared: bool) -> None:
    system = HippoSSM(3, 4, shared=shared, alpha=0.7).double()
    step, taken, _ = system.matrices()
    scaled, unit = system.a * system.log_dt.exp()[:, None, None], torch.eye(4, dtype=torch.float64)
    left = unit - 0.7 * scaled
    right = torch.cat([unit + 0.3 * scaled, (system.log_dt.exp()[:, None] * system.b)[..., None]], -1)
    expected = torch.linalg.solve(left, right)
    torch.testing.assert_close(torch.cat([step, taken[..., None]], -1), expected, rtol=1e-12, atol=1e-13)
    weight, leaves = torch.randn_like(expected), [system.log_dt, system.a, system.b]
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    given = torch.autograd.grad((torch.cat([step, taken[..., None]], -1) * weight).sum(), leaves)
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("length", "outputs"), [(1, 1), (5, 2), (40, 1)])
def test_dense_kernel_gradients(length: int, outputs: int) -> None:
    less, b, c = (0.2 * torch.randn(2, 3, 3), torch.randn(2, 3), torch.randn(outputs, 2, 3))
    inputs = [t.double().requires_grad_() for t in (less, b, c)]
    assert torch.autograd.gradcheck(lambda *t: dense_kernel(*t, length), inputs)


def test_dense_scan_keeps_every_rows_own_end() -> None:
    step, taken, c = HippoSSM(2, 4).double().matrices()
    u, count = torch.randn(3, 2, 150, dtype=torch.float64), torch.tensor([150, 1, 97])
    start = torch.randn(3, 2, 4, dtype=torch.float64)
    y, end = dense_scan(step, taken, c, u, start, count)
    for row, n in enumerate(count.tolist()):
        h = start[row]
        for t in range(n):
            h = torch.einsum("hmn,hn->hm", step, h) + taken * u[row, :, t, None]
            torch.testing.assert_close(y[row, 0, :, t], (c[0] * h).sum(-1), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(end[row], h, rtol=1e-8, atol=1e-9)


def test_bidirectional_sees_both_sides() -> None:
    layer = S4(2, S4Config(d_state=4, mode="diag", bidirectional=True)).double()
    u = torch.randn(1, 2, 9, dtype=torch.float64)
    kernel = layer.system.kernel(9, torch.float64)
    expected = layer.skip[0, :, None] * u
    for t in range(9):
        for s in range(9):
            tap = kernel[0, :, t - s] if s <= t else kernel[1, :, s - t - 1]
            expected[0, :, t] += tap * u[0, :, s]
    torch.testing.assert_close(layer.convolve(u, None, None)[0], expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ConfigError, match="bidirectional"):
        layer.init_state(1, 9)


def test_cut_kernels() -> None:
    layer = S4(3, S4Config(d_state=4, mode="diag", max_kernel=5)).double()
    u = torch.zeros(1, 3, 12, dtype=torch.float64)
    u[..., 0] = 1
    response = layer.convolve(u, None, None)[0]
    assert (response[..., 5:].abs() < 1e-12).all()
    assert (response[..., :5].abs() > 1e-6).any()
    with pytest.raises(ConfigError, match="max_kernel"):
        layer.init_state(1, 9)


@pytest.mark.parametrize(("name", "options"), [("s4d", {"d_state": 8}), ("s4", {"d_state": 8})])
def test_a_million_taps_take_no_space_of_modes_times_length(name: str, options: dict) -> None:
    mixer = make_mixer(name, 2, options)
    with torch.no_grad():
        kernel = mixer.system.kernel(1 << 20)
    assert kernel.shape == (1, 2, 1 << 20)
    assert kernel.isfinite().all()


@pytest.mark.parametrize("name", ["s4d", "s4", "lssl"])
def test_decoding_follows_the_weights(name: str) -> None:
    """The discretised system is remembered between steps, but never across a change of the parameters."""
    mixer = make_mixer(name, 4, {"d_state": 8}).eval()
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        mixer.step(x[:, 0], mixer.init_state(2, 5))
        mixer.system.log_dt.add_(1.0)
        state = mixer.init_state(2, 5)
        for t in range(5):
            y, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(y, mixer(x, CAUSAL)[0][:, -1], rtol=1e-4, atol=1e-5)


def test_transition_parameters_never_decay() -> None:
    mixer = make_mixer("s4", 4, {"d_state": 8, "lr": 1e-3})
    first = split_param_groups(mixer)[0]
    assert first["weight_decay"] == 0
    assert first["lr"] == 1e-3
    assert {id(p) for p in first["params"]} == {
        id(p) for p in (mixer.system.log_dt, mixer.system.a_real, mixer.system.a_imag, mixer.system.b, mixer.system.p)
    }


def test_packed_documents_do_not_continue_a_state() -> None:
    mixer = make_mixer("s4d", 4, {"d_state": 8})
    layout = Layout("causal", segment=torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ZooError, match="carried state"):
        mixer(torch.randn(1, 3, 4), layout, mixer.init_state(1, 3))


def test_official_configs() -> None:
    config = config_from_official({"d_model": 8, "d_state": 16, "mode": "nplr", "l_max": 32, "bidirectional": True})
    assert config == S4Config(d_state=16, mode="dplr", max_kernel=32, bidirectional=True)
    assert config_from_official({"d_model": 8, "d_state": 16, "dt_min": 0.01}) == S4DConfig(d_state=16, dt_min=0.01)
    with pytest.raises(ConfigError, match="gate"):
        config_from_official({"d_model": 8, "mode": "diag", "gate": 2})


@pytest.mark.parametrize(
    "config", [S4DConfig(d_state=4), S4Config(d_state=4, kernel_len=7), S4Config(d_state=4, mode="diag", gated=False)]
)
def test_conversion_is_a_bijection(config: S4Config | S4DConfig) -> None:
    layer = (S4D if isinstance(config, S4DConfig) else S4)(3, config)
    state = layer.state_dict()
    official = to_official(state, config)
    assert list(official) == [row.official for row in table(config)]
    back = to_zoo(official, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(ZooError, match="missing"):
        to_zoo({key: value for key, value in official.items() if "A_imag" not in key}, config)


@pytest.mark.parametrize("rank", [1, 2])
def test_dplr_step_is_the_bilinear_rule(rank: int) -> None:
    system = DPLRSSM(3, 4, rank=rank).double()
    with torch.no_grad():
        system.p.add_(0.3 * torch.randn_like(system.p))
    step, taken, out = system.matrices()
    dt = system.log_dt.exp()[:, None, None]
    a = torch.complex(-system.a_real.exp(), system.a_imag)
    full = lambda v: torch.cat([v, v.conj()], -1)
    b, c = (torch.view_as_complex(v.contiguous()) for v in (system.b, system.c[0]))
    low = full(torch.view_as_complex(system.p.contiguous()))
    generator = torch.diag_embed(full(a)) - torch.einsum("rhm,rhn->hmn", low, low.conj())
    eye = torch.eye(8, dtype=generator.dtype)
    inverse = torch.linalg.inv(eye - dt / 2 * generator)
    state = torch.randn(3, 8, dtype=torch.float64)
    h = full(torch.complex(state[:, :4], state[:, 4:]))
    expected = (inverse @ (eye + dt / 2 * generator) @ h[..., None])[..., 0]
    moved = torch.einsum("hmn,hn->hm", step, state)
    torch.testing.assert_close(torch.complex(moved[:, :4], moved[:, 4:]), expected[:, :4], rtol=1e-9, atol=1e-10)
    entered = (dt * inverse @ full(b)[..., None])[:, :4, 0]
    torch.testing.assert_close(torch.complex(taken[:, :4], taken[:, 4:]), entered, rtol=1e-9, atol=1e-10)
    read = torch.einsum("hn,hn->h", out[0], state)
    torch.testing.assert_close(read, (full(c) * h).sum(-1).real, rtol=1e-9, atol=1e-10)
