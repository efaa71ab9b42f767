"""What the replays of the sequence mixers share: a checked load, gradients under official names, tiny helpers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.convert import Row, load_strict, rows_to_official, rows_to_ours
from zoo.convert.parity import Case
from zoo.errors import ZooError
from zoo.models.lm import LM
from zoo.nn.backbone import Block

M = TypeVar("M", bound=nn.Module)


def squeeze(axis: int) -> tuple:
    """(to_ours, to_official) of an official axis of length 1 that ours has not."""
    return (lambda t: t.squeeze(axis)), (lambda t: t.unsqueeze(axis))


def unsqueeze(axis: int) -> tuple:
    """(to_ours, to_official) of an axis of length 1 that only ours has."""
    return (lambda t: t.unsqueeze(axis)), (lambda t: t.squeeze(axis))


def negate(t: Tensor) -> Tensor:
    """Its own inverse."""
    return -t


def same(prefix: str, *names: str, ours: str | None = None) -> list[Row]:
    """Rows of entries that are called the same on both sides but for a prefix."""
    return [Row(prefix + name, (prefix if ours is None else ours) + name) for name in names]


def linear(official: str, ours: str, bias: bool = True) -> list[Row]:
    """Weight and bias of one linear layer or norm."""
    return [Row(f"{official}.{part}", f"{ours}.{part}") for part in (("weight", "bias") if bias else ("weight",))]


def load(module: M, rows: Iterable[Row], state: Mapping[str, Tensor], what: str) -> M:
    """Put official weights into *module*, in evaluation mode, and check that the way back gives them unchanged.

    Raises:
        ZooError: a missing, unknown or misshapen weight, or a round trip that changes one.
    """
    rows = list(rows)
    state = settled(rows, state)
    ours = rows_to_ours(rows, state, what)
    load_strict(module, ours, what)
    check_round_trip(rows_to_official(rows, module.state_dict(), what), state, what)
    return module.eval()


def settled(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give tied entries one value, the last in official order: an official load copies them one after the other.

    Only filled weights need it: a case fills each name by itself, while those of a trained model are equal.
    """
    ours = {row.official: row.ours for row in rows if row.ours is not None}
    last = {ours[name]: tensor for name, tensor in state.items() if name in ours}
    return {name: last[ours[name]] if name in ours else tensor for name, tensor in state.items()}


def check_round_trip(back: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raise ZooError unless *back* is *state*, name for name and bit for bit."""
    if set(back) != set(state):
        raise ZooError(f"{what}: the round trip changed the names {sorted(set(back) ^ set(state))[:4]}")
    for key, tensor in state.items():
        if not torch.equal(back[key].to(tensor.dtype), tensor):
            raise ZooError(f"{what}: the round trip changed '{key}'")


def gradients(module: nn.Module, rows: Iterable[Row], what: str) -> dict[str, Tensor]:
    """Gradients of all parameters as `grad.<official name>`; the linear changes of the table apply to them too."""
    found = {name: value.grad for name, value in module.named_parameters()}
    grads: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        grad = found.get(name)
        grads[name] = torch.zeros_like(value) if grad is None else grad
    return {f"grad.{name}": value for name, value in rows_to_official(rows, grads, what).items()}


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy of logits [B, L, V] (padded rows of the vocabulary included)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def given_prefill(case: Case, default: int) -> int:
    """Tokens a case prefills before it steps: its notes say "24 positions"; *default* where they do not."""
    found = re.search(r"(\d+) positions", case.meta.get("notes", ""))
    return int(found.group(1)) if found else default


@contextmanager
def block_streams(model: LM) -> Iterator[dict[str, Tensor]]:
    """Record what official blocks of the order dropout-add-norm return: `mlp<i>` and, before its sum, `residual<i>`.

    `embeddings` is what the first layer sees.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple, output: Tensor | None = None) -> None:
            value = args[0] if output is None else output
            seen[name] = value[0] if isinstance(value, tuple) else value

        return record

    handles = []
    for i, layer in enumerate(model.backbone.layers):
        assert isinstance(layer, Block)
        assert layer.norm2 is not None
        assert layer.mlp is not None
        if i == 0:
            handles.append(layer.register_forward_pre_hook(keep("embeddings")))
        handles.append(layer.norm2.register_forward_pre_hook(keep(f"residual{i}")))
        handles.append(layer.mlp.register_forward_hook(keep(f"mlp{i}")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
