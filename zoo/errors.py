"""The one exception a user is meant to read, and the nearest-name hint that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ZooError(Exception):
    """A mistake the user can mend: the message is one sentence saying what was wrong, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """


class ConfigError(ZooError):
    """A recipe, config or command-line value that does not fit its schema."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the closest of *choices*, or a short list of them when none is close."""
    known = sorted({str(choice) for choice in choices})
    lowered = {choice.lower(): choice for choice in known}
    match = get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    if match:
        return f" (did you mean '{lowered[match[0]]}'?)"
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (known: {shown})"
