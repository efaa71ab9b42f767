"""Runs of a sweep as jobs: on this machine or a SLURM cluster by submitit, on a Ray cluster by Ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from zoo.cli.common import Parser
from zoo.errors import ZooError, nearest

LAUNCHERS = ("submitit", "ray")
POLL = 0.5  # seconds between looks at the jobs
Outcome = dict[str, float] | ZooError


@dataclass(frozen=True)
class Job:
    """One run: a composed recipe, its folder, and whether it goes on from what is there."""

    content: dict[str, Any]
    out: str
    resume: bool = False

    def __call__(self) -> dict[str, float]:
        """Train; returns the metrics. Runs in the job's process, which imports this module."""
        from zoo.train.recipe import validate
        from zoo.train.run import train

        return train(validate(self.content), Path(self.out), resume=self.resume).metrics

    def checkpoint(self) -> Any:
        """What submitit puts into the queue when a job is preempted or runs out of time: the same, resumed."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, resume=True))


def add_options(command: Parser) -> None:
    """`--launcher --parallel --job`."""
    group = command.add_argument_group("jobs")
    group.add_argument("--launcher", choices=LAUNCHERS, help="run as jobs (default: one after the other, here)")
    group.add_argument("--parallel", type=int, default=1, metavar="N", help="most jobs at a time (default: 1)")
    group.add_argument("--job", action="append", default=[], metavar="KEY=VALUE", help="what each job asks for, may be "
                       "given several times: of submitit cluster=slurm (default: local), timeout_min, gpus_per_node, "
                       "cpus_per_task, slurm_partition and so on; of Ray address, num_cpus, num_gpus")  # fmt: skip


def launch(name: str, jobs: dict[str, Job], folder: Path, parallel: int, settings: list[str]) -> dict[str, Outcome]:
    """Metrics of each job, or what went wrong with it; the other jobs are run all the same.

    Args:
        name: one of `LAUNCHERS`.
        jobs: by the name of the run.
        folder: for the logs.
        parallel: most of them at a time.
        settings: `key=value` of what a job asks for.

    Raises:
        ZooError: the package is missing, or it does not know a setting.
    """
    if parallel < 1:
        raise ZooError(f"--parallel must be at least 1, got {parallel}")
    options = _settings(settings)
    start = {"submitit": _submitit, "ray": _ray}[name]
    return dict(start(jobs, folder, parallel, options))


def _settings(settings: list[str]) -> dict[str, Any]:
    found = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ZooError(f"--job takes key=value, got '{text}'")
        found[key] = yaml.safe_load(value)
    return found


def _missing(package: str) -> ZooError:
    return ZooError(f"--launcher {package} needs {package}, which is not installed: pip install 'seqzoo[{package}]'")


def _submitit(
    jobs: dict[str, Job], folder: Path, parallel: int, options: dict[str, Any]
) -> Iterator[tuple[str, Outcome]]:
    try:
        import submitit
    except ImportError:
        raise _missing("submitit") from None
    cluster = options.pop("cluster", "local")
    if cluster not in ("local", "slurm"):
        raise ZooError(f"unknown cluster '{cluster}'" + nearest(str(cluster), ("local", "slurm")))
    try:
        executor = submitit.AutoExecutor(folder=folder / "jobs", cluster=cluster)
        executor.update_parameters(**{"name": "zoo", "timeout_min": 24 * 60, **options})
        if cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=parallel)
    except RuntimeError as error:
        raise ZooError(f"submitit finds no SLURM here ({error})") from None
    except (NameError, TypeError, AssertionError) as error:
        raise ZooError(f"submitit does not take what --job says: {str(error).splitlines()[0]}") from None
    waiting = dict(jobs)
    running: dict[str, Any] = {}
    if cluster == "slurm":  # one array, which the scheduler keeps to its share
        running = dict(zip(waiting, executor.submit_array(list(waiting.values())), strict=True))
        waiting = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                name = next(iter(waiting))
                running[name] = executor.submit(waiting.pop(name))
            for name in [name for name, job in running.items() if job.done()]:
                yield name, _outcome(running.pop(name))
            time.sleep(POLL)
    finally:
        for job in running.values():
            job.cancel()


def _outcome(job: Any) -> Outcome:
    error = job.exception()
    if error is None:
        return dict(job.result())
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((line for line in reversed(lines) if "Error: " in line), lines[0])
    return ZooError(f"{said.rpartition('Error: ')[2].strip()} (log: {job.paths.stderr})")


def _ray(jobs: dict[str, Job], folder: Path, parallel: int, options: dict[str, Any]) -> Iterator[tuple[str, Outcome]]:
    try:
        import ray
    except ImportError:
        raise _missing("ray") from None
    address = options.pop("address", None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "logging_level": logging.ERROR}
    ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, **local)
    try:
        task = ray.remote(_call).options(max_retries=0, **options)
        waiting = dict(jobs)
        running: dict[Any, str] = {}
        while waiting or running:
            while waiting and len(running) < parallel:
                name = next(iter(waiting))
                running[task.remote(waiting.pop(name))] = name
            (done,), _ = ray.wait(list(running))
            name = running.pop(done)
            try:
                outcome: Outcome = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                outcome = ZooError(str(error.cause))
            yield name, outcome
    except (ValueError, TypeError) as error:
        raise ZooError(f"Ray does not take what --job says: {str(error).splitlines()[0]}") from None
    finally:
        ray.shutdown()


def _call(job: Job) -> dict[str, float]:
    return job()
