"""Linear time-invariant state spaces: h_t = A h_{t-1} + B u_t, y_t = C h_t, diagonal (complex) or dense (real).

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


def _grid(length: int, rows: int = 1) -> tuple[int, int]:
    """(outer, inner) with outer · inner >= length; *rows* sequences share the inner powers and not the outer ones."""
    inner = 1 << max(0, math.ceil(math.log2(max(length * rows, 1)) / 2))
    inner = min(inner, 1 << max(0, (length - 1).bit_length()))
    return -(-length // inner), inner


def _powers(log_a: Tensor, count: int, stride: int, dtype: torch.dtype) -> Tensor:
    """exp(log_a stride t) for t < count on a new last axis, in the complex *dtype*; [.., N] -> [.., N, count].

    Two short lists of exponentials in full precision, and their outer product.
    """
    few = 1 << max(0, math.ceil(math.log2(max(count, 1)) / 2))
    steps = torch.arange(few, device=log_a.device)
    near = torch.exp(log_a[..., None] * (steps[:count] * stride)).to(dtype)
    if count <= few:
        return near
    far = torch.exp(log_a[..., None] * (torch.arange(-(-count // few), device=log_a.device) * (stride * few)))
    return (far.to(dtype)[..., None] * near[..., None, :]).flatten(-2)[..., :count]


def diag_sequence(log_a: Tensor, coef: Tensor, length: int) -> Tensor:
    """2 Re sum_n coef_n exp(log_a_n t) for t = 0 .. length-1.

    Args:
        log_a: [D, N] complex, in the precision the powers are taken in.
        coef: [..., D, N] complex; its precision is that of the result.

    Returns:
        [..., D, length] real.
    """
    lead = coef.shape[:-2]
    y = _DiagSequence.apply(log_a, coef.reshape(-1, *coef.shape[-2:]), length)
    return y.reshape(*lead, *y.shape[1:])


class _DiagSequence(torch.autograd.Function):
    """`diag_sequence` for coef [K, D, N] as one real matrix product, and two more for its gradients."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, coef: Tensor, length: int) -> Tensor:
        many, channels, _ = coef.shape
        outer, inner = _grid(length, many)
        fine = _powers(log_a, inner, 1, coef.dtype)  # [D, N, T]
        turns = _powers(log_a, outer, inner, coef.dtype)  # [D, N, I]
        coarse = coef.permute(1, 0, 2)[:, :, None] * turns.transpose(1, 2)[:, None]  # [D, K, I, N]
        left = torch.view_as_real(coarse).flatten(-2).flatten(1, 2)  # [D, K I, 2N]: real and imaginary in turn
        right = torch.view_as_real(fine.conj().resolve_conj().transpose(1, 2).contiguous()).flatten(-2)  # [D, T, 2N]
        ctx.sizes = (length, outer, inner)
        ctx.save_for_backward(log_a, coef, turns, left, right)
        y = torch.bmm(left, right.transpose(1, 2)).mul_(2)  # [D, K I, T]
        return y.view(channels, many, -1).transpose(0, 1)[..., :length]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        log_a, coef, turns, left, right = ctx.saved_tensors
        many, channels, modes = coef.shape
        length, outer, inner = ctx.sizes
        g = nn.functional.pad(g.transpose(0, 1), (0, outer * inner - length)).reshape(channels, many * outer, inner)
        with torch.autocast(g.device.type, enabled=False):
            dleft = torch.view_as_complex(torch.bmm(g, right).mul_(2).unflatten(-1, (modes, 2)))  # [D, K I, N]
            dright = torch.view_as_complex(torch.bmm(g.transpose(1, 2), left).mul_(2).unflatten(-1, (modes, 2)))
        steps = torch.arange(inner, device=g.device, dtype=g.dtype)
        along = torch.view_as_complex(right.unflatten(-1, (modes, 2)))  # conj(fine)
        dlog = (dright.conj() * along * steps[:, None]).sum(1)
        dleft = dleft.unflatten(1, (many, outer))
        dcoef = torch.einsum("dkin,dni->kdn", dleft, turns.conj())
        coarse = torch.view_as_complex(left.unflatten(-1, (modes, 2))).unflatten(1, (many, outer))
        steps = torch.arange(outer, device=g.device, dtype=g.dtype) * inner
        dlog = dlog + (dleft * coarse.conj() * steps[:, None]).sum((1, 2))
        return dlog.to(log_a.dtype), dcoef, None


