"""The results of parity cases as a page of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.convert.parity import CaseResult

HEAD = """# What is verified

Made by `zoo verify --all --table docs/verification.md`. A case holds what the official implementation computed, with
weights filled by a fixed rule; ours is built from the official config, takes the official state dict, and every number
is compared. An error of 1.000 tolerances would be the limit.
"""


def markdown(results: list[CaseResult]) -> str:
    """One row a case with its worst output, then one row for every output."""
    cases = _header("family", "case", "outputs", "worst output", "its largest error", "in tolerances")
    outputs = _header("family", "case", "output", "largest error", "in tolerances")
    for result in results:
        name, worst = Path(result.path).name, result.worst
        if worst is None or result.skipped or result.problem:
            cases.append(_row(result.system, name, len(result.checks), result.skipped or result.problem, "", ""))
            continue
        numbers = f"{worst.error:.1e}", f"{worst.ratio:.3f}"
        cases.append(_row(result.system, name, len(result.checks), worst.name, *numbers))
        for check in result.checks:
            error = check.problem or f"{check.error:.1e}"
            outputs.append(_row(result.system, name, check.name, error, f"{check.ratio:.3f}"))
    skipped = sum(bool(result.skipped) for result in results)
    passed = sum(result.passed for result in results) - skipped
    compared = sum(len(result.checks) for result in results)
    counts = f"{passed} of {len(results)} cases pass and {compared:,} outputs were compared"
    counts += f"; {skipped} could not run for want of weights." if skipped else "."
    return "\n".join([HEAD, counts, "", *cases, "", "## Every output", "", *outputs, ""])


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"
