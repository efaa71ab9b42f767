"""Dense state spaces of a layer: S4's diagonal plus low-rank matrix and the LSSL's HiPPO matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.nn.dense_ssm import dense_kernel, dense_scan
from zoo.nn.series import closed_loop
from zoo.nn.ssm import SSMState, complex_of, diag_sequence, exact_dtype, remembered


def hippo_legs(size: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A [N, N] with -sqrt((2n+1)(2k+1)) below the diagonal and -(n+1) on it, B [N] = sqrt(2n+1)."""
    n = torch.arange(size, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    return -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1), root


class DenseSSM(nn.Module):
    """A state space whose step is a real dense matrix; subclasses give the matrices."""

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(A [H, N, N], B [H, N], C [K, H, N]) of one step, in the precision powers are taken in."""
        raise NotImplementedError

    def own_parameters(self) -> list[nn.Parameter]:
        """What must not decay: step sizes and transition."""
        raise NotImplementedError

    def state_shape(self) -> tuple[int, int]:
        """(channels, real numbers a channel) of the state."""
        raise NotImplementedError

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Convolution kernels [K, H, length]."""
        a, b, c = self.matrices()
        unit = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return dense_kernel((a - unit).to(dtype), b.to(dtype), c.to(dtype), length)

    def init_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> SSMState:
        """The empty state [B, H, N]."""
        dtype = dtype if dtype == torch.float64 else torch.float32
        return SSMState(torch.zeros(batch, *self.state_shape(), device=device, dtype=dtype))

    def advance(self, u: Tensor, state: SSMState, count: Tensor | None) -> tuple[Tensor, SSMState]:
        """Continue over u [B, H, L]: ([B, K, H, L], the state after the first `count` places)."""
        a, b, c = remembered(self, u.dtype, lambda: tuple(part.to(u.dtype) for part in self.matrices()))
        if u.shape[-1] == 1 and count is None:
            h = torch.einsum("hmn,bhn->bhm", a, state.h) + b * u
            return torch.einsum("khn,bhn->bkh", c, h)[..., None], SSMState(h)
        y, h = dense_scan(a, b, c, u, state.h, count)
        return y, SSMState(h)


