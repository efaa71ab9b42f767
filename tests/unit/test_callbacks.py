"""Random streams, the guard against NaN, validation around checkpoints, and what is printed and recorded."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.train import checkpoint_io
from zoo.train.callbacks import Checkpoints, NonFiniteGuard, RandomStreams, WeightAverage, capture_rng, restore_rng
from zoo.train.plots import plot_curves, read_metrics
from zoo.train.progress import CsvLogger, ProgressReport, quiet
from zoo.train.stream import Stream, total_steps

quiet()


class Loader:
    """Ten batches of two samples; resumable."""

    def __init__(self) -> None:
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        if self.position >= 10:
            self.epoch, self.position = self.epoch + 1, 0
        for number in range(self.position, 10):
            self.position = number + 1
            index = torch.tensor([2 * number, 2 * number + 1])
            yield {"ids": torch.full((2, 4), float(self.epoch * 10 + number + 1)), "index": index}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Toy(pl.LightningModule):
    """A linear model with dropout; the loss turns to *bad* when sample *at* comes along."""

    def __init__(self, at: int = -1, bad: str = "loss") -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.at, self.bad = at, bad
        self.seen: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(float(torch.rand(())))
        hidden = self.layer(nn.functional.dropout(batch["ids"], 0.5))
        loss = hidden.square().mean() * 1e-3
        if self.at in batch["index"].tolist():
            loss = loss * float("nan") if self.bad == "loss" else loss + _Poison.apply(self.layer.weight)
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        torch.rand(3)  # validation may draw what it likes
        self.log("val/loss", self.layer.weight.square().sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class _Poison(torch.autograd.Function):
    """0 forward, infinite gradient backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full(ctx.shape, float("inf"))


