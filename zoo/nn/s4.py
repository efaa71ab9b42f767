"""S4, S4D and LSSL: a state space per channel, run as a convolution or as a recurrence."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.dplr import DPLRSSM, DenseSSM, HippoSSM
from zoo.nn.longconv import long_conv, two_sided
from zoo.nn.mixer import Cost, MixerInfo, ParamGroup
from zoo.nn.rows import RowMixer
from zoo.nn.ssm import DiagonalSSM, SSMState, work_dtype


@config
class S4DConfig:
    """S4D (arXiv:2206.11893), the diagonal state space with a fixed input vector.

    Attributes:
        d_state: real state size N a channel (N/2 complex modes).
        init: imaginary parts of A: `lin` (π n), `inv` (the inverse law of S4D-Inv) or `real` (A = -1 .. -N/2, real).
        disc: `zoh` or `bilinear` discretisation.
        dt_min, dt_max: range of the log-uniform initial step sizes.
        bidirectional: two kernels, one for each direction; such a layer cannot decode.
        dropout: after the activation.
        lr: learning rate of dt and A, which never decay; None follows the optimiser's.
    """

    d_state: int = 64
    init: Literal["lin", "inv", "real"] = "lin"
    disc: Literal["zoh", "bilinear"] = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    bidirectional: bool = False
    dropout: float = 0.0
    lr: float | None = 1e-3


@config
class S4Config:
    """S4 (arXiv:2111.00396), diagonal plus low rank, and its diagonal sibling with a trainable input vector.

    Attributes:
        d_state: real state size N a channel (N/2 complex modes).
        mode: `dplr` (HiPPO-LegS) or `diag`.
        init: imaginary parts of A for `diag`, as in S4D.
        disc: discretisation for `diag`; `dplr` is always bilinear.
        rank: of the correction, for `dplr`.
        dt_min, dt_max: range of the log-uniform initial step sizes.
        max_kernel: kernels are cut to this many taps (official `l_max`); a cut kernel has no state, so the layer
            cannot decode then.
        kernel_len: official `dplr` weights hold C (I - A^L) for the L of their first forward pass; 0 for C itself.
        bidirectional: two kernels, one for each direction; such a layer cannot decode.
        gated: the output projection is a GLU (official `final_act: glu`), else linear.
        dropout: after the activation.
        lr: learning rate of dt, A, B and P, which never decay; None follows the optimiser's.
    """

    d_state: int = 64
    mode: Literal["dplr", "diag"] = "dplr"
    init: Literal["lin", "inv", "real"] = "lin"
    disc: Literal["zoh", "bilinear"] = "zoh"
    rank: int = 1
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    max_kernel: int | None = None
    kernel_len: int = 0
    bidirectional: bool = False
    gated: bool = True
    dropout: float = 0.0
    lr: float | None = 1e-3


@config
class LSSLConfig:
    """Linear State-Space Layer (arXiv:2110.13985): S4's predecessor with a full N x N matrix.

    Attributes:
        d_state: state size N a channel.
        channels: outputs M of each state space, mixed by the output projection.
        alpha: generalised bilinear transform: 0 forward Euler, 1/2 bilinear, 1 backward Euler.
        shared: one trainable A for all channels, else one each.
        dt_min, dt_max: range of the log-uniform initial step sizes.
        dropout: after the activation.
        lr: learning rate of dt, A and B, which never decay; None follows the optimiser's.
    """

    d_state: int = 32
    channels: int = 1
    alpha: float = 0.5
    shared: bool = True
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dropout: float = 0.0
    lr: float | None = 1e-4


class StateSpaceLayer(RowMixer):
    """y = out(GELU(K * u + D u)), with K the kernels of a state space [M outputs, D channels].

    Args:
        system: gives `kernel`, `advance`, `init_state` and `own_parameters`.
        outputs: M.
        gated: the projection [M·D -> 2D] ends in a GLU, else it is [M·D -> D].
    """

    def __init__(
        self,
        d_model: int,
        system: DiagonalSSM | DenseSSM,
        *,
        outputs: int = 1,
        gated: bool = True,
        bidirectional: bool = False,
        max_kernel: int | None = None,
        dropout: float = 0.0,
        lr: float | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.system = system
        self.bidirectional = bidirectional
        self.max_kernel = max_kernel
        self.gated = gated
        self.lr = lr
        self.skip = nn.Parameter(torch.randn(outputs, d_model))
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(outputs * d_model, 2 * d_model if gated else d_model)
        self.decodes = not bidirectional and max_kernel is None
        self.info = MixerInfo(
            layouts=frozenset({"full"} if bidirectional else {"causal"}),
            step="constant" if self.decodes else "none",
            packing=True,
            split="channels" if bidirectional else "state",
        )

    def mix(self, x: Tensor, count: Tensor | None, state: SSMState | None) -> tuple[Tensor, SSMState | None]:
        u = x.to(work_dtype(x)).transpose(1, 2)  # [B, D, L]
        with torch.autocast(x.device.type, enabled=False):
            y, state = self.convolve(u, count, state)
        y = F.gelu(y).transpose(1, 2).to(x.dtype)  # [B, L, M·D]
        y = self.out_proj(self.dropout(y))
        return (F.glu(y, dim=-1) if self.gated else y), state

    def convolve(self, u: Tensor, count: Tensor | None, state: SSMState | None) -> tuple[Tensor, SSMState | None]:
        """The state space with its skip: u [B, D, L] -> [B, M·D, L]."""
        length, outputs = u.shape[-1], len(self.skip)
        skip = self.skip.to(u.dtype)
        if state is not None:
            y, state = self.system.advance(u, state, count)
            return (y + skip[..., None] * u[:, None]).flatten(1, 2), state
        taps = length if self.max_kernel is None else min(length, self.max_kernel)
        kernel = F.pad(self.system.kernel(taps, u.dtype), (0, length - taps))
        if self.bidirectional:
            kernel = two_sided(kernel[:outputs], kernel[outputs:])
        parts = [long_conv(u, kernel[m], skip[m], bidirectional=self.bidirectional) for m in range(outputs)]
        return (parts[0] if outputs == 1 else torch.cat(parts, dim=1)), None

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SSMState:
        """The empty state: constant in max_len.

        Raises:
            ConfigError: the layer is bidirectional or its kernels are cut.
        """
        if not self.decodes:
            what = "is bidirectional" if self.bidirectional else "has cut kernels (max_kernel)"
            raise ConfigError(f"{type(self).__name__} {what} and cannot decode token by token")
        return self.system.init_state(batch, device, dtype)

    def cost(self, length: int, batch: int = 1) -> Cost:
        outputs, width = len(self.skip), self.d_model
        transforms = 15 * outputs * width * length * max(1, (2 * length).bit_length())
        kernel = 4 * outputs * width * length * self._state_reals()
        projection = 2 * length * self.out_proj.weight.numel()
        size = 4 * batch * width * self._state_reals() if self.decodes else 0
        return Cost(flops=float(batch * (transforms + projection) + kernel), state_bytes=size)

    def _state_reals(self) -> int:
        if isinstance(self.system, DenseSSM):
            return self.system.state_shape()[1]
        return 2 * self.system.a_imag.shape[1]

    def param_groups(self) -> list[ParamGroup]:
        """dt and the transition: no decay, own rate; the skip: no decay."""
        own: ParamGroup = {"params": self.system.own_parameters(), "weight_decay": 0.0}
        if self.lr is not None:
            own["lr"] = self.lr
        return [own, {"params": [self.skip], "weight_decay": 0.0}]


class S4D(StateSpaceLayer):
    """Diagonal state space layer (Gu et al. 2022). x [B, L, D] -> [B, L, D]; state [B, D, N/2] complex."""

    Config = S4DConfig

    def __init__(self, d_model: int, config: S4DConfig, layer_index: int = 0) -> None:
        system = DiagonalSSM(
            d_model, config.d_state // 2, init=config.init, disc=config.disc, dt_min=config.dt_min,
            dt_max=config.dt_max, kernels=1 + config.bidirectional,
        )  # fmt: skip
        super().__init__(
            d_model, system, bidirectional=config.bidirectional, dropout=config.dropout, lr=config.lr
        )  # fmt: skip
        self.config = config


class S4(StateSpaceLayer):
    """Structured state space layer (Gu et al. 2021). x [B, L, D] -> [B, L, D]; state [B, D, N] real."""

    Config = S4Config

    def __init__(self, d_model: int, config: S4Config, layer_index: int = 0) -> None:
        common: dict[str, Any] = {
            "dt_min": config.dt_min, "dt_max": config.dt_max, "kernels": 1 + config.bidirectional,
        }  # fmt: skip
        system: DiagonalSSM | DenseSSM
        if config.mode == "dplr":
            system = DPLRSSM(d_model, config.d_state // 2, rank=config.rank, kernel_len=config.kernel_len, **common)
        else:
            system = DiagonalSSM(
                d_model, config.d_state // 2, init=config.init, disc=config.disc, input_vector=True, **common
            )
        super().__init__(
            d_model, system, gated=config.gated, bidirectional=config.bidirectional,
            max_kernel=config.max_kernel, dropout=config.dropout, lr=config.lr,
        )  # fmt: skip
        self.config = config


class LSSL(StateSpaceLayer):
    """Linear State-Space Layer (Gu et al. 2021). x [B, L, D] -> [B, L, D]; state [B, D, N] real."""

    Config = LSSLConfig

    def __init__(self, d_model: int, config: LSSLConfig, layer_index: int = 0) -> None:
        system = HippoSSM(
            d_model, config.d_state, kernels=config.channels, alpha=config.alpha, shared=config.shared,
            dt_min=config.dt_min, dt_max=config.dt_max,
        )  # fmt: skip
        super().__init__(
            d_model, system, outputs=config.channels, gated=False, dropout=config.dropout, lr=config.lr
        )  # fmt: skip
        self.config = config
