"""The commands around the Hub and around runs, in this process: what they print, what they refuse."""

from __future__ import annotations

import csv
import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub.hub_server import Hub
from zoo import catalogue
from zoo.cli import completion, doctor, sweep
from zoo.cli.list import limits
from zoo.cli.main import COMMANDS, main
from zoo.errors import ZooError

Run = Callable[..., tuple[int, str, str]]

TINY = """
defaults:
  - /datamodules@data: uci_splice
  - /tokenizers@tokenizer: dna-char/tokenizer
  - _self_
model: {name: hyenadna, d_model: 8, n_layer: 1, max_len: 64, hyena: {filter_width: 8},
        head: {kind: sequence, num_outputs: 3}}
data: {batch_size: 64, limit: 256}
task: {name: classify, optim: {lr: 3.0e-3}}
trainer: {max_steps: 2, val_every: 2, log_every: 1, monitor: val/mcc, mode: max, threads: 1, accelerator: cpu}
"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(line: str, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([*shlex.split(line), *more])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


def test_a_dry_run_lists_and_sends_nothing(cli: Run, hub: Hub, saved: Path) -> None:
    status, out, _ = cli(f"push {saved} me/first --tag v1 --private --dry-run")
    assert status == 0
    pairs = [line.split() for line in out.splitlines()[1:] if len(line.split()) == 2]
    rows = {name: int(size.replace(",", "")) for name, size in pairs}
    assert rows["model.safetensors"] == (saved / "model.safetensors").stat().st_size
    assert {"config.json", "files.json", "parity.safetensors"} <= set(rows)
    assert "hyenadna -> me/first, tag v1 (private, if it is made)" in out
    assert not hub.requests


def test_push_pull_search(cli: Run, hub: Hub, saved: Path, tmp_path: Path) -> None:
    status, out, _ = cli(f"push {saved} me/first --tag v1 --message 'First of all'")
    assert status == 0
    assert out.splitlines()[0].startswith(f"{hub.address}/me/first/commit/")
    assert "zoo.load('me/first@v1')" in out
    status, out, err = cli("pull me/first@v1")
    assert status == 0
    assert "artifact    hyenadna, every file is what was saved" in out
    assert "model.safetensors  " in err
    status, out, err = cli("pull me/first@v1 --offline")
    assert (status, err) == (0, "")
    for command in ("search first", "list first --remote"):
        status, out, _ = cli(command)
        assert status == 0
        assert out.splitlines()[1].split()[:1] == ["me/first"]
    status, out, _ = cli("search first --json")
    assert json.loads(out)[0]["on_disk"] is True
    status, out, _ = cli("info me/first@v1")
    assert "artifact in the Hub cache" in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("pull me/first --offline --update", "exclude each other"),
        ("pull hyenadna-tiny-1kk", "did you mean 'hyenadna-tiny-1k'"),
        ("pull ../etc", "neither a folder, a Hub id"),
        ("push nowhere me/first", "does not exist"),
        ("push nowhere me/first/x", "no Hub id"),
        ("list --remote --task classify", "no filters"),
        ("list --task clasify", "did you mean 'classify'"),
        ("list --licence mitt", "did you mean 'mit'"),
        ("list --params x", "should read as in 1M-100M"),
        ("info me/nothing", "`zoo pull me/nothing` fetches it"),
        ("export hyenadna-tiny-1k --format onx --out x", "did you mean 'onnx'"),
        ("completion bsh", "did you mean 'bash'"),
        ("recipes validat", "did you mean 'validate'"),
        ("plot nowhere", "holds no metrics.csv"),
        ("plot nowhere --out x.gif", "must end in one of"),
        ("sweep hyenadna_uci_splice seed=0", "several values"),
        ("sweep hyenadna_uci_splice seed=int:1:8", "--trials 20"),
        ("sweep hyenadna_uci_splice seed=int:8:1 --trials 2", "the first number must be the smaller"),
        ("sweep hyenadna_uci_splice task.optim.lr=log:0:1 --trials 2", "above 0"),
        ("sweep hyenadna_uci_splice seed=int:a:b --trials 2", "with numbers"),
        ("sweep hyenadna_uci_splice seed=1 --trials 2", "something to choose"),
    ],
)
def test_mistakes_are_one_sentence(cli: Run, line: str, said: str) -> None:
    status, _, err = cli(line)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_list_filters(cli: Run) -> None:
    def names(line: str) -> set[str]:
        status, out, _ = cli(f"list {line} --json")
        assert status == 0
        return {row["name"] for row in json.loads(out)}

    entries = catalogue.ENTRIES
    assert names("--params 1M-10M hyenadna") == {
        n for n, e in entries.items() if e.model == "hyenadna" and e.params > 1e6
    }
    assert names("--licence mit") == {n for n, e in entries.items() if e.licence == "mit"}
    assert names("--task masked_lm") == {n for n, e in entries.items() if "masked_lm" in e.tasks}
    assert names("--params 500k") == {n for n, e in entries.items() if e.params <= 500_000}
    _, out, _ = cli("list dnabert2 --json")
    assert json.loads(out)[0]["verified"] == "outputs"
    assert {"context", "vocab", "licence", "on_disk"} <= set(json.loads(out)[0])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1M-100M", (1e6, 1e8)), ("-1B", (0, 1e9)), ("500k-", (5e5, float("inf"))), ("7", (0, 7)), ("1.5b", (0, 1.5e9))],
)
def test_limits(text: str, wanted: tuple[float, float]) -> None:
    assert limits(text) == wanted


def test_recipes(cli: Run, tmp_path: Path) -> None:
    assert "hyenadna_uci_splice" in cli("recipes ls uci")[1]
    assert cli("recipes ls nothing-like-that")[0] == 2
    assert cli("recipes validate hyenadna_uci_splice") == (0, "hyenadna_uci_splice: valid\n", "")
    own = tmp_path / "own.yaml"
    own.write_text(TINY.replace("max_steps", "max_step"))
    status, _, err = cli(f"recipes validate {own}")
    assert (status, "max_steps" in err) == (2, True)


def test_doctor(cli: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = cli("doctor --json")
    found = json.loads(out)
    assert found["versions"]["torch"]
    assert found["hub"]["answers"] == "yes"
    assert found["hub"]["address"] == hub.address
    assert status == (1 if found["problems"] else 0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, out, _ = cli("doctor")
    assert status == 1
    assert "problem: the Hub at http://127.0.0.1:9 does not answer" in out
    assert "not asked" in cli("doctor --offline")[1]
    monkeypatch.setattr(doctor, "version", lambda package: "2.6.2" if package == "lightning" else "")
    status, out, _ = cli("doctor --offline")
    assert "lightning 2.6.2 was a malicious release" in out
    assert "torch is not installed" in out


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["pu"], ["pull", "push"], ["plot"]),
        (["pull", "hyenadna-t"], ["hyenadna-tiny-1k"], ["titok-l32"]),
        (["info", "hyena"], ["hyenadna", "hyenadna-large-1m", "hyenadna_uci_splice"], []),
        (["train", "hyenadna_u"], ["hyenadna_uci_splice"], ["titok_digits"]),
        (["train", "hyenadna_uci_splice", "t"], ["task.", "trainer."], ["trainer.max_steps="]),
        (["train", "hyenadna_uci_splice", "trainer.max"], ["trainer.max_steps="], ["trainer.keep="]),
        (["train", "hyenadna_uci_splice", "model."], ["model.d_model=", "model.hyena."], ["model.hyena.order="]),
        (["train", "hyenadna_uci_splice", "model.hyena.o"], ["model.hyena.order="], []),
        (["sweep", "hyenadna_uci_splice", "task.optim.l"], ["task.optim.lr="], []),
        (["train", "hyenadna_uci_splice", "data.b"], ["data.batch_size="], []),
        (["pull", "--a"], ["--allow-pickle"], ["--update"]),
        (["export", "x", "--format", "t"], ["torch", "transformers"], ["onnx"]),
        (["recipes", "c"], ["cat", "cp"], ["ls"]),
        (["recipes", "cat", "titok_d"], ["titok_digits"], []),
        (["nonsense", "x"], [], ["x"]),
        (["train", "no_such_recipe", "model."], [], ["model.d_model="]),
    ],
)  # fmt: skip
def test_completion(words: list[str], some: list[str], none: list[str]) -> None:
    found = completion.candidates(words)
    assert set(some) <= set(found)
    assert not set(none) & set(found)
    assert all(word.startswith(words[-1]) for word in found)


def test_completion_scripts_run(cli: Run, tmp_path: Path) -> None:
    for shell in completion.SHELLS:
        assert "zoo completion words" in cli(f"completion {shell}")[1]
    stub = tmp_path / "zoo"
    stub.write_text("#!/bin/sh\nprintf 'pull\\npush\\n'; echo \"$@\" > " + str(tmp_path / "asked"))
    stub.chmod(0o755)
    script = cli("completion bash")[1] + '\nCOMP_WORDS=(zoo pu); COMP_CWORD=1; _zoo; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
    )
    assert done.stdout.strip() == "pull push"
    assert (tmp_path / "asked").read_text().strip() == "completion words -- pu"


def metrics(place: Path, shift: float) -> Path:
    place.mkdir(parents=True)
    with (place / "metrics.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "train/loss", "val/mcc"])
        writer.writerows([[step, 2.0 / (step + 1) + shift, step / 10 if step % 2 else ""] for step in range(8)])
    return place


def test_plot(cli: Run, tmp_path: Path) -> None:
    a, b = metrics(tmp_path / "runs" / "a", 0.0), metrics(tmp_path / "runs" / "b", 0.1)
    status, out, _ = cli(f"plot {a} {b} --metric val/mcc --metric train/loss --smooth 0.5 --out {tmp_path / 'x.svg'}")
    assert status == 0
    text = (tmp_path / "x.svg").read_text()
    assert text.count('<g id="axes_') == 2
    assert out == f"{tmp_path / 'x.svg'}: 2 runs, val/mcc, train/loss\n"
    assert "2 runs, val/mcc" in cli(f"plot {tmp_path / 'runs'} --out {tmp_path / 'x.png'}")[1]
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = cli(f"plot {a} --metric val/mc --out {tmp_path / 'y.png'}")
    assert (status, "did you mean 'val/mcc'" in err) == (2, True)
    assert not (tmp_path / "y.png").exists()


def test_sweep_of_a_grid(cli: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    status, out, _ = cli(f"sweep {recipe} seed=0,1 --out {tmp_path / 'grid'}")
    assert status == 0
    assert "2 runs in" in out
    assert {path.name for path in (tmp_path / "grid").iterdir() if path.is_dir()} == {"seed=0", "seed=1"}


def test_sweep_by_optuna(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    seen = []

    def train(name: str, overrides: list[str], out: Path) -> dict[str, float]:
        out.mkdir()
        seen.append(dict(text.split("=") for text in overrides))
        return {"val/mcc": -abs(float(seen[-1]["task.optim.lr"]) - 0.01), "val/loss": 1.0}

    monkeypatch.setattr(sweep, "_train", train)
    free = "task.optim.lr=log:1e-4:1e-1 model.d_model=8,16 model.n_layer=int:1:3"
    line = f"sweep {recipe} {free} seed=7 --out {tmp_path / 's'}"
    assert (
        "4 trials of task.optim.lr, model.d_model, model.n_layer for the max of val/mcc"
        in cli(f"{line} --trials 4 --dry-run")[1]
    )
    status, out, err = cli(f"{line} --trials 4")
    assert (status, err) == (0, "")
    assert len(seen) == 4
    for chosen in seen:
        assert 1e-4 <= float(chosen["task.optim.lr"]) <= 1e-1
        assert chosen["model.d_model"] in ("8", "16")
        assert chosen["model.n_layer"] in ("1", "2", "3")
        assert chosen["seed"] == "7"
    rows = list(csv.DictReader((tmp_path / "s" / "sweep.csv").open()))
    scores = [float(row["val/mcc"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert f"the best is {tmp_path / 's' / rows[0]['run'] / 'artifact'}" in out
    assert cli(f"{line} --trials 6")[0] == 2
    assert cli(f"{line} --trials 6 --resume")[0] == 0
    assert len(seen) == 6
    monkeypatch.setattr(sweep, "_train", lambda *args: {"val/loss": 1.0})
    assert "have no metric 'val/mcc'" in cli(f"{line} --trials 7 --resume")[2]


def test_one_trial_trains(cli: Run, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    status, out, _ = cli(f"sweep {recipe} task.optim.lr=float:1e-3:2e-3 --trials 1 --out {tmp_path / 's'}")
    assert status == 0
    assert (tmp_path / "s" / "trial000" / "artifact" / "model.safetensors").is_file()
    assert "trial000" in out


@pytest.mark.parametrize("name", ["push", "pull", "search", "list", "doctor", "completion", "plot", "sweep", "export"])
def test_commands_are_registered(name: str) -> None:
    assert COMMANDS[name][0].startswith("zoo.cli.")


def test_zoo_error_is_what_parsing_raises() -> None:
    with pytest.raises(ZooError, match="is no range"):
        sweep.numbers("float", "x", "1", "key=float:x:1")