def fit(task: Toy, folder: Path, batches: int, callbacks: list[Any], start: Path | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {"limit_val_batches": 0}
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=callbacks,
        plugins=[checkpoint_io.SafeCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **(defaults | options),
    )
    trainer.fit(task, Stream(Loader(), batches), Loader(), ckpt_path=start, weights_only=True)
    return trainer


def keeper(folder: Path, every: int = 4, **options: Any) -> Checkpoints:
    settings = {"monitor": None, "mode": "min", **options}
    return Checkpoints(folder, every, 10, **settings)


def test_generators_are_captured_and_restored() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.randn(3)  # leaves a cached Gaussian behind
    state = capture_rng()
    first = (random.random(), np.random.randn(), float(torch.rand(())))
    restore_rng(state)
    assert (random.random(), np.random.randn(), float(torch.rand(()))) == first
    stored = io.BytesIO()
    torch.save(state, stored)
    stored.seek(0)
    restore_rng(torch.load(stored, weights_only=True))
    assert (random.random(), np.random.randn(), float(torch.rand(()))) == first


@pytest.mark.parametrize("val_every", [0, 3, 4])
def test_training_draws_the_same_numbers_whatever_lies_between(tmp_path: Path, val_every: int) -> None:
    """With or without validation, and resumed after any checkpoint, also one that a validation followed."""
    options = {"val_check_interval": val_every, "limit_val_batches": 2} if val_every else {}
    torch.manual_seed(5)
    straight = Toy()
    fit(straight, tmp_path, 24, [RandomStreams(0), keeper(tmp_path / "a")], **options)
    torch.manual_seed(5)
    plain = Toy()
    fit(plain, tmp_path, 24, [RandomStreams(0)])
    assert straight.seen == plain.seen
    for path in checkpoint_io.checkpoints(tmp_path / "a")[:-1]:
        torch.manual_seed(999)
        resumed, kept = Toy(), keeper(tmp_path / "b")
        trainer = fit(resumed, tmp_path, 24, [RandomStreams(0), kept], path, **options)
        step = int(path.stem.removeprefix("step-"))
        assert resumed.seen == straight.seen[step:]
        assert trainer.global_step == 24
        assert torch.equal(resumed.layer.weight, straight.layer.weight)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_non_finite_stops_before_the_step(tmp_path: Path, bad: str, accumulate: int) -> None:
    """Samples 14 and 15 are batch 8: step 8, or step 3 of accumulated ones (batches 7 to 9)."""
    torch.manual_seed(0)
    task, good = Toy(15, bad), Toy()
    good.load_state_dict(task.state_dict())
    step = -(-8 // accumulate)
    with pytest.raises(ZooError, match=rf"at step {step} on training samples \[.*14, 15.*\]") as caught:
        fit(
            task,
            tmp_path,
            30,
            [RandomStreams(0), NonFiniteGuard(), keeper(tmp_path / "c", 1)],
            accumulate_grad_batches=accumulate,
        )
    assert ("nan" if bad == "loss" else "inf") in str(caught.value)
    newest = checkpoint_io.newest_valid(tmp_path / "c")
    assert newest == checkpoint_io.step_path(tmp_path / "c", step - 1)
    state = checkpoint_io.load(newest)["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())
    assert torch.equal(task.layer.weight, state["layer.weight"])  # the bad step changed nothing
    assert not list((tmp_path / "c").glob(".*"))


def test_best_weights_and_patience(tmp_path: Path) -> None:
    kept = keeper(tmp_path / "d", 100, monitor="val/loss", mode="max", patience=3)
    task = Toy()
    trainer = fit(task, tmp_path, 400, [kept], val_check_interval=5, limit_val_batches=1)
    best = checkpoint_io.load(kept.best_path)
    assert best["step"] == kept.best_step
    assert best["metrics"]["val/loss"] == pytest.approx(float(best["state_dict"]["layer.weight"].square().sum()))
    if kept.stopped:
        assert trainer.global_step == kept.best_step + 15
        assert checkpoint_io.newest_valid(kept.folder) == checkpoint_io.step_path(kept.folder, trainer.global_step)


def test_damaged_best_weights_are_told_of_and_chosen_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = keeper(tmp_path / "d", 10, monitor="val/loss")
    fit(Toy(), tmp_path, 20, [first], val_check_interval=5, limit_val_batches=1)
    first.best_path.write_bytes(first.best_path.read_bytes()[:-7])
    second = keeper(tmp_path / "d", 10, monitor="val/loss")
    second.load_state_dict(first.state_dict())
    assert second.best is None
    assert "best.ckpt does not match its sha256" in capsys.readouterr().err
    fit(Toy(), tmp_path, 5, [second], val_check_interval=5, limit_val_batches=1)
    assert checkpoint_io.problem(second.best_path) is None


def test_line_a_step_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    fit(Toy(), tmp_path, 20, [ProgressReport(20, 5, stream)])
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/20", "5/20", "10/20", "15/20", "20/20"]
    assert all("loss" in line and "samples/s" in line and "left" in line for line in lines)


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    fit(Toy(), tmp_path, 20, [ProgressReport(20, 5, stream)])
    assert "20/20" in stream.getvalue()


def test_csv_grows_columns_and_drops_steps_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    for step in (1, 2, 3):
        logger.log_metrics({"train/loss": 1.0 / step, "epoch": 0}, step)
    logger.log_metrics({"val/loss": 0.5}, 3)
    logger.log_metrics({"train/loss": 0.25}, 4)
    CsvLogger(path, start=3).log_metrics({"train/loss": 0.26}, 4)
    with path.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4]
    assert rows[-1]["train/loss"] == "0.26"
    assert rows[3]["val/loss"] == "0.5"
    assert "epoch" not in rows[0]
    assert read_metrics(path)["val/loss"] == ([3], [0.5])
    picture = plot_curves(path, tmp_path / "curves.png", "a run")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stream_runs_over_epochs_and_resumes() -> None:
    whole = [float(batch["ids"][0, 0]) for batch in Stream(Loader(), 25)]
    assert whole == [float(i) for i in range(1, 26)]
    first = Stream(Loader(), 25)
    taken = iter(first)
    for _ in range(10):
        next(taken)
    second = Stream(Loader(), 25)
    second.load_state_dict(first.state_dict())
    assert [float(batch["ids"][0, 0]) for batch in second] == whole[10:]


@pytest.mark.parametrize(
    ("batches", "steps", "epochs", "accumulate", "expected"),
    [(10, -1, 3, 1, 30), (10, 7, 3, 1, 7), (10, 70, 3, 1, 30), (10, 5, -1, 4, 5), (5, -1, 3, 2, 7), (1, -1, 1, 4, 1)],
)
def test_total_steps(batches: int, steps: int, epochs: int, accumulate: int, expected: int) -> None:
    assert total_steps(batches, steps, epochs, accumulate) == expected


class Recorder(pl.Callback):
    """The weights after every step, and those that validation saw."""

    def __init__(self) -> None:
        self.trained: list[Tensor] = []
        self.judged: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained.append(pl_module.layer.weight.detach().clone())

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.judged.append(pl_module.layer.weight.detach().clone())


def test_the_average_is_what_is_judged_and_training_goes_on_from_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task, seen, average = Toy(), Recorder(), WeightAverage(0.5)
    expected = task.layer.weight.detach().clone()
    writer = keeper(tmp_path / "c", monitor="val/loss", average=average)
    fit(task, tmp_path, 10, [average, seen, writer], val_check_interval=10, limit_val_batches=1)
    for step, weight in enumerate(seen.trained, 1):
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight
    torch.testing.assert_close(seen.judged[-1], expected)
    assert torch.equal(task.layer.weight, seen.trained[-1])
    assert not torch.allclose(expected, seen.trained[-1])
    best = checkpoint_io.load(writer.best_path)["state_dict"]["layer.weight"]
    newest = checkpoint_io.load(checkpoint_io.step_path(tmp_path / "c", 10))["state_dict"]["layer.weight"]
    torch.testing.assert_close(best, expected)
    assert torch.equal(newest, seen.trained[-1])
