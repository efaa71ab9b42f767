"""One training run from a recipe to an artifact: build, fit, choose the weights, test, publish into a folder."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from zoo.config import to_dict
from zoo.nn.lora import lora_layers, remove_lora
from zoo.train import checkpoint_io, record
from zoo.train.assemble import Parts, assemble, check_monitor
from zoo.train.callbacks import Checkpoints, NonFiniteGuard, RandomStreams, WeightAverage
from zoo.train.finetune import head_modules, trainable
from zoo.train.plots import plot_curves
from zoo.train.progress import CsvLogger, ProgressReport, extra_loggers, quiet
from zoo.train.recipe import RecipeConfig
from zoo.train.record import say
from zoo.train.sharding import load_whole, strategy, whole_state
from zoo.train.stream import Streamed

SILENT: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        dir: folder of the run: `artifact/`, `checkpoints/`, `metrics.csv`, `curves.png`, `recipe.json`; with
            finetune.mode=lora also `adapter/`, in peft's format.
        artifact: the folder that `zoo.load` reads.
        metrics: of the chosen weights: `val/...`, and `test/...` where the data has a test split.
        steps: optimiser steps made in all.
        chosen: step whose weights the artifact holds.
        seconds: time spent training and validating, over all resumed parts.
        first: whether this process is the one, or the first of several, that speaks.
    """

    dir: Path
    artifact: Path
    metrics: dict[str, float]
    steps: int
    chosen: int
    seconds: float
    first: bool


def train(recipe: RecipeConfig, out: Path, *, resume: bool = False, init: str | None = None) -> RunResult:
    """Train *recipe* (from `zoo.train.recipe.validate`) in folder *out* and write the artifact.

    Args:
        recipe: what to train.
        out: folder of the run; nothing in it is removed but this run's own older checkpoints.
        resume: continue from the newest checkpoint there that verifies; the result is the one of an unbroken run.
        init: artifact to start from, in place of the recipe's own `init`.

    Raises:
        ZooError: anything the user can mend; see `assemble` and `record.claim_folder`.
    """
    quiet()
    out = Path(out)
    recipe = dataclasses.replace(recipe, init=init) if init is not None else recipe
    if recipe.trainer.threads > 0:
        torch.set_num_threads(recipe.trainer.threads)
    pl.seed_everything(recipe.seed, workers=True, verbose=False)
    parts = assemble(recipe)
    check_monitor(recipe, parts.task.metric_names(), parts.data)
    if record.is_first():
        record.claim_folder(out, parts.recipe, resume)
    return _Run(parts, out).execute(resume)


