"""The command line: help, listings, exit statuses, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli.main import COMMANDS

Zoo = Callable[..., tuple[int, str, str]]
COMMAND = [sys.executable, "-m", "zoo.cli.main"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["list", "--json"], ["train", "--help"], ["recipes", "ls"]]
)
def test_answers_at_once(arguments: list[str]) -> None:
    """Under half a second of processor time, the best of three."""
    code = (
        "import sys, time\nfrom zoo.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'pytorch_lightning', 'pydantic', 'hydra'} & set(sys.modules), 'heavy'\n"
        "print(time.process_time(), file=sys.stderr)"
    )
    spent = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        spent.append(float(done.stderr.split()[-1]))
    assert min(spent) < 0.5


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_has_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from zoo.cli.main import main

    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^  (zoo {name}.*)$", text.split("examples:")[1], re.MULTILINE)
    assert 2 <= len(examples) <= 5


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_examples_parse(name: str) -> None:
    """Every example of every help is accepted by the command's own parser."""
    import importlib
    import shlex

    parser = importlib.import_module(COMMANDS[name][0]).parser()
    for line in str(parser.epilog).splitlines()[1:]:
        words = shlex.split(line)
        assert words[:2] == ["zoo", name]
        parser.parse(words[2:])


def test_no_arguments_show_the_help(zoo: Zoo) -> None:
    assert zoo() == zoo("--help") == zoo("help")
    status, out, _ = zoo("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert zoo("--version")[1].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["list", "--jsn"], "did you mean '--json'?"),
        (["list", "hyenadan"], "no model matches 'hyenadan' (did you mean 'hyenadna'?)"),
        (["info", "hyenadna-tiny-2k"], "nothing is called 'hyenadna-tiny-2k' (did you mean 'hyenadna-tiny-1k'?)"),
        (["train"], "required: RECIPE"),
        (["train", "hyenadna_specis5"], "unknown recipe 'hyenadna_specis5' (did you mean 'hyenadna_species5'?)"),
        (["train", "hyenadna_species5", "trainer.max_step=3"], "'trainer.max_step' (did you mean 'max_steps'?)"),
        (["train", "hyenadna_species5", "trainer.max_steps=ten"], "valid integer, got 'ten'"),
        (["train", "hyenadna_species5", "model.name=hyena"], "unknown model name 'hyena' (did you mean 'hyenadna'?)"),
        (["train", "hyenadna_species5", "data=species"], "unknown data 'species' (did you mean 'species5'?)"),
        (["train", "titok_emoji64", "data.train.path=x"], "'data.train.path=x' goes into a list, whose items are"),
        (["train", "hyenadna_species5", "-m"], "lists several values"),
        (["train", "hyenadna_species5", "-out", "x"], "(did you mean '--out'?)"),
        (["validate", "nothing.yaml"], "unknown recipe 'nothing.yaml'"),
        (["finetune", "hyenadna_species5"], "required: --from"),
        (["finetune", "hyenadna_species5", "--from", "hyenadna-tiny-1kk"], "did you mean 'hyenadna-tiny-1k'?"),
        (
            ["finetune", "hyenadna_species5", "--from", "no/such/folder"],
            "artifact folder 'no/such/folder' does not exist",
        ),
        (["eval", "hyenadna-tiny-1k", "--data", "uci_splic"], "did you mean 'uci_splice'?"),
        (["eval", "hyenadna-tiny-1k", "--data", "uci_splice", "--split", "tset"], "did you mean 'test'?"),
        (["eval", "hyenadna-tiny-1k", "--data", "uci_splice", "batchsize=3"], "did you mean 'batch_size'?"),
        (["predict", "hyenadna-tiny-1k"], "--fasta --csv --image is required"),
        (["predict", "hyenadna-tiny-1k", "--fasta", "nothing.fa"], "FASTA file 'nothing.fa' does not exist"),
        (["verify"], "needs a case, an artifact"),
        (["verify", "no/such/folder"], "does not exist"),
        (["convert", "nothing.ckpt", "--out", "x"], "weight file 'nothing.ckpt' does not exist"),
        (["recipes", "lst"], "did you mean 'ls'?"),
        (["recipes", "cat"], "needs the name of a recipe"),
        (["recipes", "cat", "hyenadna_specis5"], "did you mean 'hyenadna_species5'?"),
        (["quickstart", "--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_mistakes(
    zoo: Zoo, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = zoo(*arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1, "one sentence"
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_list_for_machines(zoo: Zoo) -> None:
    rows = json.loads(zoo("list", "--json")[1])
    assert {"name", "params", "context", "vocab", "licence", "tasks", "on_disk"} <= set(rows[0])
    assert len(json.loads(zoo("list", "tiny-1k", "--json")[1])) < len(rows)


def test_list_says_what_is_in_the_cache(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert not any(row["on_disk"] for row in json.loads(zoo("list", "--json")[1]))
    snapshot = tmp_path / "models--LongSafari--hyenadna-tiny-1k-seqlen" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    found = {row["name"]: row["on_disk"] for row in json.loads(zoo("list", "--json")[1])}
    assert found["hyenadna-tiny-1k"]
    assert not found["hyenadna-small-32k"]


@pytest.mark.parametrize(
    "name", ["hyenadna-tiny-1k", "hyenadna", "hyena", "classify", "uci_splice", "dna-char", "hyenadna_species5"]
)
def test_info_knows_everything(zoo: Zoo, name: str) -> None:
    status, out, _ = zoo("info", name)
    assert status == 0
    assert out.startswith(f"{name}: ")
    assert json.loads(zoo("info", name, "--json")[1])["kind"]


def test_recipes_cat_and_copy(zoo: Zoo, root: Path, tmp_path: Path) -> None:
    text = (root / "recipes" / "hyenadna_species5.yaml").read_text()
    assert zoo("recipes", "cat", "hyenadna_species5")[1] == text
    copy = tmp_path / "my.yaml"
    assert zoo("recipes", "cp", "hyenadna_species5", copy)[0] == 0
    assert copy.read_text() == text
    assert zoo("validate", copy)[0] == 0
    status, _, err = zoo("recipes", "cp", "hyenadna_species5", copy)
    assert (status, "exists" in err) == (2, True)
    assert zoo("recipes", "cp", "hyenadna_species5", tmp_path / "my.txt")[0] == 2
    assert "hyenadna_species5" in zoo("recipes", "ls")[1]


def test_validate_shows_the_whole_recipe(zoo: Zoo) -> None:
    status, out, _ = zoo("validate", "hyenadna_species5", "seed=5", "--json")
    assert status == 0
    recipe = json.loads(out)
    assert recipe["seed"] == 5
    assert recipe["trainer"]["grad_clip"] == 1.0


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import zoo.cli.list as command
    from zoo.cli.main import main

    monkeypatch.setattr(command, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in `zoo list | head -0`: quiet, whatever is still to be printed."""
    code = "import sys; from zoo.cli.main import main; sys.stdin.readline(); sys.exit(main(['list']))"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


def test_interrupt_is_clean(tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a training: one line, status 130, and the run can be resumed."""
    out = tmp_path / "run"
    endless = ["trainer.max_steps=100000", "trainer.val_every=100000", "trainer.checkpoint_every=5"]
    command = [*COMMAND, "train", str(tiny), *endless, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        for _ in range(600):
            if list((out / "checkpoints").glob("*.ckpt")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        status = process.wait(timeout=60)
    text = (tmp_path / "log").read_text()
    assert status == 130, text
    assert "Traceback" not in text
    assert text.rstrip().endswith("interrupted")
    assert not (out / "artifact").exists()


def test_verify_writes_its_table(zoo: Zoo, root: Path, tmp_path: Path) -> None:
    page = tmp_path / "verification.md"
    status, _, err = zoo("verify", root / "tests/parity/cases/hyena", "--table", page)
    assert status == 0, err
    text = page.read_text()
    assert "2 of 2 cases pass" in text
    assert "| hyena | dev-op2 | 13 |" in text
    status, _, err = zoo("verify")
    assert status == 2
    assert "--all" in err
