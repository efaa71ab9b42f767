"""The resumable loader: a seeded permutation each epoch, whole batches from any worker, and a state that continues.

Lightning saves and restores any training loader with `state_dict` and `load_state_dict` (its fit loop calls them), so
a run resumed in mid-epoch receives exactly the batches that the uninterrupted one would have. Checkpoints should be
written in `on_train_batch_end`: from one written in `on_train_epoch_end`, Lightning 2.6 with `max_steps` ends the next
epoch after a single batch, whatever the loader says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.errors import ZooError

Batch = dict[str, Any]


class Source(Protocol):
    """What a loader loads from: samples by number, a whole batch at a time."""

    def __len__(self) -> int:
        """Number of samples."""

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        """The samples *index* as arrays or tensors; *step* counts the batches since training began."""


class ResumableLoader:
    """Batches of a `Source`, in an order that is a pure function of (seed, epoch).

    Attributes:
        epoch: the pass being made.
        position: batches of it that were handed out.

    Args:
        source: the samples.
        batch_size: samples a batch, on each rank.
        seed: of the order.
        shuffle: a new permutation each epoch; otherwise the order of the source.
        drop_last: leave out the samples that do not fill a batch.
        bucket: with lengths, sort runs of `bucket` batches by length before cutting them, so that a batch holds
            similar lengths; the order of the batches is then shuffled again (if shuffle). 0 switches it off.
        lengths: length of each sample, for bucket.
        rank, world: this process and how many share each epoch.
        num_workers: processes that build batches ahead; the batches and their order are the same for any number.
        pin_memory: page-locked batches, for a GPU.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        bucket: int = 0,
        lengths: NDArray[np.int64] | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ZooError(f"batch_size must be at least 1, got {batch_size}")
        if len(source) < (batch_size * world if drop_last else world):
            raise ZooError(
                f"the data set has {len(source)} samples, fewer than one batch needs ({batch_size} on {world} ranks)"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.bucket, self.lengths = (bucket if lengths is not None else 0), lengths
        self.rank, self.world = rank, world
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.epoch = 0
        self.position = 0
        self._loaded = False

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        if self.drop_last:
            return len(self.source) // (self.batch_size * self.world)
        return -(-len(self.source) // (self.batch_size * self.world))

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """This rank's sample numbers of each batch of *epoch*."""
        size, step = len(self.source), self.batch_size * self.world
        generator = np.random.default_rng([self.seed & (2**63 - 1), epoch])
        order = generator.permutation(size) if self.shuffle else np.arange(size)
        if self.drop_last:
            order = order[: size // step * step]
        if self.bucket:
            assert self.lengths is not None
            run = step * self.bucket
            runs = [order[i : i + run] for i in range(0, len(order), run)]
            order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in runs])
        cut = [order[i : i + step] for i in range(0, len(order), step)]
        if self.bucket and self.shuffle:  # the last, smaller one stays last
            full = len(cut) - (len(cut[-1]) < step)
            cut = [*(cut[i] for i in generator.permutation(full)), *cut[full:]]
        if self.world == 1:
            return cut
        if len(cut) > 1 and len(cut[-1]) < self.world:  # no rank may be left without a batch
            both = np.concatenate(cut[-2:])
            cut[-2:] = [both[: -self.world], both[-self.world :]]
        return [np.array_split(part, self.world)[self.rank] for part in cut]

    def __iter__(self) -> Iterator[Batch]:
        # a generator: nothing here runs before the first batch is drawn, so an unused iterator moves nothing
        if (self.position and not self._loaded) or self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        self._loaded = False
        epoch, start = self.epoch, self.position
        work = _Work(self.source, self.plan(epoch), epoch)
        for offset, batch in enumerate(self._run(work, start)):
            self.position = start + offset + 1
            yield batch

    def _run(self, work: _Work, start: int) -> Iterator[Batch]:
        if self.num_workers == 0:
            for number in range(start, len(work)):
                batch = work[number]
                yield {k: v.pin_memory() for k, v in batch.items()} if self.pin_memory else batch
            return
        # an own generator: torch would otherwise draw the workers' seed from the global one and change the run
        yield from DataLoader(
            work,
            batch_size=None,
            sampler=range(start, len(work)),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=_same,  # type: ignore[arg-type]
            generator=torch.Generator().manual_seed(self.seed & (2**63 - 1)),
        )

    def state_dict(self) -> dict[str, int]:
        """Where the order stands; the same on every rank."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "samples": len(self.source),
            "batch_size": self.batch_size,
            "world": self.world,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the batch after the last one that was handed out when *state* was taken.

        Another number of ranks may take over when their batches together are as large.

        Raises:
            ZooError: the state is of another data set, seed, or size of a batch over all ranks.
        """
        here = self.state_dict()
        for key in ("seed", "samples"):
            if state.get(key, here[key]) != here[key]:
                raise ZooError(
                    f"cannot resume: the checkpoint's data order has {key}={state[key]}, this run {here[key]}"
                )
        there = state.get("batch_size", self.batch_size) * state.get("world", self.world)
        if there != self.batch_size * self.world:
            raise ZooError(
                f"cannot resume: the checkpoint's batches hold {there} samples over all processes, "
                f"this run's {self.batch_size * self.world} ({self.batch_size} on each of {self.world})"
            )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._loaded = True


class _Work(Dataset[Batch]):
    """Batch number -> batch."""

    def __init__(self, source: Source, plan: list[NDArray[np.int64]], epoch: int) -> None:
        self.source, self.plan, self.epoch = source, plan, epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Batch:
        step = self.epoch * len(self.plan) + number
        batch = self.source.batch(self.plan[number], self.epoch, step)
        return {key: to_tensor(value) for key, value in batch.items()}


def to_tensor(value: Any) -> Tensor:
    """A tensor that shares the array's memory where it can."""
    if isinstance(value, Tensor):
        return value
    array = np.ascontiguousarray(value)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _same(batch: Batch) -> Batch:
    return batch
