"""Adapters in the format of `peft`: adapter_config.json and adapter_model.safetensors, read and written.

Tensors are called `base_model.model.<name in our model>`, so that `peft.PeftModel.from_pretrained(model, folder)`
works on a model of this zoo with the same head, and what peft saves for such a model is read here. A folder that this
zoo wrote also holds config.json (the model with its head), the tokenizer and the recipe, and is loaded by
`zoo.load(folder)` together with the weights of the base that it names.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zoo.config import from_dict, resolve, to_dict
from zoo.errors import ZooError
from zoo.hub import files
from zoo.nn.lora import LoRAConfig, LoRALinear, add_lora, lora_layers, remove_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# values of adapter_config.json that change what is computed, and the ones that are computed here
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "use_bdlora": (None, False),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "exclude_modules": (None, []),
}


def is_adapter(place: Path) -> bool:
    """Whether a folder holds an adapter and no whole artifact."""
    return (place / CONFIG).is_file() and not (place / files.FILES).is_file()


def tensors(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    """The adapter's tensors by peft's names; *saved* are the modules that are stored whole."""
    kept = {}
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            kept[f"{PREFIX}{name}.{part}.weight"] = getattr(layer, part).weight
    for module in saved:
        kept |= {f"{PREFIX}{module}.{name}": value for name, value in model.get_submodule(module).state_dict().items()}
    return kept


def describe(model: nn.Module, saved: list[str], base: str | None) -> dict[str, Any]:
    """adapter_config.json of a model with adapters."""
    layers = lora_layers(model)
    if not layers:
        raise ZooError("the model has no adapters to save")
    own = next(iter(layers.values())).config
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": own.rank,
        "lora_alpha": own.alpha,
        "lora_dropout": own.dropout,
        "use_rslora": own.rslora,
        "target_modules": sorted(layers),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    base: str | None,
    saved: list[str],
    tokenizer: Any = None,
    recipe: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
) -> Path:
    """Write the adapters of *model* and its modules *saved* (the head) into a folder.

    Args:
        model: with adapters, not merged.
        directory: made where it is not there; files of the same names are replaced.
        base: what the adapters were trained on: a reference that `zoo.load` takes.
        saved: names of the modules that were trained whole.
        tokenizer, recipe, outputs: written along, so that the folder can be used by itself.
    """
    from zoo.hub.artifact import family_of

    place = Path(directory).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    files.write_json(place / CONFIG, describe(model, saved, base))
    files.write_tensors(place / WEIGHTS, tensors(model, saved))
    described = {
        "schema": files.SCHEMA,
        "model": family_of(model),
        "config": to_dict(model.config),
        "outputs": {key: value for key, value in (outputs or {}).items() if value},
        "tokenizer": None if tokenizer is None else tokenizer.section()["name"],
    }
    files.write_json(place / files.CONFIG, described)
    if tokenizer is not None:
        tokenizer.save(place)
    if recipe is not None:
        import yaml

        text = yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
        (place / "recipe.yaml").write_text(text, encoding="utf-8")
    return place


def load(directory: str | Path, base: Any = None, *, merged: bool = True) -> Any:
    """The artifact of a base and an adapter.

    Args:
        directory: folder with adapter_config.json and adapter_model.safetensors, ours or peft's.
        base: reference or loaded artifact; None takes the one that the adapter names.
        merged: merge the adapters, so that the model is an ordinary one; otherwise they stay apart.

    Raises:
        ZooError: a damaged file, an adapter of another kind than LoRA, or one that does not fit the base.
    """
    from zoo.hub import artifact

    place = Path(directory).expanduser()
    content = files.read_json(place / CONFIG)
    wanted = base if base is not None else content.get("base_model_name_or_path")
    if not wanted:
        raise ZooError(f"{place / CONFIG} names no base (base_model_name_or_path): give it with adapter and base")
    start = artifact.load(wanted) if isinstance(wanted, str | Path) else wanted
    described = files.described(place) if (place / files.CONFIG).is_file() else None
    model = _with_head(start, described, place)
    apply(model, place, content)
    if merged:
        remove_lora(model)
    tokenizer = start.tokenizer
    if described and described["tokenizer"]:
        from zoo import tokenizers

        tokenizer = tokenizers.load(place)
    info = {**start.info, **(described or {}), "ref": str(directory)}
    return artifact.Artifact(model.eval(), tokenizer, place, info)


# config fields that may differ between an adapter's model and its base: outputs, and what a run left untrained
FREE = ("head", "chunks", "pool_pad_id", "freeze_tower", "freeze_lm")


def _with_head(start: Any, described: dict[str, Any] | None, place: Path) -> nn.Module:
    """The base's model under the config that stands beside the adapter: other heads, the same backbone."""
    from zoo import catalogue

    if described is None:
        return start.model
    target = catalogue.lookup(catalogue.MODELS, described["model"], f"model family in {place / files.CONFIG}:")
    cls = resolve(target)
    config = from_dict(resolve(catalogue.schema_target(target)), described["config"], "config")
    if type(start.model) is not cls:
        raise ZooError(f"{place} is an adapter for a {cls.__name__}, but its base is a {type(start.model).__name__}")
    differing = [f.name for f in dataclasses.fields(config) if f.name not in FREE]
    for name in differing:
        theirs, ours = getattr(start.model.config, name), getattr(config, name)
        if theirs != ours and "dropout" not in name:
            raise ZooError(f"{place} is an adapter for a model with {name}={ours!r}, but its base has {theirs!r}")
    with torch.random.fork_rng(devices=[]):
        model = cls(config)
    source, ours = start.model.state_dict(), model.state_dict()
    same = {key: value for key, value in source.items() if key in ours and ours[key].shape == value.shape}
    lacking = [key for key in ours if key not in same and key.startswith(("backbone.", "embed"))]
    if lacking:
        raise ZooError(f"{place} is an adapter for a model with '{lacking[0]}', which its base lacks")
    model.load_state_dict({**ours, **same})
    return model.to(next(iter(source.values())).dtype)


