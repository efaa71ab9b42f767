"""Model cards: generated from config, run, metrics and data. A section without facts is left out, never left blank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import catalogue
from zoo._resources import folder
from zoo.config import schema, to_dict
from zoo.hub.families import FAMILIES, Family, tiny_example

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact

TASK_TAGS = {
    "causal_lm": "text-generation",
    "lm": "text-generation",
    "masked_lm": "fill-mask",
    "classify": "text-classification",
    "multiclass": "text-classification",
    "multilabel": "text-classification",
}
METRIC_NAMES = {"mcc": "Matthews correlation", "accuracy": "accuracy", "f1": "macro F1", "auroc": "AUROC",
                "bits_per_base": "bits per base", "perplexity": "perplexity", "loss": "loss",
                "psnr": "PSNR, dB"}  # fmt: skip
FACTS = ("what", "value")  # a Markdown table needs a header, and an empty one shows as an empty row
# what to do with `model` of a published model that reads no text, by its task; sizes are those of the model
USES = {
    "reconstruct": "size = model.config.preprocess.size\n{call}(torch.rand(1, 3, size, size))  # a picture in [0, 1]",
    "reconstruct_video": "{call}(torch.rand(1, 3, 17, 128, 128))  # a clip of 17 frames in [0, 1]",
    "generate_images": (
        "ids = torch.zeros(1, model.config.length, dtype=torch.long)  # tokens of a picture\n"
        "with torch.no_grad():\n"
        "    logits = model(ids, torch.tensor([0]))  # of the first class\n"
        "print(logits.shape)"
    ),
    "generate_video": "{begin}\nprint(made.codes.shape)",
    "answer": (
        "size = model.config.tower.size\n"
        "ids = torch.tensor([1, model.config.image_token, 5])  # Vicuna's ids, the picture among them\n"
        "print(model.answer(ids, torch.rand(1, 3, size, size), m=4, new=3))  # with 4 visual tokens"
    ),
}
SPDX = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}


def entry_card(name: str) -> str:
    """The card of a published model of the catalogue, Markdown with a YAML header.

    Raises:
        ConfigError: no such model.
    """
    entry = catalogue.lookup(catalogue.ENTRIES, name, "model")
    family = FAMILIES.get(entry.model)
    defaults = to_dict(schema(catalogue.schema_target(catalogue.MODELS[entry.model]))())
    header = {
        "license": entry.licence if entry.licence in SPDX else "other",
        "library_name": "seqzoo",
        "tags": sorted({"seqzoo", entry.model, *(family.tags if family else ())}),
        "pipeline_tag": TASK_TAGS.get(entry.tasks[0]) if entry.tasks else None,
        "base_model": entry.hub,
    }
    facts = [
        ("family", entry.model),
        ("published as", f"[{entry.hub}](https://huggingface.co/{entry.hub})"),
        ("parameters", f"{entry.params:,}"),
        *_sizes(entry),
        ("tasks", ", ".join(entry.tasks)),
        ("licence of the weights", entry.licence),
    ]
    changed = {key: value for key, value in entry.config.items() if defaults.get(key) != value}
    more = "from zoo.generate.next_block import generate_blocks\n" if "generate_video" in entry.tasks else ""
    sections = [
        f"# {name}",
        family.about if family else "",
        table(FACTS, facts),
        _config_section(changed, entry.model),
        "## Use\nThe weights are those of the official repository, converted when they are loaded.\n\n"
        + code(
            "python needs-hub",
            f'import torch\nimport zoo\n{more}\nartifact = zoo.load("{name}")\n'
            + (_call(family.text if family else "", True) if entry.tokenizer else _visual_call(entry)),
        )
        + "\n\nThe same architecture with fresh weights, at a size that runs anywhere:\n\n"
        + code("python", tiny_example(entry.model, catalogue.MODELS[entry.model])),
        "## How it is checked\nNames, shapes and number of parameters of this checkpoint are compared with the "
        "published ones; the numbers of the official implementation are reproduced at small sizes with "
        "`zoo verify tests/parity/cases`.",
        "## Small models of the family\n" + family.measured if family and family.measured else "",
        "## Limits\n" + family.limits if family else "",
        "## Source\n" + family.paper if family else "",
    ]
    return front_matter(header) + "\n\n".join(part for part in sections if part) + "\n"


def _visual_call(entry: catalogue.Entry) -> str:
    """What to do with a published model that reads no text."""
    name, call = ("ids", "encode") if entry.vocab else ("latents", "encode_latents")
    begin = (
        "condition = torch.zeros(1, model.config.cond_tokens, dtype=torch.long)  # Llama's ids of the class name\n"
        "made = generate_blocks(model, condition)"
        if entry.config.get("cond_tokens")
        else "frames = torch.zeros(1, 1, *model.config.grid[1:], dtype=torch.long)  # codes of the first latent frame\n"
        "made = generate_blocks(model, frames=frames)"
    )
    lines = USES[entry.tasks[0]].format(call=f"{name} = model.{call}", begin=begin)
    shown = f"\nprint({name}.shape)" if entry.tasks[0].startswith("reconstruct") else ""
    return f"model = artifact.model\n{lines}{shown}"


def _sizes(entry: catalogue.Entry) -> list[tuple[str, str]]:
    if "answer" in entry.tasks:
        return [("visual tokens of a picture", f"1 to {entry.context:,}")]
    if entry.tokenizer:
        longest = f"{entry.context:,} tokens" if entry.context else "unbounded"
        return [("longest input", longest), ("vocabulary", f"{entry.vocab:,} tokens (`{entry.tokenizer}`)")]
    codes = f"{entry.vocab:,} codes" if entry.vocab else "continuous"
    if "generate_video" in entry.tasks:
        return [("longest input", f"{entry.context:,} tokens"), ("video codebook", codes)]
    what = "clip of 17 frames" if "reconstruct_video" in entry.tasks else "picture"
    return [(f"tokens of a {what}", f"{entry.context:,}"), ("codebook", codes)]


def artifact_card(artifact: Artifact) -> str:
    """The card of a trained artifact: what it is, data, settings, measured numbers, use, checks, limits."""
    run, recipe, outputs = artifact.run, artifact.recipe, artifact.info.get("outputs", {})
    family = FAMILIES.get(artifact.info["model"])
    name = str(run.get("name") or recipe.get("name") or artifact.info["model"])
    data = recipe.get("data", {})
    metrics = {key: value for key, value in run.get("metrics", {}).items() if isinstance(value, int | float)}
    sections = [
        f"# {name}",
        "\n\n".join(text for text in (recipe.get("description", ""), family.about if family else "") if text),
        table(FACTS, _artifact_facts(artifact)),
        _data_section(data, run.get("data", {})),
        _training_section(recipe, run),
        _metrics_section(metrics, data, run),
        "## Use\n" + code("python", _use(name, artifact, family)) + _command_line(outputs, artifact.info["model"]),
        "## How it is checked\n`parity.safetensors` holds an input and the outputs of these weights when they were "
        "saved; `files.json` the sha256 of every file. `zoo verify FOLDER` checks the files, loads the weights "
        "strictly and compares the outputs.",
        "## Limits\n" + " ".join(_limits(family, data, metrics)),
        "## Source\n" + family.paper if family else "",
    ]
    return front_matter(_artifact_header(name, artifact, metrics)) + "\n\n".join(p for p in sections if p) + "\n"


def _artifact_header(name: str, artifact: Artifact, metrics: dict[str, float]) -> dict[str, Any]:
    family = FAMILIES.get(artifact.info["model"])
    data = artifact.recipe.get("data", {})
    kind = artifact.info.get("outputs", {}).get("task_kind")
    tag = TASK_TAGS.get(str(kind))
    measured = [
        {"type": key.partition("/")[2], "name": label(key), "value": round(value, 6)}
        for key, value in metrics.items()
        if key.startswith("test/")
    ]
    header: dict[str, Any] = {
        "license": _licence(data),
        "library_name": "seqzoo",
        "tags": sorted({"seqzoo", artifact.info["model"], *(family.tags if family else ())}),
        "pipeline_tag": tag,
    }
    if measured and data.get("id"):
        dataset = {"name": data.get("title") or data["id"], "type": data["id"], "split": "test"}
        task = {"type": tag or "other"}
        header["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": measured}]}]
    return header


def _licence(data: dict[str, Any]) -> str | None:
    """The licence of the data, which trained weights should not be freer than; None (left out) where none is known."""
    stated = str(data.get("licence", "")).lower()
    return stated if stated in SPDX else ("other" if stated else None)


def _artifact_facts(artifact: Artifact) -> list[tuple[str, str]]:
    config, outputs = artifact.config, artifact.info.get("outputs", {})
    count = sum(p.numel() for p in artifact.model.parameters())
    longest = getattr(artifact.model, "max_len", None)
    tokens = getattr(artifact.model, "num_tokens", None)
    head = getattr(config, "head", None)
    facts = [("family", artifact.info["model"]), ("parameters", f"{count:,}")]
    if tokens is not None:
        codes = artifact.model.vocab_size
        facts.append(("pictures", f"{config.preprocess.size} x {config.preprocess.size} pixels"))
        facts.append(("tokens of a picture", f"{tokens}" + (f" out of {codes:,} codes" if codes else ", continuous")))
    elif outputs.get("task_kind") != "image":
        facts.append(("longest input", f"{longest:,} tokens" if longest else "unbounded"))
    if artifact.tokenizer is not None:
        facts.append(("tokenizer", f"{artifact.tokenizer.name}, {artifact.tokenizer.vocab_size} tokens"))
    if head is not None:
        predicts = {"lm": "the next token", "sequence": "one answer a sequence", "token": "one answer a token"}
        pooled = f", pooling: {head.pooling}" if head.kind == "sequence" else ""
        facts.append(("predicts", predicts.get(head.kind, head.kind) + pooled))
    if outputs.get("classes"):
        what = "targets" if outputs.get("task_kind") == "regression" else "classes"
        facts.append((what, ", ".join(outputs["classes"])))
    return facts


def _data_section(data: dict[str, Any], seen: dict[str, Any]) -> str:
    if not data and not seen:
        return ""
    named = (("data set", "title"), ("id", "id"), ("source", "source"), ("licence", "licence"))
    facts = [(key, str(data[name])) for key, name in named if data.get(name)]
    files = [(f"`{item['path'].rsplit('/', 1)[-1]}`", f"`{item['sha256']}`") for item in seen.get("files", ())]
    parts = [table(FACTS, facts)] if facts else []
    if files:
        parts.append(table(("file", "sha256"), files))
    if seen.get("shared"):
        parts.append(f"The splits share sequences: {seen['shared']}.")
    return "## Training data\n" + "\n\n".join(parts) if parts else ""


def _training_section(recipe: dict[str, Any], run: dict[str, Any]) -> str:
    if not recipe:
        return ""
    trainer, optim = recipe.get("trainer", {}), recipe.get("task", {}).get("optim", {})
    facts = [
        ("task", recipe.get("task", {}).get("name")),
        ("started from", recipe.get("init") or "random weights"),
        ("seed", run.get("seed", recipe.get("seed"))),
        ("optimiser steps", run.get("steps")),
        ("epochs", run.get("epochs")),
        ("weights taken from step", run.get("chosen_step")),
        ("batch size", recipe.get("data", {}).get("batch_size")),
        ("precision", trainer.get("precision")),
        ("gradient clipping", trainer.get("grad_clip")),
        ("moving average of the weights", trainer.get("ema") or None),
        ("label smoothing", recipe.get("task", {}).get("label_smoothing") or None),
        *((key.replace("_", " "), optim[key]) for key in ("lr", "weight_decay", "betas", "schedule") if key in optim),
        ("training time", f"{run['timing']['train_seconds']:.0f} s" if run.get("timing") else None),
        ("hardware", _hardware(run.get("hardware", {}))),
        ("versions", ", ".join(f"{k} {v}" for k, v in run.get("versions", {}).items())),
        ("commit", (run.get("git") or {}).get("commit")),
    ]
    rows = [(key, _plain(value)) for key, value in facts if value not in (None, "", [])]
    return (
        "## Training\n"
        + table(FACTS, rows)
        + "\n\nThe whole recipe is `recipe.yaml`, the record of the run `run.json`."
    )


def _hardware(found: dict[str, Any]) -> str:
    if not found:
        return ""
    return str(found.get("gpu") or f"{found.get('threads')} CPU threads ({found.get('machine')})")


def _metrics_section(metrics: dict[str, float], data: dict[str, Any], run: dict[str, Any]) -> str:
    if not metrics:
        return ""
    rows = [(label(key), key.partition("/")[0], f"{value:.4f}") for key, value in metrics.items()]
    monitor = run.get("monitor")
    chosen = f"the weights with the best {monitor}" if monitor else "the last weights"
    where = f" of {data['id']}" if data.get("id") else ""
    test = any(key.startswith("test/") for key in metrics)
    splits, honest = ("splits", "; the test split chose nothing") if test else ("split", "")
    protocol = f"Measured once on the held-out {splits}{where}, with {chosen}{honest}."
    return "## Measured\n" + table(("metric", "split", "value"), rows) + "\n\n" + protocol


def _limits(family: Family | None, data: dict[str, Any], metrics: dict[str, float]) -> list[str]:
    limits = [family.limits] if family else []
    if data.get("id"):
        limits.append(f"It was trained on {data.get('title') or data['id']} alone; nothing is known of other data.")
    if not any(key.startswith("test/") for key in metrics):
        limits.append("It was not measured on a test split.")
    limits.append("It is a research model, not a medical device.")
    return limits


def _use(name: str, artifact: Artifact, family: Family | None) -> str:
    lines = ["import torch", "import zoo", "", 'artifact = zoo.load(".")  # this folder, or its Hub id']
    if artifact.info["model"] == "mqt" and artifact.tokenizer is not None:
        lines[1:2] = ["import zoo", "from zoo.datamodules.vqa import prompt"]
        size = artifact.config.size
        lines += [
            "model, tokenizer = artifact.model, artifact.tokenizer",
            f"picture = torch.rand(1, 3, {size}, {size})  # in [0, 1]",
            'ids = torch.tensor(prompt("what color is the shape?", tokenizer, model.config.image_token))',
            "answer = model.answer(ids, picture, m=4, end=tokenizer.special['eos'])",
            "print(tokenizer.decode(answer.tolist(), skip_special=True))",
        ]
        return "\n".join(lines)
    lines.append(_call(family.text if family else "", artifact.tokenizer is not None))
    return "\n".join(lines)


def _call(example: str, tokenizer: bool) -> str:
    if not tokenizer:
        return "model = artifact.model"
    return (
        f'ids, valid = artifact.tokenizer.encode_batch(["{example}"])\n'
        "with torch.no_grad():\n"
        "    logits = artifact.model(torch.from_numpy(ids), torch.from_numpy(valid))\n"
        "print(logits.shape)"
    )


def _command_line(outputs: dict[str, Any], family: str) -> str:
    if not outputs:
        return ""
    lines = {
        "image": "zoo tokenize . pictures/ -o ids.safetensors\nzoo reconstruct . pictures/ -o sheet.png",
        "image generator": "zoo generate . --num 8 -o samples.png",
    }
    kind = str(outputs.get("task_kind"))
    if kind == "image" and family == "mqt":
        ask = 'zoo predict . --image picture.png --question "what color is the shape?" --tokens 4'
        return "\n\n" + code("sh needs-input", f"zoo verify .\n{ask}\nzoo bench budget . --data questions.yaml")
    if kind == "image" and family in ("maskgit", "rar"):
        kind = "image generator"
    return "\n\n" + code("sh needs-input", "zoo verify .\n" + lines.get(kind, "zoo predict . --fasta sequences.fa"))


def _config_section(changed: dict[str, Any], family: str) -> str:
    if not changed:
        return f"Its config is the default of the family `{family}`."
    rows = [(f"`{key}`", f"`{value}`") for key, value in changed.items()]
    return "Where its config differs from the family's defaults:\n\n" + table(("field", "value"), rows)


def label(metric: str) -> str:
    """`val/mcc` -> `Matthews correlation`."""
    name = metric.partition("/")[2] or metric
    return METRIC_NAMES.get(name, name.replace("_", " "))


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def code(language: str, text: str) -> str:
    """A fenced block. `needs-hub` and `needs-input` after the language mark what cannot run without them."""
    return f"```{language}\n{text}\n```"


def front_matter(header: dict[str, Any]) -> str:
    """The YAML header of a card; keys without a value are left out."""
    import yaml

    kept = {key: value for key, value in header.items() if value not in (None, "", [], {})}
    return "---\n" + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000) + "---\n\n"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write_entry_cards(place: Path) -> list[Path]:
    """Write the card of every published model into *place*; returns the files."""
    files = []
    for name in catalogue.ENTRIES:
        file = place / f"{name}.md"
        file.write_text(entry_card(name), encoding="utf-8")
        files.append(file)
    return files


if __name__ == "__main__":
    print("\n".join(map(str, write_entry_cards(folder("model_cards")))))
