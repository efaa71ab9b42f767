"""Every command and code block of the READMEs runs."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Zoo = Callable[..., tuple[int, str, str]]


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w[^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_commands_run(root: Path, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five verbs in their order, with two training steps each."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sequences.fa").write_text(">one\nACGTTGCAACGTACGTTTGCAACGTACGGT\n")
    commands = [
        line for kind, code in blocks((root / "README.md").read_text()) if kind == "sh" for line in code.splitlines()
    ]
    assert [line.split()[1] for line in commands] == ["train", "eval", "predict", "verify", "finetune"]
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] in ("train", "finetune"):
            words = [word for word in words if not word.startswith("trainer.max_steps")]
            words += ["trainer.max_steps=2", "trainer.max_epochs=-1", "data.limit=64"]
        status, _, err = zoo(*words)
        assert status == 0, f"{line}: {err}"


def test_the_python_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = [code for kind, code in blocks((root / "README.md").read_text()) if kind == "python"]
    assert len(found) == 1
    names: dict[str, object] = {}
    exec(compile(found[0], "README.md", "exec"), names)
    assert list(names["logits"].shape) == [2, 9, 16]  # type: ignore[attr-defined]


def test_commands_named_in_the_text_parse(root: Path) -> None:
    """`zoo ...` in backticks, with placeholders as they stand."""
    import importlib

    from zoo.cli.main import COMMANDS

    files = [root / "README.md", *(root / name / "README.md" for name in ("recipes", "model_cards"))]
    text = "\n".join(file.read_text() for file in files)
    found = [" ".join(item.split()) for item in re.findall(r"`(zoo [^`]+)`", text)]
    assert len(found) > 5
    for line in found:
        words = shlex.split(line)[1:]
        assert words[0] in (*COMMANDS, "COMMAND"), line
        if len(words) > 1 and words[0] in COMMANDS:
            importlib.import_module(COMMANDS[words[0]][0]).parser().parse(words[1:])


def test_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = [
        line
        for kind, code in blocks((root / "README.md").read_text())
        if kind == "sh make"
        for line in code.split("\n")
    ]
    assert [line.split()[1] for line in named if line] == ["demo", "test"]
    assert {"demo", "test"} <= targets
    assert "make test" in (root / ".ci" / "run").read_text()
    assert shutil.which("make") is None or (root / "Makefile").is_file()


def test_folders_of_the_layout_exist(root: Path) -> None:
    table = (root / "README.md").read_text().split("## Layout")[1].split("##")[0]
    for name in re.findall(r"`([a-z_]+)/`", table):
        assert (root / name).is_dir(), name
