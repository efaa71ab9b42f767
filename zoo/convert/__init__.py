"""Official weights and configs <-> ours: one module a family, each a bijection of names and values.

A converter is a table of rows, one for each official state-dict entry. Both directions read the same table, so they
cannot drift apart, and a key that no row names is an error in either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, nearest


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Row:
    """One official entry.

    Attributes:
        official: its name there.
        ours: its name here; None for a buffer that we recompute.
        to_ours, to_official: change of shape, inverse to each other.
        value: the recomputed tensor, in official shape, where `ours` is None.
        optional: official files may leave it out.
        first: where several official names hold one tensor: this is the one that is read; the others must equal it.
    """

    official: str
    ours: str | None
    to_ours: Callable[[Tensor], Tensor] = _same
    to_official: Callable[[Tensor], Tensor] = _same
    value: Callable[[], Tensor] | None = None
    optional: bool = False
    first: bool = True


def rows_to_ours(rows: Iterable[Row], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Apply the table to an official state dict.

    Raises:
        ZooError: a missing or unknown key, aliases of one tensor that differ, or a stored buffer that is not the one
            the config implies.
    """
    rows = list(rows)
    known = {row.official: row for row in rows}
    for key in state:
        if key not in known:
            raise ZooError(f"{what}: unknown weight '{key}'" + nearest(key, known))
    ours: dict[str, Tensor] = {}
    for row in sorted(rows, key=lambda row: not row.first):
        if row.official not in state:
            if row.optional:
                continue
            raise ZooError(f"{what}: the weight '{row.official}' is missing")
        tensor = state[row.official]
        if row.ours is None:
            _check_value(row, tensor, what)
        elif row.ours in ours:
            if not tensor.is_meta and not torch.equal(row.to_ours(tensor), ours[row.ours]):
                raise ZooError(f"{what}: '{row.official}' differs from the weight it is tied to")
        else:
            ours[row.ours] = row.to_ours(tensor)
    return ours


def rows_to_official(rows: Iterable[Row], state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The inverse: an official state dict in the order of the table.

    Raises:
        ZooError: a missing or unknown key of ours.
    """
    official: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in rows:
        if row.ours is None:
            assert row.value is not None
            official[row.official] = row.value().clone()
            continue
        if row.ours not in state:
            raise ZooError(f"{what}: the weight '{row.ours}' is missing")
        used.add(row.ours)
        tensor = row.to_official(state[row.ours])
        official[row.official] = tensor if row.first else tensor.clone()  # safetensors refuses shared memory
    for key in state:
        if key not in used:
            raise ZooError(f"{what}: unknown weight '{key}'" + nearest(key, used))
    return official


def _check_value(row: Row, tensor: Tensor, what: str) -> None:
    assert row.value is not None
    if tensor.is_meta:
        return
    expected = row.value()
    limit = 1e-4 if tensor.dtype in (torch.float32, torch.float64) else 1e-1  # half precision rounds times up to 15
    if tensor.shape != expected.shape or float((tensor.float() - expected.float()).abs().max()) > limit:
        raise ZooError(
            f"{what}: the stored buffer '{row.official}' {list(tensor.shape)} is not the one its config implies "
            f"{list(expected.shape)}"
        )


def load_strict(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load *state* into *model* with every key and shape equal; takes the tensors themselves on the meta device.

    Raises:
        ZooError: naming the first key that is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    for key, tensor in wanted.items():
        if key not in state:
            raise ZooError(f"{what}: the weight '{key}' is missing" + nearest(key, state))
        if state[key].shape != tensor.shape:
            raise ZooError(
                f"{what}: the weight '{key}' has shape {list(state[key].shape)} where the config makes it "
                f"{list(tensor.shape)}"
            )
    for key in state:
        if key not in wanted:
            raise ZooError(f"{what}: unknown weight '{key}'" + nearest(key, wanted))
    meta = any(tensor.is_meta for tensor in wanted.values())
    model.load_state_dict(dict(state), strict=True, assign=meta)