def diag_final(log_a: Tensor, u: Tensor, h: Tensor, count: Tensor | None) -> Tensor:
    """The state after u [B, D, L] (its first `count` places, where given), from state h [B, D, N] complex."""
    batch, channels, length = u.shape
    outer, inner = _grid(length)
    u = nn.functional.pad(right_align(u, count), (outer * inner - length, 0))
    u = u.view(batch, channels, outer, inner).transpose(0, 1).reshape(channels, batch * outer, inner)
    fine = _powers(log_a, inner, 1, h.dtype).flip(-1).transpose(1, 2)  # [D, T, N]
    part = u @ torch.cat([fine.real, fine.imag], dim=-1)  # [D, B·I, 2N]
    modes = h.shape[-1]
    ends = torch.complex(part[..., :modes], part[..., modes:]).view(channels, batch, outer, modes)
    coarse = _powers(log_a, outer, inner, h.dtype).flip(-1).transpose(1, 2)  # [D, I, N]
    total = (ends * coarse[:, None]).sum(2).transpose(0, 1)  # [B, D, N]
    tokens = torch.full((batch,), length, device=u.device) if count is None else count
    return total + h * torch.exp(log_a * tokens[:, None, None]).to(h.dtype)


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
        """(log a [D, N], output weights [kernels, D, N]) with a the modes' step; weights complex of *dtype*."""
        exact = exact_dtype(self.log_dt.device)
        a = torch.complex(-self.a_real.to(exact).exp(), self.a_imag.to(exact))
        dt = self.log_dt.to(exact).exp()[:, None]
        if self.disc == "zoh":
            log_a = a * dt
            gain = (log_a.exp() - 1) / a
        else:
            log_a = ((1 + a * dt / 2) / (1 - a * dt / 2)).log()
            gain = dt / (1 - a * dt / 2)
        weights = torch.view_as_complex(self.c.to(exact).contiguous()) * gain
        if self.b is not None:
            weights = weights * torch.view_as_complex(self.b.to(exact).contiguous())
        return log_a, weights.to(complex_of(dtype))

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convolution kernels [kernels, D, length]."""
        log_a, weights = self.discrete(dtype)
        return diag_sequence(log_a, weights, length)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> SSMState:
        """The empty state [B, D, N]."""
        return SSMState(torch.zeros(batch, *self.a_imag.shape, device=device, dtype=complex_of(dtype)))

    def advance(self, u: Tensor, state: SSMState, count: Tensor | None) -> tuple[Tensor, SSMState]:
        """Continue over u [B, D, L]: ([B, kernels, D, L], the state after the first `count` places)."""
        log_a, weights = remembered(self, u.dtype, lambda: self.discrete(u.dtype))
        h, kernels = state.h, len(weights)
        if u.shape[-1] == 1 and count is None:
            h = h * log_a.exp().to(h.dtype) + u
            return 2 * (weights * h[:, None]).sum(-1, keepdim=True).real, SSMState(h)
        memory = diag_sequence(log_a, weights * log_a.exp().to(h.dtype) * h[:, None], u.shape[-1])
        kernel = diag_sequence(log_a, weights, u.shape[-1])
        y = torch.stack([long_conv(u, kernel[k]) for k in range(kernels)], dim=1) + memory
        return y, SSMState(diag_final(log_a, u, h, count))

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


def dense_powers(a: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[v, A v, A² v, ...] [..., H, N, count'] and A^count' for a [H, N, N], v [..., H, N].

    count' is the power of two at or above *count*.
    """
    columns, power = v[..., None], a
    while columns.shape[-1] < count:
        columns = torch.cat([columns, power @ columns], dim=-1)
        power = power @ power
    return columns, power


def dense_kernel(a: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    """C A^t B for t = 0 .. length-1: a [H, N, N], b [H, N], c [K, H, N] -> [K, H, length]."""
    outer, inner = _grid(length)
    columns, power = dense_powers(a, b, inner)  # [H, N, T], A^T
    rows, _ = dense_powers(power.transpose(1, 2), c, outer)  # [K, H, N, I]
    return (rows[..., :outer].transpose(-1, -2) @ columns).flatten(-2)[..., :length]


def dense_scan(
    a: Tensor, b: Tensor, c: Tensor, u: Tensor, h: Tensor, count: Tensor | None, block: int = 64
) -> tuple[Tensor, Tensor]:
    """Continue a dense state space over u [B, H, L] from h [B, H, N], a block at a time; c is [K, H, N].

    Returns:
        y [B, K, H, L] and the state after the first `count` places of each row (all, if None).
    """
    batch, _, length = u.shape
    block = min(block, 1 << max(0, (length - 1).bit_length()))
    columns, power = dense_powers(a, b, block)  # [H, N, T], A^T
    kernel = torch.einsum("khn,hnt->kht", c, columns)
    lag = torch.arange(block, device=u.device)
    lag = lag[:, None] - lag
    zero = torch.zeros((), dtype=u.dtype, device=u.device)
    toeplitz = torch.where(lag >= 0, kernel[..., lag.clamp_min(0)], zero)  # [K, H, T, T]
    reach, _ = dense_powers(a.transpose(1, 2), torch.einsum("khn,hnm->khm", c, a), block)  # [K, H, N, T]: C A^(t+1)
    taken = columns.flip(-1)  # [H, N, T]: A^(T-1-t) B

    def advance(part: Tensor, state: Tensor) -> Tensor:
        return torch.einsum("hmn,bhn->bhm", power, state) + torch.einsum("hnt,bht->bhn", taken, part)

    padding = -length % block
    outputs, state = [], h
    for part in nn.functional.pad(u, (0, padding)).split(block, dim=-1):
        outputs.append(torch.einsum("khts,bhs->bkht", toeplitz, part) + torch.einsum("khnt,bhn->bkht", reach, state))
        state = advance(part, state)
    y = torch.cat(outputs, dim=-1)[..., :length]
    if count is None and padding == 0:
        return y, state
    # zeros before the real inputs leave an empty state empty; what the old state becomes is added apart
    end = torch.zeros_like(h)
    for part in nn.functional.pad(right_align(u, count), (padding, 0)).split(block, dim=-1):
        end = advance(part, end)
    tokens = torch.full((batch,), length, device=u.device) if count is None else count
    square = a
    for bit in range(length.bit_length()):
        moved = torch.einsum("hmn,bhn->bhm", square, h)
        h = torch.where((tokens >> bit & 1).bool()[:, None, None], moved, h)
        square = square @ square
    return y, end + h
