"""The recipe: one YAML, one typed object, checked whole before torch is imported."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any, Literal

from zoo import catalogue
from zoo.config import config, from_dict, schema, to_dict
from zoo.errors import ConfigError


@config
class TrainerConfig:
    """How long and on what to train.

    Attributes:
        max_steps: optimiser steps; -1 means: until max_epochs.
        max_epochs: passes over the training data; -1 means: until max_steps.
        accelerator, devices, num_nodes, precision: as in Lightning's Trainer.
        strategy: how several devices share the work; `fsdp` shards weights and optimiser state (PyTorch's FSDP2).
        accumulate: batches a optimiser step.
        grad_clip: largest gradient norm; 0 switches clipping off.
        val_every: optimiser steps between validations; 0 validates at the end of each epoch.
        checkpoint_every: optimiser steps between checkpoints.
        keep: checkpoints to keep.
        log_every: optimiser steps between logged lines.
        monitor, mode: the validation metric that picks the best weights (None: the last weights are taken).
        patience: validations without improvement before stopping; 0 never stops early.
        ema: decay of the moving average of the weights that is validated and published; 0 takes the weights themselves.
        threads: torch CPU threads; 0 leaves torch's choice.
        compile: torch.compile the model.
        loggers: besides the CSV that is always written.
    """

    max_steps: int = -1
    max_epochs: int = -1
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int | str = 1
    strategy: Literal[
        "auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "deepspeed", "deepspeed_stage_2", "deepspeed_stage_3"
    ] = "auto"
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = "32-true"
    accumulate: int = 1
    grad_clip: float = 1.0
    val_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 10
    monitor: str | None = None
    mode: Literal["min", "max"] = "min"
    patience: int = 0
    ema: float = 0.0
    threads: int = 0
    compile: bool = False
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()

    def __post_init__(self) -> None:
        if self.max_steps < 1 and self.max_epochs < 1:
            raise ValueError("trainer needs max_steps or max_epochs of at least 1")
        least = {"accumulate": 1, "checkpoint_every": 1, "keep": 1, "log_every": 1, "num_nodes": 1}
        least |= {"grad_clip": 0, "val_every": 0, "patience": 0, "threads": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"trainer.{name} must be at least {bound}, got {getattr(self, name)}")
        if isinstance(self.devices, int) and self.devices < 1 and self.devices != -1:
            raise ValueError(f"trainer.devices must be at least 1, or -1 for all there are, got {self.devices}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"trainer.ema must be at least 0 and below 1, got {self.ema}")


@config
class RecipeConfig:
    """Everything that decides a run. The four named sections hold `name` (a catalogue key) and its config's fields.

    Attributes:
        name: what the run is called.
        description: one line for `zoo list` and the card.
        seed: seeds weights, data order, dropout and augmentation.
        model, tokenizer, data, task: `{"name": ..., **fields}`; checked against the config class of that name.
        trainer: the training loop.
        init: artifact (folder, catalogue name or Hub id) whose weights are the start; None starts from scratch.
        finetune: which of those weights are trained: `mode` full, probe or lora, and `lora` (fields of LoRAConfig).
            None trains them all.
    """

    name: str
    description: str = ""
    seed: int = 0
    model: dict[str, Any]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any]
    task: dict[str, Any]
    trainer: TrainerConfig
    init: str | None = None
    finetune: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below {2**32}, got {self.seed}")


SECTIONS = {
    "model": catalogue.MODELS,
    "tokenizer": catalogue.TOKENIZERS,
    "data": catalogue.DATAMODULES,
    "task": catalogue.TASKS,
}


def validate(data: dict[str, Any]) -> RecipeConfig:
    """Check a composed recipe whole and return it with all defaults filled in. Imports neither torch nor Lightning.

    Raises:
        ConfigError: the first mistake, with its dotted path and the nearest valid name.
    """
    recipe = from_dict(RecipeConfig, data)
    filled: dict[str, Any] = {item.name: getattr(recipe, item.name) for item in fields(recipe)}
    for section, table in SECTIONS.items():
        if filled[section] or section != "tokenizer":  # pictures need none
            filled[section] = check_section(section, filled[section], table)
    if recipe.finetune is not None:
        checked: Any = from_dict(schema("zoo.train.finetune:FinetuneConfig"), recipe.finetune, "finetune")
        filled["finetune"] = to_dict(checked)
        if checked.mode != "full" and recipe.init is None:
            raise ConfigError(
                f"finetune.mode={checked.mode} needs weights to start from: give them with `zoo finetune --from REF` "
                "or as init"
            )
    return RecipeConfig(**filled)


def check_section(section: str, data: dict[str, Any], table: dict[str, str]) -> dict[str, Any]:
    """`{"name": ..., **fields}` with the fields checked against the named class's config and defaults filled in."""
    if "name" not in data:
        raise ConfigError(f"{section} needs a 'name' (one of: {', '.join(sorted(table))})")
    target = catalogue.lookup(table, data["name"], f"{section} name")
    rest = {key: value for key, value in data.items() if key != "name"}
    checked: Any = from_dict(schema(catalogue.schema_target(target)), rest, section)
    return {"name": data["name"], **to_dict(checked)}
