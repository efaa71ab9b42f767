"""The training data as one resumable stream of a known length, whatever the number of epochs in it.

Lightning's bookkeeping at epoch boundaries (a short last accumulation, restarts between two epochs) has many cases.
A run here is a single Lightning epoch over this stream, so every resume is the one case of resuming inside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl

from zoo.errors import ZooError


class Stream:
    """Exactly *batches* batches of *loader*, one epoch after another.

    Args:
        loader: has `__len__`, `__iter__` (each call is the next epoch, or the rest of one), `state_dict` and
            `load_state_dict`.
        batches: batches of the whole run.
    """

    def __init__(self, loader: Any, batches: int) -> None:
        self.loader, self.batches = loader, batches
        self.done = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        while self.done < self.batches:
            before = self.done
            for batch in self.loader:
                self.done += 1
                yield batch
                if self.done == self.batches:
                    return
            if self.done == before:
                raise ZooError("the training data gave no batch: it has fewer samples than one batch needs")

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])
        self.loader.load_state_dict(state["loader"])


class Streamed(pl.LightningDataModule):
    """A datamodule whose training loader is a `Stream`; it also tells the task how many optimiser steps there are.

    Args:
        data: the datamodule behind it.
        max_steps, max_epochs: what ends the run, whichever comes first; -1 is no bound.
        accumulate: batches an optimiser step.
    """

    def __init__(self, data: Any, max_steps: int, max_epochs: int, accumulate: int) -> None:
        super().__init__()
        self.data, self.max_steps, self.max_epochs, self.accumulate = data, max_steps, max_epochs, accumulate
        self.loader: Any = None
        self.steps = 0

    def prepare_data(self) -> None:
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit" and self.loader is None:
            self.data.trainer = self.trainer  # rank and world size
            self.data.setup(stage)
            self.loader = self.data.train_dataloader()
            self.steps = total_steps(len(self.loader), self.max_steps, self.max_epochs, self.accumulate)
            assert self.trainer is not None
            task: Any = self.trainer.lightning_module
            task.total_steps = self.steps

    def train_dataloader(self) -> Stream:
        return Stream(self.loader, self.steps * self.accumulate)

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.data.test_dataloader()


def total_steps(batches: int, max_steps: int, max_epochs: int, accumulate: int) -> int:
    """Optimiser steps of a run whose epoch has *batches* batches.

    An accumulation may span two epochs; a remainder at the very end makes no step, but there is always one step.
    """
    bounds = [max_steps] if max_steps > 0 else []
    if max_epochs > 0:
        bounds.append(max(batches * max_epochs // accumulate, 1))
    return min(bounds)