class DPLRSSM(DenseSSM):
    """A = Λ - P P*, complex in conjugate pairs, bilinear steps (S4, arXiv:2111.00396, §3).

    The paper evaluates the kernel by its generating function, a Cauchy sum over the roots of unity. The step is
    diagonal plus rank one too, D + u v*, so that for rank 1 the kernel's power series is

        k = e + x g f / (1 - x h),   e = C D^t B,  f = v* D^t B,  g = C D^t u,  h = v* D^t u:

    four real sums over the modes and three products of series, with nothing of size N x L held. For higher ranks the
    step matrix of each channel is formed and its powers laid on a sqrt(L) grid. The state keeps real and imaginary
    parts, [B, H, 2N] real.

    Args:
        kernel_len: official S4 replaces C by C~ = C (I - A^L) for the length L of its first forward pass and stores
            that; its weights are read with L given here. 0: C is the output vector itself.
    """

    def __init__(
        self,
        channels: int,
        modes: int,
        *,
        rank: int = 1,
        kernels: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        kernel_len: int = 0,
    ) -> None:
        super().__init__()
        self.kernel_len = kernel_len
        a, b = hippo_legs(2 * modes)
        p = (torch.arange(2 * modes, dtype=torch.float64) + 0.5).sqrt()
        # A + p p^T is normal: -1/2 + a skew matrix, whose eigenvectors diagonalise it
        values, vectors = torch.linalg.eigh(-1j * (a + torch.outer(p, p) + 0.5 * torch.eye(2 * modes)))
        vectors, values = vectors[:, :modes], values[:modes]  # eigh sorts: the negative half first

        def project(v: Tensor) -> Tensor:
            return torch.view_as_real(vectors.conj().T @ v.to(vectors.dtype)).expand(channels, modes, 2)

        default = torch.get_default_dtype()
        self.log_dt = nn.Parameter(torch.rand(channels) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.a_real = nn.Parameter(torch.full((channels, modes), math.log(0.5)))
        self.a_imag = nn.Parameter(values.to(default).expand(channels, modes).clone())
        self.b = nn.Parameter(project(b).to(default).clone())
        low_rank = torch.zeros(rank, channels, modes, 2)
        low_rank[0] = project(p)
        low_rank[1:].normal_(std=0.01)
        self.p = nn.Parameter(low_rank)
        self.c = nn.Parameter(torch.randn(kernels, channels, modes, 2) * math.sqrt(0.5))

    def state_shape(self) -> tuple[int, int]:
        return self.a_imag.shape[0], 2 * self.a_imag.shape[1]

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.log_dt, self.a_real, self.a_imag, self.b, self.p]

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if len(self.p) > 1:
            return super().kernel(length, dtype)
        exact = exact_dtype(self.log_dt.device)
        dt = self.log_dt.to(exact).exp()[:, None]
        a = torch.complex(-self.a_real.to(exact).exp(), self.a_imag.to(exact))
        b, p, c = (torch.view_as_complex(v.to(exact).contiguous()) for v in (self.b, self.p[0], self.c))
        if self.kernel_len:
            out = self.matrices()[2]
            c = torch.complex(out[..., : a.shape[1]], -out[..., a.shape[1] :]) / 2
        half = 1 / (1 - a * dt / 2)  # [H, N]
        low = p.conj() * half
        gain = 1 / (2 / dt + 2 * (low * p).real.sum(-1, keepdim=True))
        entering = dt * half * (b - p * gain * 2 * (low * b).real.sum(-1, keepdim=True))  # B of the step
        back = -2 * gain * half * p  # u
        coefficients = torch.cat([c * entering, c * back, (low * entering)[None], (low * back)[None]])
        sums = diag_sequence(2 * half - 1, coefficients.to(complex_of(dtype)), length)
        return closed_loop(sums, len(c))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        exact = exact_dtype(self.log_dt.device)
        dt = self.log_dt.to(exact).exp()[:, None]
        a = torch.complex(-self.a_real.to(exact).exp(), self.a_imag.to(exact))
        b, p, c = (torch.view_as_complex(v.to(exact).contiguous()) for v in (self.b, self.p, self.c))
        modes = a.shape[1]
        # (I - dt/2 A)^-1 = G - G P (2/dt + P* G P)^-1 P* G with G = (I - dt/2 Λ)^-1 (Woodbury); the step is twice
        # this less the identity, and only the upper half of each conjugate pair is needed
        half = 1 / (1 - a * dt / 2)  # [H, N]
        low = torch.cat([p, p.conj()], dim=-1) * torch.cat([half, half.conj()], dim=-1)  # G P: [R, H, 2N]
        inner = 2 * torch.einsum("rhn,shn->hrs", p.conj() * half, p).real
        inner = torch.linalg.inv(inner + torch.eye(len(p), dtype=exact, device=dt.device) * (2 / dt)[..., None])
        right = torch.einsum("hrs,shn->rhn", inner.to(low.dtype), torch.cat([p.conj() * half, p * half.conj()], dim=-1))
        inverse = -torch.einsum("rhm,rhn->hmn", low[..., :modes], right)  # [H, N, 2N]
        inverse[:, :, :modes] += torch.diag_embed(half)
        solved = 2 * inverse
        solved[:, :, :modes] -= torch.eye(modes, dtype=solved.dtype, device=solved.device)
        # conjugate pairs make the step a real map of (Re h, Im h)
        same, other = solved[:, :, :modes], solved[:, :, modes:]
        plus, minus = same + other, same - other
        step = torch.cat([torch.cat([plus.real, -minus.imag], -1), torch.cat([plus.imag, minus.real], -1)], 1)
        taken = dt * torch.einsum("hmn,hn->hm", inverse, torch.cat([b, b.conj()], dim=-1))
        out = torch.cat([2 * c.real, -2 * c.imag], dim=-1)
        if self.kernel_len:
            out = self._untwist(step, out)
        return step, torch.cat([taken.real, taken.imag], dim=-1), out

    def _untwist(self, step: Tensor, out: Tensor) -> Tensor:
        """C from C~ = C (I - A^L), L = kernel_len."""
        power, square, length = torch.eye(step.shape[-1], dtype=step.dtype, device=step.device), step, self.kernel_len
        while length:
            if length & 1:
                power = power @ square
            square, length = square @ square, length >> 1
        unit = torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)
        return torch.linalg.solve((unit - power).transpose(1, 2), out[..., None])[..., 0]


