"""Sweeps as jobs: submitit's local executor for real, SLURM as far as its scripts, Ray where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli.launch import Job, launch
from zoo.errors import ZooError

Zoo = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_a_grid_of_submitit_jobs(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    out = tmp_path / "grid"
    status, text, err = zoo("sweep", tiny, "seed=0,1", "trainer.max_steps=2", "--launcher", "submitit", "--out", out)
    assert status == 0, err
    assert (out / "seed=0" / "artifact").is_dir()
    assert (out / "seed=1" / "artifact").is_dir()
    assert (out / "sweep.txt").read_text().strip() in text
    assert "2 runs in" in text
    assert list((out / "jobs").glob("*_log.out"))
    alone = tmp_path / "alone"
    assert zoo("train", tiny, "seed=1", "trainer.max_steps=2", "--out", alone)[0] == 0
    weights = "artifact/model.safetensors"
    assert (out / "seed=1" / weights).read_bytes() == (alone / weights).read_bytes(), "the same as without a launcher"
    status, _, err = zoo("sweep", tiny, "seed=0,1", "--launcher", "submitit", "--out", out)
    assert status == 2
    assert "exists: go on with --resume" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_job_that_fails_is_named_and_the_others_go_on(zoo: Zoo, tiny: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip(name)
    out = tmp_path / "grid"
    status, text, err = zoo(
        "sweep", tiny, "data.limit=256,257", "trainer.max_steps=1", "init=null,nothing_of_that_name",
        "--launcher", name, "--parallel", "2", "--out", out,
    )  # fmt: skip
    assert status == 1
    assert "2 runs in" in text
    assert err.count("nothing_of_that_name: ") == 2
    assert "Traceback" not in err


@pytest.mark.slow
def test_trials_of_optuna_as_jobs(zoo: Zoo, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    pytest.importorskip("optuna")
    out = tmp_path / "trials"
    status, text, err = zoo(
        "sweep", tiny, "task.optim.lr=log:1e-4:1e-2", "trainer.max_steps=1", "--trials", "2",
        "--launcher", "submitit", "--parallel", "2", "--out", out,
    )  # fmt: skip
    assert status == 0, err
    assert "2 runs in" in text
    assert (out / "trial001" / "artifact").is_dir()


def job(tmp_path: Path) -> dict[str, Job]:
    return {"a": Job({}, str(tmp_path / "a"))}


def test_what_a_job_may_ask_for(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    for settings, complaint in (
        (["gpus"], "--job takes key=value, got 'gpus'"),
        (["cluster=slum"], r"unknown cluster 'slum' \(did you mean 'slurm'"),
        (["gpus_pernode=1"], "submitit does not take what --job says: .*gpus_pernode"),
    ):
        with pytest.raises(ZooError, match=complaint):
            launch("submitit", job(tmp_path), tmp_path, 1, settings)
    with pytest.raises(ZooError, match="--parallel must be at least 1"):
        launch("submitit", job(tmp_path), tmp_path, 0, [])


@pytest.mark.skipif(bool(shutil.which("srun")), reason="this machine has SLURM")
def test_no_slurm_here(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ZooError, match="submitit finds no SLURM here"):
        launch("submitit", job(tmp_path), tmp_path, 1, ["cluster=slurm"])


def test_the_script_that_slurm_would_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for sbatch keeps the script: one array of the asked size, with what --job says."""
    pytest.importorskip("submitit")
    for name, body in (("srun", ""), ("scancel", ""), ("sacct", "echo 'JobID|State'; echo '7_0|FAILED'"),
                       ("sbatch", f"cp \"$1\" {tmp_path}/script.sh; echo Submitted batch job 7")):  # fmt: skip
        file = tmp_path / name
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{__import__('os').environ['PATH']}")
    monkeypatch.setattr("zoo.cli.launch.POLL", 0)
    jobs = {name: Job({}, str(tmp_path / name)) for name in ("a", "b", "c")}

    class Seen(Exception):
        pass

    def seen(job: object) -> bool:
        raise Seen

    monkeypatch.setattr("submitit.SlurmJob.done", seen)
    with pytest.raises(Seen):
        launch("submitit", jobs, tmp_path, 2, ["cluster=slurm", "slurm_partition=gpu", "gpus_per_node=1"])
    script = (tmp_path / "script.sh").read_text()
    for line in (
        "#SBATCH --array=0-2%2",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=1",
        "#SBATCH --job-name=zoo",
    ):
        assert line in script


def test_a_preempted_job_comes_back_resumed(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    again = Job({"x": 1}, "somewhere").checkpoint()
    assert again.function == Job({"x": 1}, "somewhere", resume=True)


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_launcher_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ZooError, match=rf"needs {name}, which is not installed: pip install 'seqzoo\[{name}\]'"):
        launch(name, job(tmp_path), tmp_path, 1, [])
