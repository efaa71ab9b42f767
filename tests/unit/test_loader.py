"""The loader's order: a pure function of seed and epoch, the same for any number of workers, resumable anywhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from zoo.datamodules.augment import coins, draw, integers, reverse_complement, reverse_complement_rows, uniform
from zoo.datamodules.base import Data
from zoo.datamodules.loader import ResumableLoader
from zoo.errors import ZooError


class Numbers:
    """Sample i is the number i, with the epoch and step it was asked for."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def batch(self, index: np.ndarray, epoch: int, step: int) -> dict[str, Any]:
        noise = draw(7, epoch, index).astype(np.int64)
        return {"index": index, "epoch": np.full(len(index), epoch), "step": np.array([step]), "noise": noise}


def make(size: int = 23, batch: int = 4, **options: Any) -> ResumableLoader:
    return ResumableLoader(Numbers(size), batch, **{"seed": 5, "shuffle": True, "drop_last": True, **options})


def take(loader: ResumableLoader, count: int) -> list[dict[str, torch.Tensor]]:
    """The next *count* batches, over as many epochs as it takes."""
    out: list[dict[str, torch.Tensor]] = []
    while True:
        for batch in loader:
            out.append(batch)
            if len(out) == count:
                return out


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_each_epoch_is_another_permutation() -> None:
    loader = make(24)
    first = torch.cat([b["index"] for b in loader])
    second = torch.cat([b["index"] for b in loader])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(24))
    assert first.tolist() != second.tolist()
    assert loader.state_dict()["epoch"] == 1


def test_order_without_shuffle_keeps_the_last_batch() -> None:
    loader = make(10, shuffle=False, drop_last=False)
    assert [len(b["index"]) for b in loader] == [4, 4, 2]
    assert torch.cat([b["index"] for b in loader]).tolist() == list(range(10))


@pytest.mark.parametrize(("stop", "workers"), [(0, 0), (1, 0), (4, 0), (5, 0), (6, 0), (11, 0), (3, 2), (5, 2)])
def test_resume_continues_with_the_next_batch(stop: int, workers: int) -> None:
    whole = take(make(), 14)
    loader = make(num_workers=workers)
    head = take(loader, stop) if stop else []
    state = loader.state_dict()
    again = make(num_workers=workers)
    again.load_state_dict(state)
    again.load_state_dict(state)  # Lightning may restore twice
    iter(again)  # and may make an iterator that it never uses
    assert same(head + take(again, 14 - stop), whole)


def test_workers_change_nothing_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert same(take(make(num_workers=2), 7), take(make(), 7))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_that_was_cut_short_counts_as_one() -> None:
    loader = make()
    take(loader, 2)
    assert next(iter(loader))["epoch"][0] == 1


@pytest.mark.parametrize("size", [16, 23, 24, 25, 26])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_share_an_epoch(size: int, train: bool) -> None:
    alone = [make(size, 4, shuffle=train, drop_last=train, rank=r, world=2) for r in (0, 1)]
    parts = [[b["index"].tolist() for b in loader] for loader in alone]
    assert len(parts[0]) == len(parts[1]) == len(alone[0])
    assert all(part for rank in parts for part in rank)
    seen = sorted(i for rank in parts for part in rank for i in part)
    if train:
        assert len(seen) == len(set(seen)) == size // 8 * 8
    else:
        assert seen == list(range(size))
    assert alone[0].state_dict() == alone[1].state_dict()


def test_buckets_hold_similar_lengths_and_resume() -> None:
    lengths = np.random.default_rng(0).integers(20, 2000, 400)

    def spread(loader: ResumableLoader) -> float:
        return float(np.mean([np.ptp(lengths[b["index"].numpy()]) for b in loader]))

    plain, bucketed = make(400, 8, lengths=lengths), make(400, 8, lengths=lengths, bucket=10)
    assert spread(bucketed) < spread(plain) / 5
    order = torch.cat([b["index"] for b in make(400, 8, lengths=lengths, bucket=10)])
    assert sorted(order.tolist()) == list(range(400))
    firsts = [lengths[b["index"][0]] for b in make(400, 8, lengths=lengths, bucket=10)]
    assert firsts != sorted(firsts)
    whole = take(make(400, 8, lengths=lengths, bucket=10), 70)
    loader = make(400, 8, lengths=lengths, bucket=10)
    take(loader, 53)
    again = make(400, 8, lengths=lengths, bucket=10)
    again.load_state_dict(loader.state_dict())
    assert same(take(again, 17), whole[53:])


def test_a_state_of_another_run_is_refused() -> None:
    state = make(23).state_dict()
    with pytest.raises(ZooError, match="samples=23, this run 24"):
        make(24).load_state_dict(state)
    with pytest.raises(ZooError, match="hold 4 samples"):
        make(23, 5).load_state_dict(state)


def test_too_few_samples() -> None:
    with pytest.raises(ZooError, match="3 samples"):
        make(3)
    with pytest.raises(ZooError, match="batch_size"):
        make(3, 0)


def test_draws_depend_on_all_their_arguments_only() -> None:
    index = np.arange(20000)
    assert (coins(1, 2, index)[777:] == coins(1, 2, index[777:])).all()
    for other in (coins(2, 2, index), coins(1, 3, index), coins(1, 2, index, 1)):
        assert 0.47 < (coins(1, 2, index) == other).mean() < 0.53
    assert 0.48 < coins(1, 2, index).mean() < 0.52
    values = integers(0, 0, index, -3, 3)
    assert np.bincount(values + 3).min() > 20000 / 7 * 0.9
    assert 0 <= uniform(0, 0, index).min() < 0.001 < 0.999 < uniform(0, 0, index).max() < 1


def test_reverse_complement_of_rows() -> None:
    texts = [b"ACGTN", b"acgRY", b"TTTTA"]
    rows = np.frombuffer(b"".join(texts), np.uint8).reshape(3, 5)
    out = reverse_complement_rows(rows, np.array([True, False, True]))
    assert [row.tobytes() for row in out] == [reverse_complement(texts[0]), texts[1], reverse_complement(texts[2])]


class Recorder(pl.LightningModule):
    """Trains one weight and writes down which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class NumberData(Data):
    needs_tokenizer = False

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(batch_size=4, eval_batch_size=None, bucket=0, num_workers=0), None, 5)

    def _load(self) -> dict[str, Any]:
        return {"train": Numbers(23)}


class Save(pl.Callback):
    """Writes a checkpoint after each batch and each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"batch{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.global_step}.ckpt")


def fit(folder: Path, resume: Path | None = None, **limit: int) -> list[list[int]]:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[] if resume else [Save(folder)], **limit,
    )  # fmt: skip
    trainer.fit(model, NumberData(), ckpt_path=resume, weights_only=True if resume else None)
    return model.seen


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_inside_and_between_epochs(tmp_path: Path) -> None:
    whole = fit(tmp_path, max_steps=13)
    for stop in (1, 4, 5, 6, 12):  # an epoch has 5 batches
        assert whole[:stop] + fit(tmp_path, tmp_path / f"batch{stop}.ckpt", max_steps=13) == whole, stop
    whole = fit(tmp_path, max_epochs=3)
    for name in ("batch5", "batch7", "epoch5", "epoch10"):
        tail = fit(tmp_path, tmp_path / f"{name}.ckpt", max_epochs=3)
        assert whole[: 15 - len(tail)] + tail == whole
        assert len(tail) == 15 - int(name[5:])
