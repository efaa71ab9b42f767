"""What makes a run trustworthy: random streams that survive a restart, a guard against NaN, and the checkpoints."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.train import checkpoint_io
from zoo.train.record import say
from zoo.train.sharding import part, reshard, whole


def capture_rng() -> dict[str, Any]:
    """States of the python, numpy, torch and CUDA generators as plain values and tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.array(keys, np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Put all generators back to a captured state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([item.cpu() for item in state["cuda"]])


class RandomStreams(pl.Callback):
    """Training's random numbers go from the end of one batch straight to the start of the next.

    Whatever draws in between (validation, making an iterator, writing a checkpoint) cannot shift them, so a resumed
    run, which does other things in between, continues with exactly the same numbers. Each rank has its own stream.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.after: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.after is None and trainer.global_rank > 0:
            torch.manual_seed(self.seed + trainer.global_rank)  # else all ranks would drop the same units

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self.after is not None:
            restore_rng(self.after)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.after = capture_rng()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [self.after]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, self.after)
        checkpoint["rng"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = checkpoint["rng"]
        if len(states) != trainer.world_size:
            say(
                f"the checkpoint was written by {len(states)} processes: samples and updates go on as before, "
                "but dropout draws other numbers than an unbroken run"
            )
        if trainer.global_rank < len(states):
            self.after = states[trainer.global_rank]
            return
        torch.manual_seed(hash((self.seed, trainer.global_rank, checkpoint["global_step"])) & (2**63 - 1))
        self.after = capture_rng()


class NonFiniteGuard(pl.Callback):
    """Stops before the optimiser step that a NaN or infinite loss or gradient would poison, and says which batch.

    With several ranks a bad loss is left to reach the gradients, where all ranks see it and stop together. Under a
    gradient scaler (16-mixed) infinite gradients are its business; the loss is still watched.
    """

    def __init__(self) -> None:
        self.samples: list[list[int]] = []
        self.bad_loss: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        indices = batch.get("index") if isinstance(batch, dict) else None
        self.samples.append(indices.tolist() if isinstance(indices, Tensor) else [])

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        value = float(loss.detach())
        if not math.isfinite(value):
            self.bad_loss = value
            if trainer.world_size == 1:
                self._stop(trainer, f"the loss is {value}", self.samples[-1:])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(grads))
        pl_module.log("train/grad_norm", norm, batch_size=1)
        if not bool(torch.isfinite(norm)) and trainer.precision != "16-mixed":
            bad = next((n for n, p in pl_module.named_parameters() if _bad(p.grad)), "all together")
            self._stop(trainer, f"the gradient norm is {float(norm)} (first in {bad})", self.samples)
        self.samples = []

    def _stop(self, trainer: pl.Trainer, what: str, samples: list[list[int]]) -> None:
        shown = [index for batch in samples for index in batch]
        text = ", ".join(map(str, shown[:64])) + (", ..." if len(shown) > 64 else "")
        keeper = next((item for item in trainer.callbacks if isinstance(item, Checkpoints)), None)  # type: ignore[attr-defined]
        kept = checkpoint_io.checkpoints(keeper.folder) if keeper is not None else []
        last = f"the last checkpoint is intact ({kept[-1].name})" if kept else "no checkpoint was due yet"
        raise ZooError(
            f"{what} at step {trainer.global_step + 1} on training samples [{text}]; nothing was updated and {last}: "
            "lower task.optim.lr, set trainer.grad_clip, or look at those samples"
        )


def _bad(grad: Tensor | None) -> bool:
    return grad is not None and not bool(torch.isfinite(grad).all())


class WeightAverage(pl.Callback):
    """Exponential moving average of the weights: validated, chosen and published in place of the weights themselves.

    After step s the average moves by 1 - min(decay, (1 + s) / (10 + s)), so that the first steps do not linger. On
    small data it takes the luck out of which step is chosen.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.step = 0
        self.aside: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.whole(), "step": self.step}

    def whole(self) -> dict[str, Tensor]:
        """The average as whole tensors; all ranks must call this together."""
        return {name: whole(value) for name, value in self.average.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self.step = dict(state_dict["average"]), state_dict["step"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        weights = _weights(pl_module)
        self.average = {
            name: part(self.average[name], w) if name in self.average else w.detach().clone()
            for name, w in weights.items()
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            weights = _weights(pl_module)
            torch._foreach_lerp_(list(self.average.values()), [weights[name] for name in self.average], 1 - keep)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.average:
            self.aside = {name: w.detach().clone() for name, w in _weights(pl_module).items()}
            self.put(pl_module, self.average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.aside:
            self.put(pl_module, self.aside)
            self.aside = {}

    @staticmethod
    def put(pl_module: pl.LightningModule, values: dict[str, Tensor]) -> None:
        """Copy *values* into the module's parameters of the same names."""
        with torch.no_grad():
            for name, weight in _weights(pl_module).items():
                weight.copy_(values[name])


def _weights(module: pl.LightningModule) -> dict[str, Tensor]:
    reshard(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes a checkpoint every so many steps and at the end, keeps the newest few, and the best weights beside them.

    A step that is followed by a validation is saved after it, so that resuming never loses or repeats one.

    Args:
        folder: where they go.
        every: optimiser steps between them.
        keep: how many stay.
        monitor, mode: the validation metric that picks `best.ckpt`; None keeps none.
        patience: validations without improvement after which training stops; 0 never.
        average: whose weights are the ones judged; None takes the module's own.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        monitor: str | None,
        mode: Literal["min", "max"],
        patience: int = 0,
        average: WeightAverage | None = None,
    ) -> None:
        self.folder, self.every, self.keep, self.average = folder, every, keep, average
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.best: float | None = None
        self.best_step = 0
        self.stale = 0
        self.stopped = False
        self.saved = -1
        self.due = False
        self.judged = -1
        self.latest: dict[str, float] = {}

    @property
    def best_path(self) -> Path:
        return self.folder / "best.ckpt"

    def state_dict(self) -> dict[str, Any]:
        kept = ("best", "best_step", "stale", "stopped", "judged", "latest")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        if self.best is not None and (reason := checkpoint_io.problem(self.best_path)) is not None:
            say(f"{reason}: the best weights are chosen among those still to come")
            self.best, self.best_step, self.judged = None, 0, -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.due = step != self.saved and step > 0 and (step % self.every == 0 or last)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            self.due = False
        if self.due and not self._validation_follows(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.judged = trainer.global_step
        self.latest = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self.monitor is not None:
            self._judge(trainer)
        if trainer.state.fn == "fit" and (self.due or self.stopped):
            self._save(trainer)

    def _validation_follows(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        every = trainer.val_check_batch
        return bool(trainer.enable_validation) and every is not None and (batch_idx + 1) % every == 0

    def _judge(self, trainer: pl.Trainer) -> None:
        assert self.monitor is not None
        score = self.latest[self.monitor]
        better = self.best is None or (score < self.best if self.mode == "min" else score > self.best)
        if math.isfinite(score) and better:
            self.best, self.best_step, self.stale = score, trainer.global_step, 0
            self._save_best(trainer)
            return
        self.stale += 1
        if self.patience and self.stale >= self.patience:
            self.stopped = trainer.should_stop = True

    def _save_best(self, trainer: pl.Trainer) -> None:
        weights = trainer.strategy.lightning_module_state_dict()
        if self.average is not None:
            weights = {**weights, **self.average.whole()}
        if trainer.is_global_zero:
            payload = {"state_dict": weights, "metrics": self.latest, "step": self.best_step, "monitor": self.monitor}
            checkpoint_io.save(payload, self.best_path)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        self.saved, self.due = step, False
        trainer.save_checkpoint(checkpoint_io.step_path(self.folder, step))
        if trainer.is_global_zero:
            checkpoint_io.prune(self.folder, self.keep)