class _Run:
    """The state of one call of `train`."""

    def __init__(self, parts: Parts, out: Path) -> None:
        self.parts, self.out = parts, out
        self.recipe, self.options = parts.recipe, parts.recipe.trainer
        self.folder = out / "checkpoints"
        options = self.options
        self.average = WeightAverage(options.ema) if options.ema else None
        self.keeper = Checkpoints(
            self.folder,
            options.checkpoint_every,
            options.keep,
            options.monitor,
            options.mode,
            options.patience,
            self.average,
        )
        self.data = Streamed(parts.data, options.max_steps, options.max_epochs, options.accumulate)

    def execute(self, resume: bool) -> RunResult:
        start = self._resume_point() if resume else None
        first = int(checkpoint_io.load(start)["global_step"]) if start else 0
        self.csv = CsvLogger(self.out / "metrics.csv", first)
        trainer = self._trainer()
        self.csv.current = lambda: max(trainer.global_step, first)
        task = self.parts.task
        if self.options.compile:
            self.parts.model.compile()
        say(
            f"training {self.recipe.name} on {trainer.strategy.root_device} ({_why(trainer)}), "
            f"{_parameters(self.parts.model)}, "
            f"{torch.get_num_threads()} threads, {self.options.precision}"
        )
        self.facts = self.parts.data.facts()
        if shared := self.facts.get("shared"):
            say(f"the splits share sequences: {shared}")
        trainer.fit(task, datamodule=self.data, ckpt_path=start, weights_only=True)
        steps = self.steps_done = max(trainer.global_step, first)
        metrics, chosen = self._choose(trainer, steps)
        seconds = time.monotonic() - self.csv.began
        if getattr(self.parts.data, "sources", {}).get("test") is not None:
            trainer.test(task, dataloaders=self.parts.data.test_dataloader(), verbose=False)
            metrics |= _metrics(trainer, "test/")
        weights = whole_state(task)
        if trainer.is_global_zero:
            self._publish(trainer, self._unsharded(weights), metrics, steps, chosen, seconds)
        trainer.strategy.barrier()
        return RunResult(self.out, self.out / "artifact", metrics, steps, chosen, seconds, trainer.is_global_zero)

    def _resume_point(self) -> Path | None:
        path = checkpoint_io.newest_valid(self.folder, say)
        if path is None:
            say(f"no checkpoint in {self.folder} that verifies: starting from the first step")
        else:
            say(f"resuming from {path}")
        return path

    def _trainer(self) -> pl.Trainer:
        options = self.options
        machine: dict[str, Any] = {
            "accelerator": options.accelerator,
            "devices": options.devices,
            "num_nodes": options.num_nodes,
        }
        # the loader's length, which depends on the number of ranks, decides how often to validate
        several = options.devices != 1 or options.num_nodes != 1
        ranks = pl.Trainer(**machine, strategy=strategy(options.strategy), **SILENT) if several else None
        self.parts.data.trainer = ranks
        batches = len(self.parts.data.train_dataloader())
        total = _total(batches, self.data)
        has_val = "val" in getattr(self.parts.data, "sources", {"val": None})
        every = options.val_every * options.accumulate or batches
        self.progress = ProgressReport(total, options.log_every)
        automatic = self.parts.task.automatic_optimization
        if not automatic:  # the task steps its optimisers itself
            self.parts.task.accumulate, self.parts.task.grad_clip = options.accumulate, options.grad_clip
        return pl.Trainer(
            **machine,
            strategy=strategy(options.strategy),
            precision=options.precision,
            max_epochs=1,
            accumulate_grad_batches=options.accumulate if automatic else 1,
            gradient_clip_val=(options.grad_clip or None) if automatic else None,
            val_check_interval=min(every, total * options.accumulate),
            limit_val_batches=1.0 if has_val else 0,
            log_every_n_steps=options.log_every,
            logger=[self.csv, *extra_loggers(options.loggers, self.out / "logs", self.recipe.name)],
            callbacks=[
                RandomStreams(self.recipe.seed),
                NonFiniteGuard(),
                self.progress,
                *([self.average] if self.average is not None else []),
                self.keeper,  # Lightning calls it last: it writes what the others hold
            ],
            plugins=[checkpoint_io.SafeCheckpointIO()],
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(self.out),
        )

    def _choose(self, trainer: pl.Trainer, steps: int) -> tuple[dict[str, float], int]:
        """Put the chosen weights into the model; their validation metrics and step."""
        if trainer.limit_val_batches and self.keeper.judged != steps:
            trainer.validate(self.parts.task, dataloaders=self.parts.data.val_dataloader(), verbose=False)
        best = self.keeper.best_path
        if self.options.monitor is None or not best.is_file():
            if self.average is not None and self.average.average:
                self.average.put(self.parts.task, self.average.average)
            return dict(self.keeper.latest), steps
        payload = checkpoint_io.load(best)
        load_whole(self.parts.task, payload["state_dict"])
        return payload["metrics"], int(payload["step"])

    def _unsharded(self, weights: dict[str, Tensor]) -> nn.Module:
        """The trained model in one piece, on the CPU."""
        if self.options.strategy != "fsdp":
            return self.parts.model.cpu()
        parts = assemble(self.recipe)
        parts.task.load_state_dict(weights)
        return parts.model

    def _publish(
        self, trainer: pl.Trainer, model: nn.Module, metrics: dict[str, float], steps: int, chosen: int, seconds: float
    ) -> None:
        from zoo.hub import artifact, peft

        recipe, data = self.recipe, self.parts.data
        if lora_layers(model):
            peft.save(
                model,
                self.out / "adapter",
                base=recipe.init,
                saved=head_modules(model),
                tokenizer=self.parts.tokenizer,
                recipe=to_dict(recipe),
                outputs={"task_kind": data.task_kind, "classes": list(data.classes)},
            )
            remove_lora(model)  # the artifact is a model like any other
        plot_curves(self.csv.path, self.out / "curves.png", recipe.name)
        batches = len(self.data.loader) if self.data.loader is not None else 0
        run = {
            "name": recipe.name,
            "seed": recipe.seed,
            "steps": steps,
            "chosen_step": chosen,
            "epochs": round(steps * self.options.accumulate / batches, 3) if batches else None,
            "metrics": metrics,
            "monitor": self.options.monitor,
            "parameters": sum(p.numel() for p in model.parameters()),
            "timing": {"train_seconds": round(seconds, 2)},
            "versions": record.versions(),
            "git": record.git_state(),
            "hardware": record.hardware(trainer.strategy.root_device),
            "data": {
                "files": data.files(),
                "task_kind": data.task_kind,
                "num_outputs": data.num_outputs,
                "classes": list(data.classes),
                **self.facts,
            },
            "recipe": to_dict(recipe),
        }
        artifact.save(
            model,
            self.out / "artifact",
            tokenizer=self.parts.tokenizer,
            recipe=to_dict(recipe),
            run=run,
            metrics_csv=self.csv.path,
            overwrite=True,  # only ever this run's own: claim_folder refused any other
        )


def _total(batches: int, data: Streamed) -> int:
    from zoo.train.stream import total_steps

    return total_steps(batches, data.max_steps, data.max_epochs, data.accumulate)


def _metrics(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    return {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}


def _parameters(model: nn.Module) -> str:
    trained, in_all = trainable(model)
    return f"{in_all:,} parameters" if trained == in_all else f"{trained:,} of {in_all:,} parameters"


def _why(trainer: pl.Trainer) -> str:
    if trainer.strategy.root_device.type != "cpu":
        return "the accelerator found"
    return "no GPU found" if not torch.cuda.is_available() else "as the recipe asks"
