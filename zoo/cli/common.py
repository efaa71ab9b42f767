"""What the commands share: the argument parser, tables, paths. Imports nothing heavy."""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zoo.errors import ZooError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are `ZooError` sentences, and whose positionals may stand among the options."""

    def __init__(self, command: str, text: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=f"zoo {command}",
            description=text,
            epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ZooError(f"{message} (`{self.prog} --help` shows what it takes)")

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The parsed arguments.

        Raises:
            ZooError: a missing, unknown (with the nearest known one) or ill-typed argument.
        """
        known, unknown = self.parse_known_intermixed_args(_shield(arguments, self))
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            hint = nearest(unknown[0].split("=")[0], flags) if unknown[0].startswith("-") else ""
            raise ZooError(f"{self.prog} does not take '{unknown[0]}'{hint}")
        return known

    def add_overrides(self) -> None:
        """`key=value ...` after the recipe."""
        self.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="changes, as in trainer.max_steps=100"
        )


def _shield(arguments: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Refuse single-dash words that argparse would split into letters (`-out`)."""
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for word in arguments:
        if re.fullmatch(r"-[A-Za-z]\w+", word) and word not in flags and "-" + word in flags:
            raise ZooError(f"{parser.prog} does not take '{word}' (did you mean '-{word}'?)")
    return arguments


def table(rows: Sequence[Sequence[Any]], header: Sequence[str], right: Iterable[int] = ()) -> str:
    """Aligned plain-text columns; those in *right* are flushed right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    flush = set(right)
    lines = []
    for row in cells:
        padded = [cell.rjust(width[i]) if i in flush else cell.ljust(width[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def short(number: int | float) -> str:
    """436,000 -> 436k, 6,550,000 -> 6.55M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def print_json(value: Any) -> None:
    """JSON on stdout."""
    json.dump(value, sys.stdout, indent=2)
    print()


def existing_file(path: str, what: str) -> Path:
    """*path* as a file that exists.

    Raises:
        ZooError: it does not, or is a folder.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        raise ZooError(f"{what} '{path}' is a folder, not a file")
    if not found.is_file():
        near = nearest(found.name, [p.name for p in found.parent.iterdir()]) if found.parent.is_dir() else ""
        raise ZooError(f"{what} '{path}' does not exist" + (near if "did you mean" in near else ""))
    return found


def write_rows(rows: Iterable[Sequence[Any]], header: Sequence[str], out: str | None) -> None:
    """Tab- or comma-separated rows to stdout, or to the file *out*, which appears only when complete."""
    separator = "," if out and out.endswith(".csv") else "\t"
    if out is None:
        _write(sys.stdout, rows, header, separator)
        return
    target = Path(out).expanduser()
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            _write(stream, rows, header, separator)
        temporary.replace(target)
    except OSError as error:
        raise ZooError(f"cannot write '{out}': {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write(stream: Any, rows: Iterable[Sequence[Any]], header: Sequence[str], separator: str) -> None:
    writer = csv.writer(stream, delimiter=separator, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