class HippoSSM(DenseSSM):
    """Full A, discretised by the generalised bilinear transform (LSSL, arXiv:2110.13985, eq. 3).

        A_d = (I - α dt A)^-1 (I + (1 - α) dt A),  B_d = dt (I - α dt A)^-1 B

    A [1 or H, N, N] starts as HiPPO-LegS; every channel has its own dt.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        kernels: int = 1,
        alpha: float = 0.5,
        shared: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        a, b = hippo_legs(size)
        copies, default = 1 if shared else channels, torch.get_default_dtype()
        self.log_dt = nn.Parameter(torch.rand(channels) * math.log(dt_max / dt_min) + math.log(dt_min))
        self.a = nn.Parameter(a.to(default).repeat(copies, 1, 1))
        self.b = nn.Parameter(b.to(default).repeat(copies, 1))
        self.c = nn.Parameter(torch.randn(kernels, channels, size) / math.sqrt(size))

    def state_shape(self) -> tuple[int, int]:
        return self.c.shape[1], self.c.shape[2]

    def own_parameters(self) -> list[nn.Parameter]:
        return [self.log_dt, self.a, self.b]

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        less, taken = self._discrete()
        return less + torch.eye(less.shape[-1], dtype=less.dtype, device=less.device), taken, self.c.to(less.dtype)

    def kernel(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        less, taken = self._discrete()
        return dense_kernel(less.to(dtype), taken.to(dtype), self.c.to(dtype), length)

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """(A_d - I, B_d) = (I - α dt A)^-1 dt (A, B): [H, N, N], [H, N]."""
        exact = exact_dtype(self.log_dt.device)
        parts = self.log_dt.to(exact).exp(), self.a.to(exact), self.b.to(exact)
        both = _Implicit.apply(*parts, self.alpha)
        return both[..., :-1], both[..., -1]


class _Implicit(torch.autograd.Function):
    """(I - α dt A)^-1 dt [A, b] for dt [H], a [1 or H, N, N], b [1 or H, N]: [H, N, N + 1]."""

    @staticmethod
    def forward(ctx: Any, dt: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
        right = torch.cat([a, b[..., None]], dim=-1) * dt[:, None, None]
        left = right[..., :-1] * -alpha
        left.diagonal(dim1=1, dim2=2).add_(1)
        factors, pivots = torch.linalg.lu_factor(left)
        solved = torch.linalg.lu_solve(factors, pivots, right)
        ctx.alpha = alpha
        ctx.save_for_backward(dt, a, b, factors, pivots, solved)
        return solved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        dt, a, b, factors, pivots, solved = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dright = torch.linalg.lu_solve(factors, pivots, g, adjoint=True)
            # -α dt A stands on the left too: its gradient is that of the right side times what was solved for
            dright[..., :-1] += torch.bmm(dright, solved.transpose(1, 2)).mul_(ctx.alpha)
            ddt = (dright[..., :-1] * a).sum((1, 2)) + (dright[..., -1] * b).sum(1)
            dright.mul_(dt[:, None, None])
            both = dright.sum(0, keepdim=True) if len(a) == 1 else dright
        return ddt, both[..., :-1], both[..., -1], None
