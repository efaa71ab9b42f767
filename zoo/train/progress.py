"""What a run shows and records: a bar on a terminal, a line a step elsewhere, `metrics.csv` always."""

from __future__ import annotations

import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from zoo.errors import ZooError
from zoo.train.checkpoint_io import write_atomic
from zoo.train.record import is_first

LOGGERS = {
    "tensorboard": ("TensorBoardLogger", "name"),
    "wandb": ("WandbLogger", "name"),
    "mlflow": ("MLFlowLogger", "run_name"),
}  # class, and how it calls a run's name; trackio has a class of its own here, since Lightning has none
_NOISE = (
    r".*when logging on epoch level in distributed setting.*",  # what is logged was summed over ranks already
    r".*will save all targets and predictions in the buffer.*",
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*`isinstance\(treespec, LeafSpec\)`.*",
    r".*Trainer already configured with model summary.*",
    r".*No positive samples in targets.*",
    r".*No negative samples in targets.*",
    r".*`LeafSpec` is deprecated.*",
    r".*Checkpoint directory.*exists and is not empty.*",
    r".*available but not used.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*Detected call of `lr_scheduler.step\(\)` before.*",  # the scaler skipped the very first step
)


def quiet() -> None:
    """Drop Lightning's banners, tips and the warnings that do not apply to how runs are made here."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in _NOISE:
        warnings.filterwarnings("ignore", message=pattern)


class CsvLogger(Logger):
    """`metrics.csv`: one row a logged step, one column a metric. Rows survive a kill; a resumed run continues them.

    Args:
        path: the file.
        start: rows of later steps than this are dropped (a resumed run repeats those steps).
    """

    def __init__(self, path: Path, start: int = 0) -> None:
        super().__init__()
        self.path = path
        self.current: Callable[[], int] | None = None  # optimiser steps made; Lightning's own count is one behind
        self.columns = ["step", "seconds"]
        self.began = time.monotonic()
        rows: list[dict[str, str]] = []
        self.writes = is_first()
        if not self.writes:
            return
        if path.is_file() and start > 0:
            with path.open(newline="", encoding="utf-8") as stream:
                rows = [row for row in csv.DictReader(stream) if int(row["step"]) <= start]
        for row in rows:
            self.columns += [name for name in row if name not in self.columns]
        if rows:
            self.began -= float(rows[-1]["seconds"])
        self._rewrite(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The recipe stands in run.json; nothing to do here."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self.writes:
            return
        row: dict[str, Any] = {
            "step": self.current() if self.current else int(step or 0),
            "seconds": f"{time.monotonic() - self.began:.2f}",
        }
        row |= {name: f"{value:.9g}" for name, value in metrics.items() if name != "epoch"}
        new = [name for name in row if name not in self.columns]
        if new:  # a metric seen for the first time: the header grows, which happens a few times a run
            self.columns += new
            with self.path.open(newline="", encoding="utf-8") as stream:
                self._rewrite(list(csv.DictReader(stream)))
        with self.path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self.columns, restval="").writerow(row)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, self.columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

        write_atomic(self.path, write)


def extra_loggers(names: tuple[str, ...], folder: Path, run: str) -> list[Any]:
    """The optional loggers of a recipe.

    Raises:
        ZooError: the package behind one of them is not installed.
    """
    import pytorch_lightning.loggers as available

    built = []
    for name in names:
        try:
            if name == "trackio":
                from zoo.train.trackio_logger import TrackioLogger

                built.append(TrackioLogger(run, folder / name))
                continue
            (folder / name).mkdir(parents=True, exist_ok=True)  # wandb falls back to the system's folder without it
            class_name, label = LOGGERS[name]
            built.append(getattr(available, class_name)(**{label: run}, save_dir=str(folder / name)))
        except (ImportError, ModuleNotFoundError):
            raise ZooError(
                f"trainer.loggers names {name}, which is not installed: pip install 'seqzoo[{name}]'"
            ) from None
    return built


class ProgressReport(pl.Callback):
    """A rich bar on a terminal; elsewhere one line every *log_every* steps: step, loss, rate, samples/s, time left."""

    def __init__(self, total: int, log_every: int, stream: TextIO | None = None) -> None:
        self.total, self.log_every = total, max(log_every, 1)
        self.stream = stream or sys.stderr
        self.bar: Progress | None = None
        self.row: TaskID | None = None
        self.samples = 0
        self.first = 0
        self.began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.samples, self.first, self.began = 0, trainer.global_step, time.monotonic()
        if trainer.is_global_zero and self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(file=self.stream))
            self.bar.start()
            self.row = self.bar.add_task("training", total=self.total, completed=self.first, note="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch["index"]) if isinstance(batch, dict) and "index" in batch else 0
        step = trainer.global_step
        if not trainer.is_global_zero or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        if self.bar is not None and self.row is not None:
            self.bar.update(self.row, completed=step, note=self._note(trainer, step))
        elif step % self.log_every == 0 or step == self.total or step == self.first + 1:
            self._print(f"step {step}/{self.total}  {self._note(trainer, step, eta=True)}")

    def _note(self, trainer: pl.Trainer, step: int, eta: bool = False) -> str:
        spent = max(time.monotonic() - self.began, 1e-9)
        values = trainer.callback_metrics
        parts = [f"loss {float(values['train/loss']):.4f}"] if "train/loss" in values else []
        if "train/lr" in values:
            parts.append(f"lr {float(values['train/lr']):.2e}")
        parts.append(f"{self.samples * trainer.world_size / spent:.0f} samples/s")
        if eta:
            left = (self.total - step) * spent / max(step - self.first, 1)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._summary(trainer, "val")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._summary(trainer, "test")

    def _summary(self, trainer: pl.Trainer, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{stage}/")}
        self._print(f"step {trainer.global_step}/{self.total}  " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, file=self.stream, flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            self._print(f"interrupted after step {trainer.global_step}: --resume continues from the newest checkpoint")

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
