"""Metrics of a finished artifact on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from zoo import datamodules, tasks
from zoo.errors import ZooError
from zoo.tasks.strands import BOTH
from zoo.train.assemble import LABELS, LANGUAGE_TASKS, check_direction, check_fit, check_lengths, equip
from zoo.train.progress import quiet
from zoo.train.recipe import RecipeConfig, TrainerConfig


def opened(ref: Any) -> Any:
    """The artifact behind a folder, catalogue name or Hub id; an already loaded one is returned as it is."""
    if not isinstance(ref, str | Path):
        return ref
    from zoo.hub import artifact

    return artifact.load(str(ref))


def evaluate(
    ref: Any,
    section: dict[str, Any],
    split: Any = "test",
    *,
    accelerator: str = "auto",
    precision: str = "32-true",
) -> dict[str, float]:
    """Metrics of an artifact on *split* of the data set described by a `data` section, without a stage's prefix.

    Args:
        ref: folder, catalogue name, Hub id, or a loaded artifact.
        section: `{"name": ..., **fields}`, as in a recipe.
        split: which part of the data: train, val or test.
        accelerator, precision: as in Lightning's Trainer.

    Raises:
        ZooError: the data does not fit the model (labels, classes, lengths), or has no such split.
    """
    quiet()
    artifact = opened(ref)
    if artifact.tokenizer is None:
        raise ZooError("this artifact has no tokenizer, so it cannot read a data set of sequences")
    section = _with_classes(section, artifact.classes)
    trained = artifact.recipe.get("task", {})
    if trained.get("rc", "none") in BOTH and section["name"] == "labelled":
        section = {**section, "rc_views": True}
    if section["name"] == "labelled":
        section = {"frames": artifact.recipe.get("data", {}).get("frames", 1), **section}
    data = datamodules.build(section, artifact.tokenizer, 0)
    data.setup("test")
    task_section = _task(trained, LABELS.get(data.task_kind, data.task_kind))
    trainer = TrainerConfig(max_steps=1)
    recipe = RecipeConfig(name="evaluate", model={}, data=section, task=task_section, trainer=trainer)
    check_fit(recipe, artifact.model.config, artifact.tokenizer, data)
    check_lengths(artifact.model, artifact.tokenizer, data)
    check_direction(task_section, artifact.model)
    task = tasks.build(task_section, artifact.model)
    equip(task, artifact.tokenizer)
    runner = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    runner.test(task, dataloaders=data.loader(split, train=False), verbose=False)
    return {name.removeprefix("test/"): float(value) for name, value in runner.callback_metrics.items()}


def _with_classes(section: dict[str, Any], classes: list[str]) -> dict[str, Any]:
    """The data section with the artifact's order of classes.

    Raises:
        ZooError: the data names other classes.
    """
    own = section.get("classes")
    if not classes or own is None:
        return section
    if own and set(own) != set(classes):
        raise ZooError(
            f"the artifact tells {', '.join(classes)} apart, but the classes of the data are {', '.join(own)}"
        )
    return {**section, "classes": classes}


def _task(trained: dict[str, Any], kind: str) -> dict[str, Any]:
    """The task an artifact was trained with if it measures *kind* of labels, else that kind's plain one."""
    if kind == "lm":
        return trained if trained.get("name") in LANGUAGE_TASKS else {"name": "causal_lm"}
    return trained if trained.get("kind") == kind else {"name": "classify", "kind": kind}
