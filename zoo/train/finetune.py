"""Which weights a run trains: all of them, the head alone (linear probe), or low-rank adapters and the head."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from torch import nn

from zoo.config import config
from zoo.errors import ConfigError
from zoo.nn.lora import ALL_LINEAR, LoRAConfig, add_lora

# what stands behind the backbone and is made anew for a new kind of output
HEADS = ("head", "pooler", "transform", "chunk_head")
# layers that get adapters where finetune.lora.targets is empty, by the catalogue's name of the family
TARGETS = {
    "dnabert2": ("qkv", "out_proj"),
    "generator": ("qkv", "out_proj"),
    "metagene": ("qkv", "out_proj"),
    "hyenadna": ("in_proj", "out_proj"),
}


@config
class FinetuneConfig:
    """How much of the model a run trains.

    Attributes:
        mode: `full` trains every weight; `probe` the head alone, on a frozen backbone without dropout; `lora`
            low-rank adapters in the backbone and the head.
        lora: the adapters of mode lora.
    """

    mode: Literal["full", "probe", "lora"] = "full"
    lora: LoRAConfig = field(default_factory=LoRAConfig)


def in_head(name: str) -> bool:
    """Whether a parameter or module of this name belongs to the head."""
    return name.split(".")[0] in HEADS


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules of a model that make up its head and have weights, as peft's `modules_to_save` wants them.

    A head that is tied to the embedding has none. `trained_whole` of a model names parts that are trained like a head:
    what joins its pieces together, as the projector of a vision-language model does.
    """
    names = (*HEADS, *getattr(model, "trained_whole", ()))
    return [name for name in names if (part := getattr(model, name, None)) is not None and [*part.parameters()]]


def default_targets(model: nn.Module, family: str) -> tuple[str, ...]:
    """The linear layers that get adapters unless the recipe names others.

    A family's own are taken where every one of them exists (a recipe may have put other mixers in); else all linear
    layers of the backbone are.
    """
    ends = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    wanted = TARGETS.get(family, ())
    return wanted if wanted and ends.issuperset(wanted) else (ALL_LINEAR,)


def prepare(model: nn.Module, section: FinetuneConfig, family: str) -> list[nn.Module]:
    """Freeze and adapt *model* as *section* says; the modules that stay in evaluation mode while the rest trains.

    Raises:
        ConfigError: adapters for layers that the model does not have, or a probe without a head of its own.
    """
    if section.mode == "full":
        return []
    if section.mode == "probe" and not head_modules(model):
        raise ConfigError("finetune.mode=probe trains the head, but this model's head is tied to its embedding")
    whole = head_modules(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.split(".")[0] in whole)
    if section.mode == "lora":
        add_lora(model, section.lora, section.lora.targets or default_targets(model, family))
        return []
    return [part for name, part in model.named_children() if name not in whole]


def trainable(model: Any) -> tuple[int, int]:
    """(parameters that are trained, parameters in all)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, wanted in sizes if wanted), sum(n for n, _ in sizes)
