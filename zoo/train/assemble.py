"""From a recipe to its parts: tokenizer, data, model, task; every contradiction between them is found here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zoo import catalogue, datamodules, tasks, tokenizers
from zoo.config import from_dict, resolve, to_dict
from zoo.errors import ConfigError, ZooError, nearest
from zoo.tasks.strands import BOTH
from zoo.train import images
from zoo.train.finetune import FinetuneConfig, in_head, prepare
from zoo.train.recipe import RecipeConfig

LANGUAGE_TASKS = ("causal_lm", "masked_lm")
OUTPUT = ("head.", "chunk_head.")  # weights that belong to the outputs of one task
LABELS = {"token": "multiclass"}  # what task.kind is called for labels that are called otherwise in the data


@dataclass
class Parts:
    """What a recipe describes, built. `recipe` has its model section completed."""

    recipe: RecipeConfig
    tokenizer: Any
    data: Any
    model: nn.Module
    task: Any


def build_data(recipe: RecipeConfig, start: Any = None) -> tuple[Any, Any]:
    """(tokenizer, data) of a recipe; the tokenizer is that of artifact *start* where the recipe names none."""
    tokenizer = tokenizers.build(recipe.tokenizer) if recipe.tokenizer else getattr(start, "tokenizer", None)
    return tokenizer, datamodules.build(recipe.data, tokenizer, recipe.seed)


def assemble(recipe: RecipeConfig) -> Parts:
    """Build everything, cheapest and most likely to be wrong first: the files' sha256 are checked before the model.

    Raises:
        ZooError: a file is missing or changed; data, tokenizer, model, task and initial weights do not go together.
    """
    recipe = dataclasses.replace(recipe, data=with_strands(recipe.data, recipe.task))
    start = load_start(recipe.init) if recipe.init else None
    tokenizer, data = build_data(recipe, start)
    data.prepare_data()
    data.setup("fit")
    config = model_config(recipe.model, start, recipe.init)
    check_fit(recipe, config, tokenizer, data)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model["name"], config)
    if start is not None:
        load_weights(model, start.model, str(recipe.init))
    check_lengths(model, tokenizer, data)
    check_direction(recipe.task, model)
    frozen = prepare(model, finetuning(recipe), recipe.model["name"])
    task = tasks.build(_with_weights(recipe.task, data), model)
    task.frozen = frozen
    task.train()
    equip(task, tokenizer)
    images.equip(task)
    full = dataclasses.replace(recipe, model={"name": recipe.model["name"], **to_dict(config)})
    if tokenizer is not None and not recipe.tokenizer:
        full = dataclasses.replace(full, tokenizer=tokenizer.section())
    return Parts(full, tokenizer, data, model, task)


def with_strands(data: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """The data section with what the task's policy for the two strands (`task.rc`) needs.

    Raises:
        ConfigError: the data set has no strands to offer.
    """
    policy = task.get("rc", "none")
    if policy == "none":
        return data
    target = catalogue.lookup(catalogue.DATAMODULES, data["name"], "data name")
    known = {item.name for item in dataclasses.fields(resolve(catalogue.schema_target(target)))}
    if "rc_views" not in known:
        raise ConfigError(f"task.rc={policy} is for labelled sequences; data '{data['name']}' offers no reverse strand")
    changed = dict(data)
    if policy in ("augment", "average"):
        changed["rc_augment"] = True
    if policy in BOTH:
        changed["rc_views"] = True
    return changed


def finetuning(recipe: RecipeConfig) -> FinetuneConfig:
    """The `finetune` section as an object; every weight is trained where there is none."""
    return from_dict(FinetuneConfig, recipe.finetune or {}, "finetune")


def load_start(ref: str) -> Any:
    """The artifact whose weights a run starts from."""
    from zoo.hub import artifact

    return artifact.load(ref)


def build_model(name: str, config: Any) -> nn.Module:
    """The catalogue's model *name* from its config.

    Raises:
        ConfigError: its numbers build no model (no layers, widths that do not divide).
    """
    cls = resolve(catalogue.lookup(catalogue.MODELS, name, "model name"))
    try:
        return cls(config)
    except ZooError:
        raise
    except (ValueError, ArithmeticError, RuntimeError) as error:
        # the types fit, the numbers may not: constructors trust their config and fail in their own ways
        first = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ConfigError(f"model: no {name} can be built from these numbers ({first})") from error


def model_config(section: dict[str, Any], start: Any = None, ref: str | None = None) -> Any:
    """The config a `model` section describes; with *start* the fields it leaves out are that artifact's, but the head.

    Raises:
        ConfigError: unknown field or wrong type.
        ZooError: the artifact is of another family.
    """
    target = catalogue.lookup(catalogue.MODELS, section["name"], "model name")
    config_class = resolve(catalogue.schema_target(target))
    fields = {key: value for key, value in section.items() if key != "name"}
    if start is None:
        return from_dict(config_class, fields, "model")
    if not isinstance(start.model.config, config_class):
        raise ZooError(f"the recipe trains a {section['name']}, but {ref} holds a {type(start.model).__name__}")
    base = {key: value for key, value in to_dict(start.model.config).items() if key != "head" or "head" not in fields}
    return from_dict(config_class, _merge(base, fields), "model")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_weights(model: nn.Module, source: nn.Module, ref: str) -> None:
    """Copy the weights of *source* into *model*; its head too when both heads are alike, else the new one stays fresh.

    Raises:
        ZooError: they are of different architectures; names the first difference.
    """
    if images.load_weights(model, source):
        return
    ours, theirs = model.state_dict(), source.state_dict()
    heads = [getattr(m.config, "head", None) for m in (model, source)]
    same_head = to_dict(heads[0]) == to_dict(heads[1])
    if not same_head:  # what stands before an output layer (BERT's pooler, its transform) stays where both have it
        shared = {key for key in theirs if key in ours and not key.startswith(OUTPUT)}
        theirs = {key: value for key, value in theirs.items() if key in shared or not in_head(key)}
        theirs |= {key: value for key, value in ours.items() if in_head(key) and key not in shared}
    differing = [key for key in {**ours, **theirs} if _shape(ours, key) != _shape(theirs, key)]
    lengths = [getattr(m.config, "max_len", None) for m in (model, source)]
    if lengths[0] != lengths[1]:
        raise ZooError(
            f"model.max_len is {lengths[0]} here but {lengths[1]} in {ref}, whose weights are tied to that number"
        )
    if differing:
        key = differing[0]
        raise ZooError(
            f"{ref} is of another architecture than the recipe's model: {key} is {_shape(theirs, key)} there and "
            f"{_shape(ours, key)} here{_changed(source.config, model.config)}"
        )
    model.load_state_dict(theirs)


def _shape(state: dict[str, Any], key: str) -> Any:
    return list(state[key].shape) if key in state else "absent"


def _changed(there: Any, here: Any) -> str:
    old, new = to_dict(there), to_dict(here)
    changed = [
        f"model.{key} is {old[key]} there, {new[key]} here" for key in new if key != "head" and old[key] != new[key]
    ]
    return f" ({'; '.join(changed)})" if changed else ""


def check_fit(recipe: RecipeConfig, config: Any, tokenizer: Any, data: Any) -> None:
    """Raise ZooError where task, head and labels contradict each other, before the model is built."""
    kind, task = data.task_kind, recipe.task["name"]
    if images.check_fit(recipe, config, data):
        return
    if (kind == "lm") != (task in LANGUAGE_TASKS):
        raise ZooError(
            f"task '{task}' does not go with data '{recipe.data['name']}', "
            + ("which has no labels: use causal_lm" if kind == "lm" else f"whose labels are {kind}: use classify")
        )
    head = getattr(config, "head", None)
    if head is None:
        return
    if kind == "lm":
        if head.kind != "lm":
            raise ZooError(f"task '{task}' needs a language-model head: set model.head.kind=lm, not {head.kind}")
        return
    wanted = LABELS.get(kind, kind)
    if recipe.task.get("kind", wanted) != wanted:
        raise ZooError(
            f"task.kind is {recipe.task['kind']} but the labels of the data are {kind}: set task.kind={wanted}"
        )
    if head.kind == "lm":
        fitting = "token" if kind == "token" else "sequence"
        raise ZooError(f"the labels are {kind}, so the model needs a head for them: set model.head.kind={fitting}")
    if (kind == "token") != (head.kind == "token"):
        right = "token" if kind == "token" else "sequence"
        raise ZooError(f"model.head.kind is {head.kind} but the labels are {kind}: set model.head.kind={right}")
    if head.slots > 1 and not recipe.data.get("per_base"):
        raise ZooError(f"model.head.slots is {head.slots}, which needs labels of single bases: set data.per_base=true")
    if head.num_outputs != data.num_outputs:
        names = f" ({', '.join(data.classes)})" if len(data.classes) <= 12 and data.classes else ""
        raise ZooError(
            f"model.head.num_outputs is {head.num_outputs} but the data has {data.num_outputs} "
            f"{'targets' if kind == 'regression' else 'classes'}{names}: set model.head.num_outputs={data.num_outputs}"
        )


def check_lengths(model: Any, tokenizer: Any, data: Any) -> None:
    """Raise ZooError when the vocabulary or the longest sample is larger than the model's."""
    rows = model.embed.num_embeddings if hasattr(model, "embed") else None
    if tokenizer is not None and rows is not None and tokenizer.vocab_size > rows:
        raise ZooError(f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocabulary only {rows}")
    longest, limit = data.max_tokens, getattr(model, "max_len", None)
    if limit is not None and longest > limit:
        raise ZooError(
            f"the data has sequences of {longest} tokens but the model takes at most {limit}: "
            "raise model.max_len, or shorten the data explicitly"
        )


def check_direction(task: dict[str, Any], model: Any) -> None:
    """Raise ZooError when a model that sees ahead is to predict the next token: it would read the answer."""
    if task["name"] == "causal_lm" and getattr(model, "layout_kind", "causal") == "full":
        raise ZooError(
            "task 'causal_lm' predicts the next token, which this model sees: train it with masked_lm, or take a model "
            "that only looks back"
        )


def _with_weights(section: dict[str, Any], data: Any) -> dict[str, Any]:
    """The task section with the class weights that the data offers, unless the recipe gives its own."""
    weights = getattr(data, "class_weights", None)
    if weights is None or section.get("class_weights") or section["name"] != "classify":
        return section
    return {**section, "class_weights": [float(weight) for weight in weights]}


def equip(task: Any, tokenizer: Any) -> None:
    """Tell a task what it has to know of the vocabulary: tasks themselves do not know tokenizers."""
    if tokenizer is not None and hasattr(task, "set_bases"):
        task.set_bases(bases_of(tokenizer))
    if tokenizer is not None and hasattr(task, "set_kmers"):
        ignored = tuple(tokenizer.special[name] for name in ("unk", "pad") if name in tokenizer.special)
        task.set_kmers(kmers_of(tokenizer), ignored)
    if tokenizer is not None and hasattr(task, "set_vocabulary"):
        task.set_vocabulary(tokenizer.vocab_size, tokenizer.special, tokenizer.hidden)


def kmers_of(tokenizer: Any) -> list[list[int]] | None:
    """The letters of each token as numbers 0 to 3, -1 where it is no k-mer; None unless all others are k of four."""
    letters, k = getattr(tokenizer.config, "alphabet", ""), getattr(tokenizer, "k", 0)
    if len(letters) != 4 or not k:
        return None
    texts = (tokenizer.sequence([token]) for token in range(tokenizer.vocab_size))
    return [[letters.index(letter) for letter in text] if len(text) == k else [-1] * k for text in texts]


def bases_of(tokenizer: Any) -> list[int]:
    """How many of A, C, G, T each token id stands for; 0 where it holds anything else (specials, N, IUPAC)."""
    texts = (tokenizer.sequence([token]) for token in range(tokenizer.vocab_size))
    return [len(text) if text and not set(text.upper()) - set("ACGT") else 0 for text in texts]


def check_monitor(recipe: RecipeConfig, names: list[str], data: Any = None) -> None:
    """Raise ConfigError for a `trainer.monitor` that the task does not measure, or that nothing is measured for."""
    monitor = recipe.trainer.monitor
    if monitor is not None and data is not None and "val" not in data.sources:
        raise ConfigError(
            f"trainer.monitor is '{monitor}' but the data has no val split: give it one (data.val, data.val_fraction) "
            "or set trainer.monitor=null to keep the last weights"
        )
    if monitor is not None and monitor not in names:
        raise ConfigError(
            f"trainer.monitor '{monitor}' is not a validation metric of this task" + nearest(monitor, names)
        )
