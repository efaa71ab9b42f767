"""Linear time-invariant state spaces: h_t = A h_{t-1} + B u_t, y_t = C h_t, with a diagonal complex A.

A sequence of L powers is laid out as a grid of about sqrt(L) x sqrt(L): A^(iT+j) = A^(iT) A^j. Kernels and end states
are then matrix products over the modes, and nothing of size modes x L is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.nn.longconv import long_conv
from zoo.nn.rows import right_align
from zoo.nn.state import State

T = TypeVar("T")


@dataclass
class SSMState(State):
    """Hidden state h [B, channels, modes] of a state space: complex for diagonal systems, real for dense ones."""

    h: Tensor


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it: a phase of a million radians needs more digits than float32 holds."""
    return torch.float32 if device.type == "mps" else torch.float64


def complex_of(dtype: torch.dtype) -> torch.dtype:
    """The complex type whose parts are *dtype*."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def remembered(module: nn.Module, key: object, build: Callable[[], T]) -> T:
    """What *build* computes from the parameters of *module*: once per change of them while no gradient is recorded.

    Decoding would otherwise discretise the same system again for every token.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return build()
    stamp = (key, tuple((p.data_ptr(), p._version) for p in module.parameters()))
    memo = module.__dict__.get("_memo")
    if memo is None or memo[0] != stamp:
        memo = module.__dict__["_memo"] = (stamp, build())
    return memo[1]


