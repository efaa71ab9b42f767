"""Strict two-way renaming of state-dict keys by a table of templates, the core of most converters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from zoo.errors import ZooError, nearest

State = Mapping[str, Tensor]


class Renames:
    """Pairs `("theirs.{}.weight", "ours.{}.weight")`; each `{}` stands for one dot-free piece, in the same order.

    A template that ends in `*` renames everything below it. The first template that fits a key is used.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self.pairs = list(pairs)
        self._forward = [(_pattern(a), _template(b)) for a, b in pairs]
        self._backward = [(_pattern(b), _template(a)) for a, b in pairs]

    def to_zoo(self, state: State) -> dict[str, Tensor]:
        """Official keys -> ours.

        Raises:
            ZooError: a key that no template covers, or two keys that would get one name.
        """
        return _apply(self._forward, state, [a for a, _ in self.pairs])

    def to_official(self, state: State) -> dict[str, Tensor]:
        """Our keys -> the official ones; raises like `to_zoo`."""
        return _apply(self._backward, state, [b for _, b in self.pairs])

    def name(self, official: str) -> str:
        """Our name of the module or key *official*.

        Raises:
            ZooError: no template covers it.
        """
        return next(iter(_apply(self._forward, {official: None}, [a for a, _ in self.pairs])))  # type: ignore[dict-item]


def below(prefix: str, zoo_prefix: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The templates *pairs* moved under a prefix on either side."""
    return [(prefix + a, zoo_prefix + b) for a, b in pairs]


def fuse(state: dict[str, Tensor], parts: Sequence[str], whole: str) -> None:
    """Replace the rows *parts* (key suffix-complete names) by one stacked tensor *whole*, in place; all must exist."""
    import torch

    state[whole] = torch.cat([state.pop(part) for part in parts])


def split(state: dict[str, Tensor], whole: str, parts: Sequence[str]) -> None:
    """The inverse of `fuse` for equal parts."""
    state.update(zip(parts, (piece.contiguous() for piece in state.pop(whole).chunk(len(parts))), strict=True))


def count_layers(state: State, prefix: str) -> int:
    """Number of distinct layer indices in keys `<prefix><index>.<...>`."""
    return len({key.removeprefix(prefix).split(".", 1)[0] for key in state if key.startswith(prefix)})


def check_round_trip(official: State, back: State) -> None:
    """Raise ZooError unless *back* holds exactly the keys and values of *official*."""
    import torch

    missing, extra = set(official) - set(back), set(back) - set(official)
    if missing or extra:
        raise ZooError(f"conversion does not round-trip: missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}")
    for name, value in official.items():
        if value.device.type != "meta" and not torch.equal(value, back[name]):
            raise ZooError(f"conversion does not round-trip: '{name}' differs")


def _pattern(template: str) -> re.Pattern[str]:
    body = re.escape(template).replace(r"\{\}", r"([^.]+)").replace(r"\*", r"(.+)")
    return re.compile(body)


def _template(template: str) -> str:
    return template.replace("*", "{}")


def _apply(rules: list[tuple[re.Pattern[str], str]], state: State, known: list[str]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, template in rules:
            match = pattern.fullmatch(key)
            if match:
                name = template.format(*match.groups())
                break
        else:
            raise ZooError(f"no rule for the state-dict key '{key}'{nearest(key, known)}")
        if name in out:
            raise ZooError(f"two state-dict keys would both become '{name}'")
        out[name] = value
    return out
