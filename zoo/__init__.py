"""seqzoo: a multimodal and genomic sequence model zoo. Importing `zoo` imports neither torch nor Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "load": "zoo.hub.artifact",
    "save": "zoo.hub.artifact",
    "verify": "zoo.hub.artifact",
    "push": "zoo.hub.client",
    "list_models": "zoo.catalogue",
}
__all__ = ["list_models", "load", "push", "save", "verify"]

if TYPE_CHECKING:
    from zoo.catalogue import list_models
    from zoo.hub.artifact import load, save, verify
    from zoo.hub.client import push


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'zoo' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
