"""What the assembly of a run has to know of vision-language models: stages, and where their parts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, ZooError
from zoo.models.decoder import Decoder
from zoo.models.mqt import MQT
from zoo.nn.lora import lora_layers
from zoo.nn.timm_tower import TimmTower
from zoo.train.recipe import RecipeConfig

CLIP = "vision_model."


def check_questions(recipe: RecipeConfig, config: Any, data: Any) -> None:
    """Raise ZooError where model and questions do not go together, or a frozen part would be left at random."""
    if not hasattr(config, "image_token"):
        return  # the task says which models it takes
    if config.size != data.config.preprocess.size:
        where = "timm" if config.timm else "tower"
        raise ZooError(
            f"model.{where}.size is {config.size}, but data.preprocess.size is {data.config.preprocess.size}: set both "
            "to one number"
        )
    if config.image_token != data.config.image_token:
        raise ZooError(f"model.image_token is {config.image_token}, but data.image_token {data.config.image_token}")
    if config.lm.vocab_size < data.tokenizer.vocab_size:
        raise ZooError(
            f"model.lm.vocab_size is {config.lm.vocab_size}, but there are {data.tokenizer.vocab_size} words"
        )
    lora = (recipe.finetune or {}).get("mode") == "lora"
    for part, frozen in (("tower", config.freeze_tower or lora), ("lm", config.freeze_lm or lora)):
        given = recipe.init or recipe.task.get(part) or recipe.task.get("random_frozen")
        if frozen and not given:
            raise ConfigError(
                f"model.freeze_{part} keeps the {part} as it is, and nothing says where its weights come from: name "
                f"them as task.{part}, start from init, train it (model.freeze_{part}=false), or set "
                "task.random_frozen=true to train behind random weights"
            )


def equip(task: Any) -> None:
    """Fill tower and decoder of a task's model from what its config names.

    Raises:
        ZooError: nothing there, or weights of another architecture.
    """
    config = task.config
    for part in ("tower", "lm"):
        ref = getattr(config, part, "")
        if not ref or not isinstance(task.model, MQT):
            continue
        if lora_layers(task.model):
            raise ConfigError(f"task.{part} names weights to start from, which adapters take from init alone")
        (load_tower if part == "tower" else load_decoder)(task.model, ref)


def load_tower(model: MQT, ref: str) -> None:
    """The vision tower of *ref*: an MQT, CLIP in transformers' layout (file, folder or Hub id), or timm's own weights.

    Raises:
        ZooError: as `zoo.load`, or weights of another architecture.
    """
    state, found = _read(ref)
    if found is not None:
        if not isinstance(found, MQT):
            raise ZooError(f"task.tower '{ref}' holds a {type(found).__name__}, which has no vision tower")
        _fill(model.tower, found.tower.state_dict(), f"the tower of {ref}")
    elif isinstance(model.tower, TimmTower):
        model.tower.load_official(state, ref)
    else:
        from zoo.convert.mqt import clip_to_zoo

        eyes = {key: value for key, value in state.items() if key.startswith(CLIP)}
        if not eyes:
            raise ZooError(f"task.tower '{ref}' holds no CLIP: none of its tensors is called {CLIP}...")
        _fill(model.tower, clip_to_zoo(eyes, model.config.tower), ref)


def load_decoder(model: MQT, ref: str) -> None:
    """The decoder of *ref*: an MQT, any decoder of the zoo, or a Llama in transformers' layout.

    Raises:
        ZooError: as `zoo.load`, or weights of another architecture.
    """
    state, found = _read(ref)
    if found is None:
        from zoo.convert import llama

        if not llama.is_llama(state):
            raise ZooError(f"task.lm '{ref}' is no Llama: it lacks the tensor model.embed_tokens.weight")
        _fill(model.lm, llama.to_zoo(state, model.config.lm, "mqt"), ref)
        return
    lm = found.lm if isinstance(found, MQT) else found
    if not isinstance(lm, Decoder):
        raise ZooError(f"task.lm '{ref}' holds a {type(found).__name__}, which has no decoder")
    _fill(model.lm, lm.state_dict(), f"the decoder of {ref}")


def _read(ref: str) -> tuple[dict[str, Tensor], nn.Module | None]:
    """Official tensors, or the model of an artifact."""
    from zoo import catalogue
    from zoo.convert.official import open_official
    from zoo.hub import artifact, client, files
    from zoo.hub.names import parse_ref

    place = Path(ref).expanduser()
    if ref in catalogue.ENTRIES or (place / files.FILES).is_file() or place.name == "artifact":
        return {}, artifact.load(ref).model
    if not place.exists():
        wanted = parse_ref(ref)
        place = client.pull(wanted.repo, wanted.revision, what=ref)
        if (place / files.FILES).is_file():
            return {}, artifact.load(place).model
    return open_official(place)[0], None


@torch.no_grad()
def _fill(part: nn.Module, state: dict[str, Tensor], where: str) -> None:
    ours = part.state_dict()
    for key in {**ours, **state}:
        here, there = (list(s[key].shape) if key in s else "absent" for s in (ours, state))
        if here != there:
            raise ZooError(f"{where} is of another architecture: '{key}' is {there} there and {here} in the model")
    part.load_state_dict(state)
