"""Every block of the documentation runs, at a size of seconds; those of a kind in `READ` are only read."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli.main import COMMANDS

Zoo = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted(page for page in (ROOT / "docs").rglob("*.md") if not page.is_symlink())
READ = ("sh gpu", "sh hub", "sh page", "sh cluster")  # what needs a GPU, the Hub, a browser, or a scheduler
SHORT = ["trainer.max_steps=2", "trainer.max_epochs=-1"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, code) of each fenced block, with continued lines joined."""
    found = re.findall(r"^```(\w[^\n]*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [(kind, code.replace("\\\n", " ")) for kind, code in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_blocks_run_in_their_order(page: Path, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("tests", "datamodules"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    names: dict[str, object] = {}
    for kind, code in blocks(page):
        if kind == "python":
            exec(compile(code, str(page), "exec"), names)
        elif kind == "sh":
            for line in code.splitlines():
                run(zoo, line)
        else:
            assert kind in (*READ, "sh pip", "text", "yaml"), f"{page}: a block of kind '{kind}'"


def run(zoo: Zoo, line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    assert words[0] == "zoo", line
    words = words[1:]
    if words[0] in ("train", "finetune") and "--dry-run" not in words:
        words = [word for word in words if not word.startswith("trainer.max_")] + SHORT
    status, _, err = zoo(*words)
    assert status == 0, f"{line}: {err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_commands_that_do_not_run_here_parse(page: Path) -> None:
    text = page.read_text()
    lines = [line for kind, code in blocks(page) if kind in READ for line in code.splitlines()]
    lines = [
        re.sub(r".*?(?:^|\s)(?=zoo [a-z])", "", line, count=1) for line in lines if re.search(r"(^|\s)zoo [a-z]", line)
    ]
    lines += [" ".join(item.split()) for item in re.findall(r"(?<!`)`(zoo [a-z][^`]*)`", text)]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert words[0] in COMMANDS, f"{page}: {line}"
        if len(words) > 1:
            importlib.import_module(COMMANDS[words[0]][0]).parser().parse(words[1:])


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert str(page.relative_to(ROOT / "docs")) in nav, page
