"""What a recipe would do, found out without training: sizes, steps, memory, files."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from zoo import catalogue, tasks, tokenizers
from zoo.config import from_dict, resolve, to_dict
from zoo.hub import files
from zoo.train import images
from zoo.train.assemble import (
    build_data,
    build_model,
    check_direction,
    check_fit,
    check_lengths,
    check_monitor,
    equip,
    finetuning,
    load_start,
    model_config,
    with_strands,
)
from zoo.train.finetune import prepare, trainable
from zoo.train.recipe import RecipeConfig
from zoo.train.stream import total_steps


@dataclass(frozen=True)
class DryRun:
    """What `zoo train --dry-run` prints.

    Attributes:
        recipe: the resolved recipe, every default filled in.
        parameters: all of the model (and of its adapters).
        trained: those that the run changes.
        batch, length: samples a batch, and tokens of the data's longest row.
        tokens_per_step: tokens of one optimiser step on all devices, at most.
        steps: optimiser steps of the run.
        epochs: passes over the training data.
        memory: bytes by what needs them: weights, gradients, optimiser, activations.
        classes: names of the outputs.
        files: `path`, `bytes` and `sha256` of each data file.
        notes: (what, words) that the task has to say of itself.
        pending: the recipe's `init` where that run has not been made yet; sizes are then the recipe's own.
    """

    recipe: dict[str, Any]
    parameters: int
    trained: int
    batch: int
    length: int
    tokens_per_step: int
    steps: int
    epochs: float
    memory: dict[str, int]
    classes: tuple[str, ...]
    files: list[dict[str, Any]]
    notes: tuple[tuple[str, str], ...] = ()
    pending: str | None = None


@dataclass(frozen=True)
class Planned:
    """The config of an artifact, without its weights."""

    config: Any


@dataclass(frozen=True)
class Start:
    """What a dry run has to know of the artifact that a run starts from."""

    model: Planned
    tokenizer: Any


def plan_start(ref: str) -> Start | None:
    """Config and tokenizer of the artifact *ref*, its weights unread; None where an earlier run is still to make it.

    Raises:
        ZooError: as `zoo.load`, for anything but the missing folder of a run.
    """
    place = Path(ref).expanduser()
    if place.name == "artifact" and not place.exists():
        return None
    if not (place / files.FILES).is_file():
        return load_start(ref)
    described = files.described(place)
    target = catalogue.lookup(catalogue.MODELS, described["model"], f"model family in {place / files.CONFIG}:")
    made = from_dict(resolve(catalogue.schema_target(target)), described["config"], "config")
    tokenizer = tokenizers.load(place) if described["tokenizer"] else None
    return Start(Planned(made), tokenizer)


def dry_run(recipe: RecipeConfig) -> DryRun:
    """Everything `train` checks, and what it would cost; the model is never given memory.

    Raises:
        ZooError: what `train` would raise before its first step.
    """
    recipe = dataclasses.replace(recipe, data=with_strands(recipe.data, recipe.task))
    start = plan_start(recipe.init) if recipe.init else None
    pending = recipe.init if start is None else None
    tokenizer, data = build_data(recipe, start)
    data.setup("fit")
    config = model_config(recipe.model, start, recipe.init)
    check_fit(recipe, config, tokenizer, data)
    with torch.device("meta"):  # shapes only: neither memory nor arithmetic
        model = build_model(recipe.model["name"], config)
    check_lengths(model, tokenizer, data)
    check_direction(recipe.task, model)
    with torch.device("meta"):
        prepare(model, finetuning(recipe), recipe.model["name"])
    trained, in_all = trainable(model)
    task = tasks.build(recipe.task, model)
    equip(task, tokenizer)
    check_monitor(recipe, task.metric_names(), data)
    options = recipe.trainer
    batches = len(data.train_dataloader())
    steps = total_steps(batches, options.max_steps, options.max_epochs, options.accumulate)
    size = recipe.data.get("batch_size", 1)
    devices = options.devices if isinstance(options.devices, int) and options.devices > 0 else 1
    full = dataclasses.replace(recipe, model={"name": recipe.model["name"], **to_dict(config)})
    return DryRun(
        recipe=to_dict(full),
        parameters=in_all,
        trained=trained,
        batch=size,
        length=data.max_tokens,
        tokens_per_step=size * data.max_tokens * options.accumulate * devices * options.num_nodes,
        steps=steps,
        epochs=steps * options.accumulate / batches,
        memory=memory(model, size, data.max_tokens, options.precision),
        classes=tuple(data.classes),
        files=[{**item, "bytes": Path(item["path"]).stat().st_size} for item in data.files()],
        notes=tuple(task.notes()) if hasattr(task, "notes") else (),
        pending=pending,
    )


def memory(model: nn.Module, batch: int, length: int, precision: str) -> dict[str, int]:
    """Bytes on one device for a batch [batch, length]: AdamW's two moments, and what the backward pass keeps.

    *model* lies on the meta device; the activations are those that autograd keeps in a forward pass over shapes.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # or its address could be given to the next one
        return tensor

    alive: list[torch.Tensor] = []
    model.train()
    text = {"ids": torch.zeros(batch, length, dtype=torch.long, device="meta")}
    inputs = images.meta_inputs(model, batch, length) or text
    # autocast knows no meta device, and without arithmetic there is no precision to choose
    untouched = patch.object(torch, "autocast", lambda *args, **options: nullcontext())
    with untouched, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    activations = sum(size for place, size in kept.items() if place not in own)
    if precision in ("bf16-mixed", "16-mixed"):
        activations //= 2
    return {"weights": weights, "gradients": trained, "optimiser": 2 * trained, "activations": activations}
