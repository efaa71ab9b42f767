"""What the assembly of a run has to know of clips, and of questions about pictures: which parts go together."""

from __future__ import annotations

from typing import Any

from zoo import catalogue
from zoo.config import resolve
from zoo.errors import ZooError
from zoo.train import vision_language
from zoo.train.recipe import RecipeConfig

VIDEO_TASKS = ("video_reconstruction", "next_block", "vqa")


def check_fit(recipe: RecipeConfig, config: Any, data: Any) -> None:
    """Raise ZooError where the parts of a run on clips or their tokens contradict each other."""
    if recipe.task["name"] == "next_block":
        _check_tokens(config, data)
        return
    if recipe.task["name"] == "vqa":
        vision_language.check_questions(recipe, config, data)
        return
    from zoo.models.video import VideoModel

    kind = resolve(catalogue.lookup(catalogue.MODELS, recipe.model["name"], "model name"))
    if not issubclass(kind, VideoModel):
        raise ZooError(f"task 'video_reconstruction' needs a video tokenizer, not '{recipe.model['name']}'")


def _check_tokens(config: Any, data: Any) -> None:
    grid = getattr(config, "grid", None)
    if grid is None:
        return  # the task says which models it takes
    if tuple(grid) != data.grid:
        raise ZooError(f"model.grid is {list(grid)}, but the clips have {list(data.grid)} tokens")
    if config.video_vocab != data.first.vocab:
        raise ZooError(f"model.video_vocab is {config.video_vocab}, but the tokens are of {data.first.vocab} codes")
    if not config.cond_tokens:
        return
    if config.cond_tokens != 1:
        raise ZooError(f"cached clips have one class each, but model.cond_tokens is {config.cond_tokens}: set it to 1")
    if any((cache.labels < 0).any() for cache in data.caches.values()):
        raise ZooError("the model takes a class, but some of the cached clips have none")
    if config.cond_vocab < data.num_outputs:
        raise ZooError(f"model.cond_vocab is {config.cond_vocab}, but the clips are of {data.num_outputs} classes")