def grid(length: int, rows: int = 1) -> tuple[int, int]:
    """(outer, inner) with outer · inner >= length; *rows* sequences share the inner powers and not the outer ones."""
    inner = 1 << max(0, math.ceil(math.log2(max(length * rows, 1)) / 2))
    inner = min(inner, 1 << max(0, (length - 1).bit_length()))
    return -(-length // inner), inner


def _ladder(a: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """1, a, a², .. on a new axis before the last, [.., N] -> [.., count', N], and a^count', count' a power of two."""
    rows, power = torch.ones_like(a)[..., None, :], a
    while rows.shape[-2] < count:
        rows = torch.cat([rows, rows * power[..., None, :]], dim=-2)
        power = power * power
    return rows, power


def _powers(a: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a^t for t = 0 .. count-1 in the complex *dtype*, [D, N] -> [D, count, N], and a^count for a power of two.

    Two short lists in the precision of *a*, and their outer product.
    """
    few = 1 << max(0, math.ceil(math.log2(max(count, 1)) / 2))
    near, turn = _ladder(a, few)
    far, end = _ladder(turn, -(-count // few))
    return (far.to(dtype)[:, :, None] * near.to(dtype)[:, None]).flatten(1, 2)[:, :count], end


def diag_sequence(step: Tensor, coef: Tensor, length: int) -> Tensor:
    """2 Re sum_n coef_n step_n^t for t = 0 .. length-1.

    Args:
        step: [D, N] complex, not 0, in the precision the powers are taken in.
        coef: [..., D, N] complex; its precision is that of the result.

    Returns:
        [..., D, length] real.
    """
    lead = coef.shape[:-2]
    y = _DiagSequence.apply(step, coef.reshape(-1, *coef.shape[-2:]), length)
    return y.reshape(*lead, *y.shape[1:])


class _DiagSequence(torch.autograd.Function):
    """`diag_sequence` for coef [K, D, N] as one real matrix product, and two more for its gradients."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, coef: Tensor, length: int) -> Tensor:
        many, channels, _ = coef.shape
        outer, inner = grid(length, many)
        # conjugates on one side: the real product of (re, im) pairs is then the real part of the complex one
        fine, end = _powers(step.conj().resolve_conj(), inner, coef.dtype)  # [D, T, N]
        turns, _ = _powers(end.conj().resolve_conj(), outer, coef.dtype)  # [D, I, N]
        coarse = (coef.transpose(0, 1)[:, :, None] * turns[:, None]).flatten(1, 2)  # [D, K I, N]
        left, right = (torch.view_as_real(part.contiguous()).flatten(-2) for part in (coarse, fine))
        ctx.sizes = (length, outer, inner)
        ctx.save_for_backward(step, coef, turns, left, right)
        y = torch.bmm(left, right.transpose(1, 2)).mul_(2)  # [D, K I, T]
        return y.view(channels, many, -1).transpose(0, 1)[..., :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        step, coef, turns, left, right = ctx.saved_tensors
        many, channels, modes = coef.shape
        length, outer, inner = ctx.sizes
        g = g.transpose(0, 1)
        if outer * inner > length:
            g = nn.functional.pad(g, (0, outer * inner - length))
        g = g.reshape(channels, many * outer, inner)
        pairs = lambda t: torch.view_as_complex(t.unflatten(-1, (modes, 2)))
        with torch.autocast(g.device.type, enabled=False):
            along = pairs(torch.bmm(g.transpose(1, 2), left))  # [D, T, N]
            along = along.conj_physical_().mul_(pairs(right))
            across = pairs(torch.bmm(g, right)).unflatten(1, (many, outer))  # [D, K, I, N]
            across = across.mul_(turns.conj_physical()[:, None])
            times = torch.arange(max(inner, outer), device=g.device, dtype=g.dtype) * 2
            sums = torch.stack([torch.full_like(times[:outer], 2), times[:outer] * inner])
            fine = torch.matmul(times[:inner], torch.view_as_real(along).flatten(-2))  # [D, 2N]
            coarse = torch.matmul(sums, torch.view_as_real(across).flatten(-2))  # [D, K, 2, 2N]
        dcoef, later = pairs(coarse).unbind(2)
        dlog = pairs(fine) + (later * coef.transpose(0, 1).conj()).sum(1)
        return (dlog / step.conj()).to(step.dtype), dcoef.transpose(0, 1), None


def diag_final(step: Tensor, u: Tensor, h: Tensor, count: Tensor | None) -> Tensor:
    """The state after u [B, D, L] (its first `count` places, where given), from state h [B, D, N] complex."""
    batch, channels, length = u.shape
    outer, inner = grid(length)
    u = nn.functional.pad(right_align(u, count), (outer * inner - length, 0))
    u = u.view(batch, channels, outer, inner).transpose(0, 1).reshape(channels, batch * outer, inner)
    fine, end = _powers(step, inner, h.dtype)
    fine = torch.view_as_real(fine.flip(1)).flatten(-2)  # [D, T, 2N]
    ends = torch.view_as_complex((u @ fine).unflatten(-1, (-1, 2))).view(channels, batch, outer, -1)
    coarse = _powers(end, outer, h.dtype)[0].flip(1)  # [D, I, N]
    total = (ends * coarse[:, None]).sum(2).transpose(0, 1)  # [B, D, N]
    tokens = torch.full((batch,), length, device=u.device) if count is None else count
    for bit in range(length.bit_length()):
        h = torch.where((tokens >> bit & 1).bool()[:, None, None], h * step.to(h.dtype), h)
        step = step * step
    return total + h


class DiagonalSSM(nn.Module):
    """Channels of independent diagonal state spaces of complex modes, kept in conjugate pairs (S4D, arXiv:2206.11893).

    A = -exp(a_real) + i a_imag, dt = exp(log_dt); discretised by zero-order hold or the bilinear rule. The state takes
    the input with weight 1; B and the discretisation's factor are folded into the output weights.

    Args:
        channels: D.
        modes: N, half the state size.
        kernels: output vectors a channel (2 for a bidirectional layer).
        input_vector: a trainable B (S4 and H3 have one, S4D's standalone form has not).
    """

    def __init__(
        self,
        channels: int,
        modes: int,
        *,
        init: str = "lin",
        disc: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        kernels: int = 1,
        input_vector: bool = False,
    ) -> None:
        super().__init__()
        self.disc = disc
        n = torch.arange(modes).expand(channels, modes)
        real = torch.full((channels, modes), 0.5)
        if init == "lin":
            imag = math.pi * n
        elif init == "inv":
            imag = 2 * modes / math.pi * (2 * modes / (1 + 2 * n) - 1)
        else:  # "real": S4D-Real, the eigenvalues of HiPPO-LegS
            real, imag = 1.0 + n, 0.0 * n
        self.log_dt = nn.Parameter(torch.rand(channels) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.a_real = nn.Parameter(real.log())
        self.a_imag = nn.Parameter(imag.to(torch.get_default_dtype()).clone())
        self.c = nn.Parameter(torch.randn(kernels, channels, modes, 2) * math.sqrt(0.5))
        self.b = nn.Parameter(torch.tensor([1.0, 0.0]).expand(channels, modes, 2).clone()) if input_vector else None

    def discrete(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(step [D, N] of the modes, output weights [kernels, D, N]); weights complex of *dtype*."""
        exact = exact_dtype(self.log_dt.device)
        a = torch.complex(-self.a_real.to(exact).exp(), self.a_imag.to(exact))
        dt = self.log_dt.to(exact).exp()[:, None]
        if self.disc == "zoh":
            step = (a * dt).exp()
            gain = (step - 1) / a
        else:
            half = 1 / (1 - a * (dt / 2))
            step = 2 * half - 1
            gain = dt * half
        weights = torch.view_as_complex(self.c.to(exact).contiguous()) * gain
        if self.b is not None:
            weights = weights * torch.view_as_complex(self.b.to(exact).contiguous())
        return step, weights.to(complex_of(dtype))

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convolution kernels [kernels, D, length]."""
        return diag_sequence(*self.discrete(dtype), length)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> SSMState:
        """The empty state [B, D, N]."""
        return SSMState(torch.zeros(batch, *self.a_imag.shape, device=device, dtype=complex_of(dtype)))

    def advance(self, u: Tensor, state: SSMState, count: Tensor | None) -> tuple[Tensor, SSMState]:
        """Continue over u [B, D, L]: ([B, kernels, D, L], the state after the first `count` places)."""
        step, weights = remembered(self, u.dtype, lambda: self.discrete(u.dtype))
        h, kernels, rounded = state.h, len(weights), step.to(complex_of(u.dtype))
        if u.shape[-1] == 1 and count is None:
            h = h * rounded + u
            return 2 * (weights * h[:, None]).sum(-1, keepdim=True).real, SSMState(h)
        memory = diag_sequence(step, weights * rounded * h[:, None], u.shape[-1])
        kernel = diag_sequence(step, weights, u.shape[-1])
        y = torch.stack([long_conv(u, kernel[k]) for k in range(kernels)], dim=1) + memory
        return y, SSMState(diag_final(step, u, h, count))

    def input_gain(self) -> Tensor:
        """[D, N] complex: what a state with B and the discretisation folded in (the official layout) is times ours."""
        exact = exact_dtype(self.log_dt.device)
        a = torch.complex(-self.a_real.to(exact).exp(), self.a_imag.to(exact))
        dt = self.log_dt.to(exact).exp()[:, None]
        gain = ((a * dt).exp() - 1) / a if self.disc == "zoh" else dt / (1 - a * dt / 2)
        return gain if self.b is None else gain * torch.view_as_complex(self.b.to(exact).contiguous())

    def own_parameters(self) -> list[nn.Parameter]:
        """What must not decay: step sizes, modes and input vectors."""
        return [p for p in (self.log_dt, self.a_real, self.a_imag, self.b) if p is not None]
