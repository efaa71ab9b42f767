"""Building a model from a config that a stranger wrote: first without memory, and only as much as its file can fill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from zoo.convert.official import check_counts
from zoo.errors import ZooError
from zoo.hub.headers import read_header, values

# room for what a model makes itself (position tables, masks) beside the tensors of its file
_MORE_TENSORS, _MORE_BYTES = 2_000, 4 << 30


class _TooLarge(Exception):
    """The model under construction has outgrown its file."""


def build(cls: type[nn.Module], config: Any, weights: Path, where: str) -> nn.Module:
    """The model of *config* with its initial weights, once a copy without memory proved to fit the file *weights*.

    Raises:
        ZooError: the file's header is damaged, the config does not build, or it describes other tensors than the file
            holds; nothing of the model's size has been allocated by then. *where* names the config.
    """
    header = read_header(weights)
    check_counts(config, len(header), where)
    try:
        with torch.device("meta"), _limited(len(header), values(header)):
            planned = cls(config)
    except _TooLarge:
        raise ZooError(f"{where} describes a model far larger than {weights}, which cannot be its weights") from None
    except ZooError as error:
        raise ZooError(f"{where}: {error}") from None
    except Exception as error:
        # the types fit, the numbers may not: constructors trust their config and fail in their own ways
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ZooError(f"{where}: no model can be built from these numbers ({first})") from error
    compare(planned, {name: shape for name, (_, shape) in header.items()}, weights)
    with torch.random.fork_rng(devices=[]):  # initial weights must not disturb the caller's random numbers
        return cls(config)


def compare(model: nn.Module, stored: dict[str, tuple[int, ...]], weights: Path) -> None:
    """Raise ZooError at the first name or shape in which the weights of *model* differ from those *stored*."""
    wanted = untied(model)
    for name in [*wanted, *stored]:
        if name not in stored or name not in wanted:
            what = "lacks" if name in wanted else "holds"
            raise ZooError(f"{weights} {what} '{name}': these are not the weights of this config")
        if tuple(stored[name]) != tuple(wanted[name].shape):
            raise ZooError(
                f"{weights}: '{name}' is {list(stored[name])}, the config makes it {list(wanted[name].shape)}: "
                "these are not the weights of this config"
            )


def untied(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied tensor once, under the first of its names."""
    seen: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            kept[name] = tensor
    return kept


@contextmanager
def _limited(tensors: int, size: int) -> Iterator[None]:
    """Stop a construction when it has registered many times what a file of *tensors* and *size* bytes can fill."""
    most_parts, most_bytes = 8 * tensors + _MORE_TENSORS, 4 * size + _MORE_BYTES
    parts = held = 0

    def weigh(module: nn.Module, name: str, value: Any) -> None:
        nonlocal parts, held
        parts += 1
        if isinstance(value, Tensor):
            held += value.numel() * value.element_size()
        if parts > most_parts or held > most_bytes:
            raise _TooLarge

    handles = [
        hooks.register_module_parameter_registration_hook(weigh),
        hooks.register_module_buffer_registration_hook(weigh),
        hooks.register_module_module_registration_hook(weigh),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
