"""What a run would be, without running it: the resolved recipe, sizes, steps, memory, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from zoo.cli.common import short, table
from zoo.config import to_dict
from zoo.train.assemble import Parts, assemble, check_monitor
from zoo.train.recipe import RecipeConfig
from zoo.train.stream import total_steps


def describe(recipe: RecipeConfig) -> str:
    """The text of `--dry-run`: everything is built and checked as for the run itself; nothing is trained or written.

    Raises:
        ZooError: whatever would stop the run.
    """
    parts = assemble(recipe)
    check_monitor(recipe, parts.task.metric_names())
    options, data, model = recipe.trainer, parts.data, parts.model
    steps = total_steps(len(data.train_dataloader()), options.max_steps, options.max_epochs, options.accumulate)
    length, batch = data.max_tokens, data.config.batch_size
    devices = options.devices if isinstance(options.devices, int) and options.devices > 0 else 1
    ranks = devices * options.num_nodes
    tokens = length * batch * options.accumulate * ranks
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = [
        ("parameters", f"{count:,}" + ("" if trained == count else f" ({trained:,} trained)")),
        ("steps", f"{steps:,}"),
        ("tokens a step", f"{tokens:,} at most ({batch} x {length}" + _times(options.accumulate, ranks) + ")"),
        ("tokens in all", short(tokens * steps)),
        ("memory", memory(parts, batch, length)),
        ("classes", ", ".join(data.classes) if data.classes else "none"),
    ]
    files = [(file["path"], _size(Path(file["path"])), file["sha256"][:12]) for file in data.files()]
    text = yaml.safe_dump(to_dict(parts.recipe), sort_keys=False, allow_unicode=True)
    start = [f"start from {recipe.init}"] if recipe.init else []
    return "\n".join([text, table(rows, ("run", "")), "", table(files, ("file", "size", "sha256"), right=(1,)), *start])


def memory(parts: Parts, batch: int, length: int) -> str:
    """Estimate for a step: weights, gradients, AdamW's two moments, and what the forward pass keeps."""
    fixed = sum(p.numel() * (16 if p.requires_grad else 4) for p in parts.model.parameters())
    kept = activation_bytes(parts.model, batch, length)
    if kept is None:
        return f"{size(fixed)} for weights, gradients and optimiser; activations not estimated for this model"
    if parts.recipe.trainer.precision != "32-true":
        return f"about {size(fixed + kept)} at most ({size(fixed)} fixed, {size(kept)} activations in float32)"
    return f"about {size(fixed + kept)} ({size(fixed)} fixed, {size(kept)} activations)"


def activation_bytes(model: nn.Module, batch: int, length: int) -> int | None:
    """Bytes of distinct tensors that autograd keeps for one batch, counted on shapes alone; None where that fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Any] = {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            ghost = type(model)(model.config).train()
            own = {tensor.untyped_storage()._cdata for tensor in (*ghost.parameters(), *ghost.buffers())}

            def count(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage  # held, so that its address is not given to another
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                out = ghost(torch.zeros(batch, length, dtype=torch.long))
            total = sum(storage.nbytes() for storage in kept.values())
            del out
    except (NotImplementedError, RuntimeError, TypeError):  # an operator that cannot run on shapes alone
        return None
    return total


def size(count: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def _size(path: Path) -> str:
    return size(path.stat().st_size)


def _times(accumulate: int, ranks: int) -> str:
    extra = f", accumulated over {accumulate}" if accumulate > 1 else ""
    return extra + (f", on {ranks} devices" if ranks > 1 else "")
