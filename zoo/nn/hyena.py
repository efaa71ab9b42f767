"""Hyena: gating by projections of the input, mixing by long convolutions whose filters are functions of position.

Poli et al. 2023, "Hyena Hierarchy", arXiv:2302.10866, §3: with projections x^0 .. x^{N-1}, v of the input,
    v <- h^i * (v . x^i)  for i = N-1 .. 1,   y = W_out (v . x^0),
where h^i is the output of a small network of the position, times an exponential window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.nn import implicit_filter
from zoo.nn.implicit_filter import HyenaFilter, decay_rates, position_grid
from zoo.nn.layout import Layout
from zoo.nn.longconv import long_conv
from zoo.nn.mixer import Cost, Mixer, MixerInfo, ParamGroup
from zoo.nn.online_conv import OnlineConv, OnlineConvState
from zoo.nn.pieces import in_pieces, last_linear
from zoo.nn.rows import Rows
from zoo.nn.shortconv import causal_short_conv, short_conv_history
from zoo.nn.state import State

__all__ = ["Hyena", "HyenaConfig", "HyenaFilter", "HyenaState", "decay_rates", "position_grid"]
Resumed = tuple[Tensor, OnlineConvState]
_GROUP = 64  # channels mixed at once in long inference
_PUSH = 16  # tokens up to which single steps are cheaper than a transform of the history


@config
class HyenaConfig:
    """Options of a Hyena mixer.

    Attributes:
        max_len: longest sequence. The filter is a function of position / max_len, so weights are tied to this number.
        order: number of gates; order - 1 long convolutions in a row.
        filter_width: hidden width of the filter network.
        emb_dim: odd number of position features: time, and (emb_dim - 1) / 2 cosines and sines.
        num_inner_mlps: hidden layers of the filter network after the first.
        sin_freq: initial frequency of its sine activations, one learned frequency a hidden channel.
        train_freq: learn that frequency.
        short_filter: taps of the depth-wise convolution after the projection.
        shift: floor of the exponential window. 0.05 in HyenaDNA's published inference code, 0.0 in its training code
            and in safari.
        modulate: apply the window at all.
        fast_decay_pct, slow_decay_pct: share of max_len after which the fastest and slowest channel's window has
            fallen to decay_target.
        decay_target: see there.
        bias: bias of the input projection.
        dropout: on the gated input of each long convolution.
        phase: how the position features are computed: one complex exponential, or cosine and sine apart (HyenaDNA's
            Hugging Face port). They differ in the last bit, which three sines of frequency 10 magnify a thousandfold.
        learn_positions: the position features are parameters (safari with lr_pos_emb > 0).
        positions_lr: their own learning rate; None takes the task's.
        filter_lr: learning rate of the filter network; None takes the task's.
        filter_weight_decay: weight decay of the filter network.
        interleaved: for order > 2, filter channel d * (order - 1) + i belongs to convolution i, as in safari's and
            HyenaDNA's training code; False: channel i * d_model + d, as in the standalone code and the paper.
        bidirectional: `no` is causal. `two_sided` learns a second filter for the tokens to the right. `ring` is
            HyenaDNA's experimental option: the input is delayed by half its length on a ring of twice its length.
    """

    max_len: int = 1026
    order: int = 2
    filter_width: int = 64
    emb_dim: int = 5
    num_inner_mlps: int = 2
    sin_freq: float = 10.0
    train_freq: bool = True
    short_filter: int = 3
    shift: float = 0.05
    modulate: bool = True
    fast_decay_pct: float = 0.3
    slow_decay_pct: float = 1.5
    decay_target: float = 1e-2
    bias: bool = True
    dropout: float = 0.0
    phase: Literal["complex", "split"] = "complex"
    learn_positions: bool = False
    positions_lr: float | None = None
    filter_lr: float | None = None
    filter_weight_decay: float = 0.0
    interleaved: bool = False
    bidirectional: Literal["no", "two_sided", "ring"] = "no"

    def __post_init__(self) -> None:
        if self.emb_dim < 3 or self.emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3, got {self.emb_dim}")
        if self.order < 2:
            raise ValueError(f"order must be at least 2, got {self.order}")
        if self.max_len < 1 or self.short_filter < 1:
            raise ValueError("max_len and short_filter must be at least 1")


@dataclass
class HyenaState(State):
    """What a Hyena mixer remembers.

    Attributes:
        tail: [B, short_filter - 1, (order + 1) D] last inputs of the short convolution.
        past: of each long convolution, in the order they are applied: its inputs and what they add to later outputs.
        length: tokens consumed.
        settled: the sums for later outputs are up to date; steps that autograd follows leave them out.
    """

    tail: Tensor
    past: list[OnlineConvState]
    length: int = 0
    settled: bool = True

    @property
    def capacity(self) -> int:
        return self.past[0].history.shape[2]


class Hyena(Mixer):
    """The Hyena operator of any order, causal or two-sided. x [B, L, D] -> y [B, L, D]."""

    Config = HyenaConfig

    def __init__(self, d_model: int, config: HyenaConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.d_model = d_model
        self.config = config
        self.layer_index = layer_index
        width = (config.order + 1) * d_model
        self.in_proj = nn.Linear(d_model, width, bias=config.bias)
        self.short_filter = nn.Conv1d(width, width, config.short_filter, groups=width)
        sides = 2 if config.bidirectional == "two_sided" else 1
        self.filter = HyenaFilter(sides * (config.order - 1) * d_model, config)
        self.out_proj = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(config.dropout)
        self._kept: tuple[tuple, list[OnlineConv]] | None = None
        causal = config.bidirectional == "no"
        self.info = MixerInfo(
            layouts=frozenset({"causal"} if causal else {"full"}),
            step="linear" if causal else "none",
            needs_max_len=True,
            packing=True,
            split="channels",
        )

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix x [B, L, D].

        Packed documents are unpacked into rows of their own, since a transform cannot stop at a border.

        Raises:
            ZooError: more than max_len tokens, or packed documents together with a state.
        """
        if layout.segment is not None:
            if state is not None:
                raise ZooError("packed documents cannot continue a state: prefill each as its own row of the batch")
            rows = Rows.of(layout, x.shape[0], x.shape[1], x.device)
            return rows.scatter(self.forward(rows.gather(x), Layout(layout.kind, valid=rows.keep))[0]), None
        self._check(x.shape[1] + (state.length if isinstance(state, HyenaState) else 0), state)
        valid = None if layout.valid is None else layout.valid[..., None]  # [B, L, 1]
        if state is not None:
            assert isinstance(state, HyenaState)
            return self._continue(x, valid, state)
        if not torch.is_grad_enabled() and self.config.bidirectional == "no" and x.shape[1] > implicit_filter.CHUNK:
            return self._by_channels(x, valid), None
        two_sided = self.config.bidirectional != "no"
        v, *gates = self._project(x, valid)
        for gate, (kernel, skip) in zip([None, *reversed(gates[1:])], self.kernels(x.shape[1]), strict=True):
            v = self.dropout(v if gate is None else _mask(v * gate, valid))
            v = long_conv(v.transpose(1, 2), kernel, skip, bidirectional=two_sided).transpose(1, 2)
        gated = lambda _context, v, gate: (last_linear(self.out_proj, v * gate),)
        (y,) = in_pieces(gated, [v, gates[0]], [*self.out_proj.parameters()], self.d_model)
        return _mask(y, valid), None

    def _project(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, ...]:
        """Input of the first long convolution, and the gates x^0 .. x^(order - 2): each [B, L, D]."""
        conv = self.short_filter

        def project(context: int, x: Tensor, *valid: Tensor) -> tuple[Tensor, ...]:
            mask = valid[0] if valid else None
            u = causal_short_conv(_mask(self.in_proj(x), mask), conv.weight, conv.bias)[:, context:]
            *gates, gate, v = u.split(self.d_model, dim=-1)
            return _mask(v * gate, None if mask is None else mask[:, context:]), *gates

        params = [*self.in_proj.parameters(), *conv.parameters()]
        inputs = [x] if valid is None else [x, valid]
        return in_pieces(project, inputs, params, conv.weight.shape[0], halo=self.config.short_filter - 1)

    def _continue(self, x: Tensor, valid: Tensor | None, state: HyenaState) -> tuple[Tensor, HyenaState]:
        u, taps = _mask(self.in_proj(x), valid), self.config.short_filter
        tail = short_conv_history(u, taps, state.tail)
        u = causal_short_conv(u, self.short_filter.weight, self.short_filter.bias, state.tail.to(u.dtype))
        *gates, v = u.split(self.d_model, dim=-1)
        follow = torch.is_grad_enabled()
        steps = self._differentiable(state) if follow else self._online(state)
        past: list[OnlineConvState] = []
        for gate, step in zip(reversed(gates[1:]), steps, strict=True):
            v, after = step(_mask(v * gate, valid).transpose(1, 2))
            past.append(after)
            v = v.transpose(1, 2)
        y = _mask(self.out_proj(v * gates[0]), valid)
        return y, HyenaState(tail, past, state.length + x.shape[1], settled=not follow)

    def _online(self, state: HyenaState) -> Iterator[Callable[[Tensor], Resumed]]:
        """One function a convolution: its next inputs [B, D, n] -> outputs and state, O(log^2 L) a token."""
        for conv, past in zip(self._convolutions(state.capacity), state.past, strict=True):
            if not state.settled:
                past = conv.extend(past.history[:, :, :0], past)[1]

            def step(
                v: Tensor, conv: OnlineConv = conv, past: OnlineConvState = past
            ) -> tuple[Tensor, OnlineConvState]:
                if v.shape[2] > _PUSH:
                    return conv.extend(v, past)
                outputs = []
                for t in range(v.shape[2]):
                    y, past = conv.push(v[:, :, t], past)
                    outputs.append(y)
                return torch.stack(outputs, dim=2), past

            yield step

    def _convolutions(self, length: int) -> list[OnlineConv]:
        """The filters of *length* taps with their transforms, kept between calls while no weight changes."""
        # inference tensors count no versions, but nobody trains them either
        versions = ((p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.filter.parameters())
        key = (length, *versions)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, [OnlineConv(kernel, skip) for kernel, skip in self.kernels(length)]
        return self._kept[1]

    def _differentiable(self, state: HyenaState) -> Iterator[Callable[[Tensor], Resumed]]:
        """The same by a transform of the whole history, which autograd can follow."""
        for (kernel, skip), past in zip(self.kernels(state.capacity), state.past, strict=True):

            def step(v: Tensor, kernel: Tensor = kernel, skip: Tensor = skip, past: OnlineConvState = past) -> Resumed:
                stop = state.length + v.shape[2]
                history = past.history.clone()  # autograd needs the old values
                history[:, :, state.length : stop] = v
                y = long_conv(history[:, :, :stop], kernel[:, :stop], skip)[..., state.length :]
                return y.to(v.dtype), OnlineConvState(history, past.pending, stop, stop)

            yield step

    def train(self, mode: bool = True) -> Hyena:
        """Switch modes; filters kept for decoding are dropped."""
        self._kept = None
        return super().train(mode)

    def _by_channels(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The same for long inference, a group of channels at a time: no tensor of (order + 1) D channels is made."""
        batch, length, d = x.shape
        convolutions = self.config.order - 1
        starts = range(0, length, implicit_filter.CHUNK)
        pieces = [self.filter.hidden(start, min(start + starts.step, length)) for start in starts]
        hidden = torch.cat(pieces, dim=1)  # [filter_width, L]
        y = x.new_empty(batch, length, d)
        y[:] = 0 if self.out_proj.bias is None else self.out_proj.bias
        for group in torch.arange(d, device=x.device).split(_GROUP):
            rows = (group + d * torch.arange(self.config.order + 1, device=x.device)[:, None]).flatten()
            bias = None if self.in_proj.bias is None else self.in_proj.bias[rows]
            u = _mask(F.linear(x, self.in_proj.weight[rows], bias), valid)  # [B, L, (order + 1) G]
            u = causal_short_conv(u, self.short_filter.weight[rows], cast(Tensor, self.short_filter.bias)[rows])
            *gates, v = u.split(len(group), dim=-1)
            for i, gate in enumerate(reversed(gates[1:])):
                channels = group * convolutions + i if self.config.interleaved else group + i * d
                kernel = self.filter.taps(hidden, 0, channels)
                v = _mask(v * gate, valid).transpose(1, 2)
                v = long_conv(v, kernel, self.filter.skip[channels]).transpose(1, 2)
            v = (v * gates[0]).reshape(batch * length, len(group)).to(y.dtype)
            y.view(-1, d).addmm_(v, self.out_proj.weight[:, group].T.to(y.dtype))
        return _mask(y, valid)

    def kernels(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """(filter, skip) of each convolution in the order they are applied, for sequences of *length*."""
        convolutions = self.config.order - 1
        taps: Tensor = self.filter(length)
        skip: Tensor = self.filter.skip
        if self.config.bidirectional == "two_sided":
            half = convolutions * self.d_model
            taps = torch.cat([taps[half:, :-1].flip(-1), taps[:half]], dim=-1)
            skip = skip[:half]
        elif self.config.bidirectional == "ring":
            lags = torch.arange(1 - length, length, device=taps.device) - length // 2
            taps = F.pad(taps, (0, length))[:, lags % (2 * length)]
        if self.config.interleaved:
            return [(taps[i::convolutions], skip[i::convolutions]) for i in range(convolutions)]
        return list(zip(taps.split(self.d_model), skip.split(self.d_model), strict=True))

    def init_state(
        self, batch: int, max_len: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> HyenaState:
        if self.config.bidirectional != "no":
            super().init_state(batch, max_len, device, dtype)
        self._check(max_len)
        width = (self.config.order + 1) * self.d_model
        tail = torch.zeros(batch, self.config.short_filter - 1, width, device=device, dtype=dtype)
        work = torch.promote_types(dtype, torch.float32)  # transforms are no better in half precision
        shape, count = (batch, self.d_model, max_len), self.config.order - 1
        zeros = lambda: torch.zeros(shape, device=device, dtype=work)
        return HyenaState(tail, [OnlineConvState(zeros(), zeros()) for _ in range(count)])

    def cost(self, length: int, batch: int = 1) -> Cost:
        order, d, width = self.config.order, self.d_model, self.config.filter_width
        projections = 2 * d * d * (order + 2) + 2 * self.config.short_filter * d * (order + 1)
        transforms = 3 * (order - 1) * d * 2 * 2.5 * math.log2(2 * max(length, 2))
        network = 2 * width * (self.config.emb_dim + self.config.num_inner_mlps * width + (order - 1) * d)
        history = (order + 1) * (self.config.short_filter - 1) + 2 * (order - 1) * length
        state = 0 if self.info.step == "none" else 4 * batch * d * history
        return Cost(flops=length * (batch * (projections + transforms) + network), state_bytes=state)

    def param_groups(self) -> list[ParamGroup]:
        """The filter network without weight decay, the position features at their own rate; skip weights are usual."""
        network: ParamGroup = {"params": self.filter.network(), "weight_decay": self.config.filter_weight_decay}
        if self.config.filter_lr is not None:
            network["lr"] = self.config.filter_lr
        groups = [network]
        if self.filter.positions is not None:
            positions: ParamGroup = {"params": [self.filter.positions], "weight_decay": 0.0}
            if self.config.positions_lr is not None:
                positions["lr"] = self.config.positions_lr
            groups.append(positions)
        return groups

    def _check(self, length: int, state: State | None = None) -> None:
        if length > self.config.max_len:
            raise ZooError(
                f"the sequence has {length} tokens but the Hyena filter is defined for at most {self.config.max_len} "
                "(max_len): split the sequence or take a model with a larger max_len"
            )
        if isinstance(state, HyenaState) and length > state.capacity:
            raise ZooError(f"the state was made for {state.capacity} tokens (max_len of init_state), not for {length}")


def _mask(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [B, L, C] with zeros where valid [B, L, 1] is False: the short convolution's bias reaches into padding."""
    return x if valid is None else x.masked_fill(~valid, 0)
