"""parity.safetensors: an input and what a model made of it when it was saved, replayed to prove it is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo.convert.parity import OutputCheck, compare
from zoo.errors import ZooError
from zoo.hub import files

SEED = 20
LENGTH = 128
# room for another machine's order of summation, far below what any change of a weight does
TOLERANCE = {
    torch.float64: (1e-6, 1e-5),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-2, 5e-2),
    torch.float16: (1e-2, 1e-2),
}


def example(model: nn.Module) -> dict[str, Tensor]:
    """Inputs made from a seed: what the model's own `example_inputs()` gives, or token ids [2, L], one row padded."""
    own: Any = getattr(model, "example_inputs", None)
    if own is not None:
        return dict(own())
    config: Any = model.config
    length = min(LENGTH, getattr(model, "max_len", None) or LENGTH)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[1, length - length // 4 :] = False
    return {"ids": ids, "valid": valid}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What *model* makes of *inputs*, by name: its tensors, and the hidden states that its head reads."""
    training = model.training
    seen: dict[str, Tensor] = {}
    head = getattr(model, "head", None)
    watch = [head.register_forward_pre_hook(lambda _, given: seen.update(hidden=given[0]))] if head is not None else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            result = model(**inputs)
    finally:
        model.train(training)
        for handle in watch:
            handle.remove()
    if isinstance(result, Tensor):
        return {**seen, "logits": result}
    named = result if isinstance(result, dict) else vars(result)
    return {**seen, **{name: value for name, value in named.items() if isinstance(value, Tensor)}}


def write(model: nn.Module, file: Path, inputs: dict[str, Tensor] | None = None) -> None:
    """Run *model* on *inputs* and store both.

    Raises:
        ZooError: an output is not finite; such a model is not worth publishing.
    """
    inputs = example(model) if inputs is None else inputs
    produced = outputs(model, inputs)
    for name, value in produced.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ZooError(f"the model gives numbers that are not finite ({name}), so it is not saved")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    atol, rtol = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.{name}": value for name, value in produced.items()}
    files.write_tensors(file, tensors, {"tolerance": json.dumps({"atol": atol, "rtol": rtol})})


def replay(model: nn.Module, file: Path) -> list[OutputCheck]:
    """Run *model* on the stored input and compare each stored output within the stored tolerance.

    Raises:
        ZooError: the file cannot be read, or holds no input or no output.
    """
    try:
        with safe_open(file, "pt") as stored:
            tolerance = json.loads((stored.metadata() or {})["tolerance"])
            limits = (float(tolerance["atol"]), float(tolerance["rtol"]))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise ZooError(f"{file} is damaged or no parity file ({error})") from None
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    wanted = {name.removeprefix("output."): value for name, value in tensors.items() if name.startswith("output.")}
    if not inputs or not wanted:
        raise ZooError(f"{file} holds no input or no output to compare")
    produced = outputs(model, inputs)
    return [compare(name, value, produced.get(name), limits) for name, value in wanted.items()]
