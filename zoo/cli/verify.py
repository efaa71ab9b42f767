"""`zoo verify`: replay parity cases, or an artifact's own, and compare number for number."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser, print_json
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.convert.parity import CaseResult


def parser() -> Parser:
    command = Parser(
        "verify",
        "Replay parity cases (folders with case.json, at any depth) or artifacts. One line a case: outputs checked\n"
        "and the worst of them, with its largest error and that error in units of the tolerance (1 is the limit).\n"
        "Exit status: 0 all passed, 1 some numbers differ, 2 bad input, to which a damaged artifact belongs.",
        [
            "zoo verify tests/parity/cases",
            "zoo verify tests/parity/cases/hyenadna --verbose",
            "zoo verify runs/hyenadna_uci_splice/artifact",
            "zoo verify user/model@v1 --json",
            "zoo verify --all --table docs/verification.md",
        ],
    )
    command.add_argument("paths", nargs="*", metavar="PATH|REF", help="case, folder above cases, artifact, or Hub id")
    command.add_argument("--all", action="store_true", help="all cases of this checkout (tests/parity/cases)")
    command.add_argument("--table", metavar="FILE", help="write every output and its largest error as Markdown too")
    command.add_argument("--verbose", action="store_true", help="one line for each output")
    command.add_argument("--json", action="store_true", help="for machines")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.cli.finetune import check_ref

    if args.all:
        args.paths = [*args.paths, str(_checkout_cases())]
    if not args.paths:
        raise ZooError("zoo verify needs a case, an artifact or a Hub id, or --all for the cases of this checkout")
    for path in args.paths:
        check_ref(path)
    began = time.monotonic()
    results = []
    for result in _results(args.paths):
        results.append(result)
        if not args.json:
            print(line(result), flush=True)
            if args.verbose:
                print("\n".join(_output_lines(result)), flush=True)
    if args.table:
        from zoo.cli.verification_table import markdown
        from zoo.train.checkpoint_io import write_atomic, write_text

        write_atomic(Path(args.table), lambda file: write_text(file, markdown(results)))
    failed = sum(not result.passed for result in results)
    if args.json:
        print_json([as_dict(result) for result in results])
    else:
        print(_summary(results, failed, time.monotonic() - began))
    if any(result.system == "artifact" and result.problem for result in results):
        return 2
    return 1 if failed else 0


def _results(paths: list[str]) -> Iterator[CaseResult]:
    """Everything that can be wrong with the arguments is found before the first case runs."""
    from zoo.convert.parity import find_cases, replay_all

    cases: list[Path] = []
    artifacts: list[str] = []
    for text in paths:
        path = Path(text).expanduser()
        if path.is_file() and path.name == "case.json":
            path = path.parent
        if not path.exists() or (path / "files.json").is_file() or (path / "model.safetensors").is_file():
            artifacts.append(text)
        else:
            cases += [case for case in find_cases([path]) if case not in cases]
    for text in artifacts:
        yield _artifact(text)
    yield from replay_all(cases)


def _artifact(ref: str) -> CaseResult:
    from zoo.convert.parity import CaseResult
    from zoo.hub import artifact, files

    path = Path(ref).expanduser()
    if not path.exists():
        loaded = artifact.load(ref)
        path = loaded.path
        if not (path / files.PARITY).is_file():
            raise ZooError(f"'{ref}' holds official weights without outputs of their own; they loaded strictly")
    elif not path.is_dir():
        raise ZooError(f"'{ref}' is a file, neither an artifact nor a folder of cases")
    try:
        checks = artifact.verify(path)
    except ZooError as error:  # told as its line among the others
        return CaseResult(ref, "artifact", [], problem=str(error))
    return CaseResult(ref, "artifact", checks)


def _checkout_cases() -> Path:
    from zoo._resources import root

    cases = root() / "tests" / "parity" / "cases"
    if not cases.is_dir():
        raise ZooError("--all replays the cases of a checkout, and this zoo is installed without one: name a folder")
    return cases


def line(result: CaseResult) -> str:
    """`PASS system/case  9 outputs, worst hidden_2 1.2e-06 (0.08 of tolerance)`."""
    name = result.path if result.system == "artifact" else f"{result.system}/{Path(result.path).name}"
    if result.skipped:
        return f"SKIP {name}  {result.skipped}"
    status = "PASS" if result.passed else "FAIL"
    if result.problem:
        return f"{status} {name}  {result.problem}"
    worst = result.worst
    if worst is None:
        return f"{status} {name}  no outputs to compare"
    found = worst.problem or f"{worst.error:.2e} ({worst.ratio:.3f} of tolerance)"
    wrong = [check for check in result.checks if not check.passed]
    failing = f", {len(wrong)} failed" if wrong else ""
    return f"{status} {name}  {len(result.checks)} outputs{failing}, worst {worst.name} {found}"


def _output_lines(result: CaseResult) -> list[str]:
    return [
        f"     {'ok  ' if check.passed else 'FAIL'} {check.name}  "
        + (check.problem or f"{check.error:.2e} ({check.ratio:.3f} of tolerance)")
        for check in result.checks
    ]


def _summary(results: list[CaseResult], failed: int, seconds: float) -> str:
    skipped = sum(bool(result.skipped) for result in results)
    outputs = sum(len(result.checks) for result in results)
    parts = [f"{len(results) - failed - skipped} passed"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{skipped} skipped"] if skipped else []
    return f"{', '.join(parts)} of {len(results)} cases, {outputs} outputs compared in {seconds:.1f} s"


def as_dict(result: CaseResult) -> dict[str, Any]:
    """A result for --json; infinite errors become null, which JSON has no number for."""

    def number(value: float) -> float | None:
        return value if value < float("inf") else None

    return {
        "path": result.path,
        "system": result.system,
        "passed": result.passed,
        "skipped": result.skipped or None,
        "problem": result.problem or None,
        "outputs": [
            {
                "name": check.name,
                "passed": check.passed,
                "error": number(check.error),
                "ratio": number(check.ratio),
                "problem": check.problem or None,
            }
            for check in result.checks
        ],
    }
