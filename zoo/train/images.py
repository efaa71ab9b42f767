"""What the assembly of a run has to know of pictures: which parts go together, stages, and teachers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.errors import ZooError, nearest
from zoo.train import videos, vision_language
from zoo.train.recipe import RecipeConfig

IMAGE_TASKS = ("image_reconstruction", "proxy_codes", "flow_matching", "token_generation", *videos.VIDEO_TASKS)


def check_fit(recipe: RecipeConfig, config: Any, data: Any) -> bool:
    """Whether this is a run on pictures or their tokens; raises ZooError where its parts contradict each other."""
    task, serves = recipe.task["name"], getattr(data, "serves", ())
    if not serves:
        if task in IMAGE_TASKS:
            raise ZooError(f"task '{task}' needs pictures or clips, or their tokens, not data '{recipe.data['name']}'")
        return False
    if task not in serves:
        raise ZooError(f"task '{task}' does not go with data '{recipe.data['name']}'" + nearest(task, serves))
    if getattr(data, "modality", "") in ("video", "vqa"):
        videos.check_fit(recipe, config, data)
        return True
    if task == "token_generation":
        _check_tokens(config, data)
        return True
    if task == "flow_matching" and getattr(config, "vae", None) and not (recipe.task.get("vae") or recipe.init):
        raise ZooError("the model's VAE is not trained here: name the artifact of one as task.vae")
    size = data.config.preprocess.size
    wanted = getattr(getattr(config, "preprocess", None), "size", None)
    if wanted is None:
        raise ZooError(f"task '{task}' needs a model of pictures, not '{recipe.model['name']}'")
    if size != wanted:
        raise ZooError(
            f"the model takes pictures of {wanted} pixels, but data.preprocess.size is {size}: set both to one number"
        )
    return True


def _check_tokens(config: Any, data: Any) -> None:
    codes, length = getattr(config, "codes", None), getattr(config, "length", None)
    if codes is None or length is None:
        return  # the task says which models it takes
    if codes != data.first.vocab:
        raise ZooError(f"model.codes is {codes}, but the tokens are of {data.first.vocab} codes")
    if length != data.max_tokens:
        raise ZooError(f"model.length is {length}, but the pictures have {data.max_tokens} tokens")
    if config.classes < data.num_outputs:
        raise ZooError(f"model.classes is {config.classes}, but the pictures are of {data.num_outputs} classes")


def load_weights(model: nn.Module, source: nn.Module) -> bool:
    """Fill a stage-2 TiTok from a stage-1 one; False where the weights are to be copied as they are."""
    adopt = getattr(model, "adopt_stage1", None)
    return bool(adopt is not None and isinstance(source, type(model)) and adopt(source))


def meta_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Any]:
    """Inputs of a training step without memory, [batch, ...], for a model that makes its own examples; else {}.

    *length* is that of the longest text, for a model that reads one beside its pictures.

    Quantizers are put into evaluation: their codebook statistics depend on values, of which there are none.
    """
    if hasattr(model, "step_inputs"):
        return model.step_inputs(batch, length)  # type: ignore[operator]
    if not hasattr(model, "example_inputs"):
        return {}
    for module in model.modules():
        if hasattr(module, "lookup"):
            module.eval()
    made = model.example_inputs()  # type: ignore[operator]
    return {
        name: torch.empty((batch, *value.shape[1:]), dtype=value.dtype, device="meta") for name, value in made.items()
    }


def equip(task: Any) -> None:
    """Give a task the models that its config names: tasks cannot open artifacts.

    Raises:
        ZooError: it is no artifact, or one of another model.
    """
    vision_language.equip(task)
    for field, kind in (("vqgan", "MaskGITVQGAN"), ("vae", "FlexTokVAE")):
        ref = getattr(task.config, field, "")
        if not ref:
            continue
        from zoo.hub import artifact

        model = artifact.load(ref).model
        if type(model).__name__ != kind:
            raise ZooError(f"task.{field} '{ref}' holds a {type(model).__name__}, not a {kind}")
        getattr(task, f"set_{field}")(model)
