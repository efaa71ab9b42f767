"""Tasks: what is minimised and what is measured. Each is a LightningModule around one model and one config."""

from __future__ import annotations

from typing import Any

from zoo import catalogue
from zoo.config import from_dict, resolve


def build(section: dict[str, Any], model: Any) -> Any:
    """The task that a recipe's `task` section (`{"name": ..., **fields}`) describes, around *model*.

    Raises:
        ConfigError: unknown task, unknown field or a wrong type.
    """
    target = catalogue.lookup(catalogue.TASKS, section["name"], "task name")
    fields = {key: value for key, value in section.items() if key != "name"}
    return resolve(target)(model, from_dict(resolve(catalogue.schema_target(target)), fields, "task"))