def apply(model: nn.Module, directory: str | Path, content: dict[str, Any] | None = None) -> nn.Module:
    """Put the adapter of a folder into *model*, in place; every tensor of the file must find its place.

    Raises:
        ZooError: a damaged file, an adapter of another kind than LoRA, or one that does not fit the model.
    """
    place = Path(directory)
    content = files.read_json(place / CONFIG) if content is None else content
    config, names = _read(content, model, place)
    try:
        stored = load_file(place / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{place / WEIGHTS} is missing, damaged or no safetensors file ({error})") from None
    add_lora(model, config, tuple(names))
    saved = [str(name) for name in content.get("modules_to_save") or ()]
    wanted = tensors(model, [name for name in saved if hasattr(model, name)])
    for name in [*wanted, *stored]:
        if name not in stored or name not in wanted:
            raise ZooError(f"{place / WEIGHTS} {'lacks' if name in wanted else 'holds'} '{name}', so it does not fit")
        if wanted[name].shape != stored[name].shape:
            raise ZooError(
                f"{place / WEIGHTS}: '{name}' is {list(stored[name].shape)}, the model makes it "
                f"{list(wanted[name].shape)}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    return model


def _read(content: dict[str, Any], model: nn.Module, place: Path) -> tuple[LoRAConfig, list[str]]:
    where = place / CONFIG
    if content.get("peft_type") != "LORA":
        raise ZooError(f"{where} is of the kind {content.get('peft_type')!r}; only LORA adapters are read")
    for key, plain in _PLAIN.items():
        if key in content and content[key] not in plain:
            raise ZooError(f"{where} has {key}={content[key]!r}, which this zoo does not compute")
    fields = {
        "rank": content.get("r"),
        "alpha": float(content.get("lora_alpha", 8)),
        "dropout": float(content.get("lora_dropout", 0.0)),
        "rslora": bool(content.get("use_rslora", False)),
    }
    names = matching(model, content.get("target_modules"))
    if not names:
        raise ZooError(f"{where}: no linear layer of the model is called {content.get('target_modules')!r}")
    return from_dict(LoRAConfig, fields, str(where)), names


def matching(model: nn.Module, targets: Any) -> list[str]:
    """Names of the linear layers that peft's `target_modules` means: ends of names, or one regular expression."""
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | LoRALinear)]
    if isinstance(targets, str):
        if targets == "all-linear":
            raise ZooError("target_modules is 'all-linear', which peft writes out when it saves: name the layers")
        try:
            return [name for name in linear if re.fullmatch(targets, name)]
        except re.error as error:
            raise ZooError(f"target_modules '{targets}' is no regular expression ({error})") from None
    ends = tuple(str(target) for target in targets or ())
    return [name for name in linear if any(name == end or name.endswith("." + end) for end in ends)]
