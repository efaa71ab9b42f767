"""Every committed parity case is replayed; a missing output or one outside its tolerance fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.convert.parity import replay_case

CASES = sorted(path.parent for path in (Path(__file__).parent / "cases").rglob("case.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_official_numbers(case: Path) -> None:
    result = replay_case(case)
    if result.skipped:
        pytest.skip(result.skipped)
    assert not result.problem, result.problem
    failed = [f"{c.name}: {c.problem or f'{c.ratio:.2f} x tolerance'}" for c in result.checks if not c.passed]
    assert result.checks
    assert not failed, "; ".join(failed)
