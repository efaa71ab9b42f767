"""A model in the formats of others: the official layout of its family, transformers, torch.export, ONNX.

Each is checked before it is reported: official layouts by converting back bit for bit, programs by running them on an
input and comparing with the model.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import catalogue
from zoo.convert.official import converter_module
from zoo.errors import ZooError
from zoo.hub import files
from zoo.hub.artifact import Artifact, family_of
from zoo.hub.parity import example

Run = Callable[[tuple[Tensor, ...]], list[Tensor]]
FORMATS = ("official", "transformers", "torch", "onnx")
# families whose official weights are those of a class of transformers
TRANSFORMERS = {
    ("generator", "lm"): "LlamaForCausalLM",
    ("metagene", "lm"): "LlamaForCausalLM",
    ("generator", "sequence"): "LlamaForSequenceClassification",
}


def export(artifact: Artifact, form: str, out: Path, length: int = 0) -> list[str]:
    """Write *artifact* into the folder *out* in format *form* and return lines that say what was written and checked.

    *length* is the number of tokens that a program is traced with (by default 128, or the model's longest input).

    Raises:
        ZooError: the family has no such format, a package is missing, or the check failed; nothing is left then.
    """
    inputs = _inputs(artifact.model, length)
    run: Callable[[], list[str]] = {
        "official": lambda: _official(artifact, out),
        "transformers": lambda: _transformers(artifact, out),
        "torch": lambda: _torch(artifact, out, inputs),
        "onnx": lambda: _onnx(artifact, out, inputs),
    }[form]
    out.mkdir(parents=True, exist_ok=True)
    try:
        return run()
    except BaseException:
        for file in out.iterdir():
            file.unlink()
        out.rmdir()
        raise


def _official(artifact: Artifact, out: Path) -> list[str]:
    model, config = artifact.model, artifact.config
    name, module, state = _converter(model)
    writer = getattr(module, "config_to_official", None)
    official = writer(config) if writer is not None else None
    files.write_tensors(out / "model.safetensors", state)
    if official is not None:
        official = {"architectures": [official.get("class")], **official} if "class" in official else official
        files.write_json(out / "config.json", {key: value for key, value in official.items() if key != "class"})
    _check_same(module.to_zoo(state, config), model.state_dict(), name)
    if official is not None:
        _check_config(config, module.config_from_official(official))
    lines = [f"model.safetensors  {len(state)} tensors under their official names, converted back bit for bit"]
    if official is not None:
        lines.append("config.json        the official keys, read back to the same config")
    else:
        lines.append("no config.json: the official code of this family takes its sizes from elsewhere")
    return lines + _tokenizer(artifact, out)


def _transformers(artifact: Artifact, out: Path) -> list[str]:
    family, kind = family_of(artifact.model), getattr(getattr(artifact.config, "head", None), "kind", "")
    wanted = TRANSFORMERS.get((family, kind))
    if family == "dnabert2":
        raise ZooError(
            "transformers has no class for DNABERT-2, whose official repository brings code of its own: "
            "`--format official` writes the layout that this code loads"
        )
    if wanted is None:
        known = ", ".join(sorted({name for name, _ in TRANSFORMERS}))
        raise ZooError(f"transformers has no class for {family} models with a '{kind}' head (it has for: {known})")
    if kind == "sequence" and artifact.config.head.bias:
        raise ZooError(f"{wanted} has no bias in its output layer and this model has: train it with head.bias=false")
    lines = _official(artifact, out)
    if importlib.util.find_spec("transformers") is None:
        return [*lines, "not compared with transformers, which is not installed: pip install transformers"]
    import transformers

    transformers.utils.logging.disable_progress_bar()
    theirs = getattr(transformers, wanted).from_pretrained(out, dtype="auto").eval()
    ids = example(artifact.model)["ids"]
    with torch.no_grad():  # a row at a time, since its classifiers refuse a batch where no padding token is defined
        error = max(_error(theirs(row).logits, artifact.model(row)) for row in ids.split(1))
    _check_error(error, wanted)
    return [*lines, f"{wanted}  loads it and gives the same logits (largest relative difference {error:.1e})"]


def _torch(artifact: Artifact, out: Path, inputs: tuple[Tensor, ...]) -> list[str]:
    file = out / "model.pt2"

    def write(exported: Any) -> Run:
        torch.export.save(exported, file)
        loaded = torch.export.load(file).module()
        return lambda given: _listed(loaded(*given))

    exported, free, error = _first_that_works(artifact.model, inputs, write)
    lines = [f"model.pt2  torch.export, {_sizes(free, inputs)}; same outputs (largest relative difference {error:.1e})"]
    if any(str(node.target).startswith("zoo.") for node in exported.graph.nodes):
        lines.append("it uses operators of this package: `import zoo.nn.longconv, zoo.nn.shortconv` before loading it")
    return lines


def _onnx(artifact: Artifact, out: Path, inputs: tuple[Tensor, ...]) -> list[str]:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ZooError(f"ONNX needs {package}, which is not installed: pip install 'seqzoo[onnx]'")
    import onnxruntime

    file = out / "model.onnx"
    kind = "input" if inputs[0].dtype.is_floating_point else "ids"
    names = [kind] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]

    def write(exported: Any) -> Run:
        try:
            with _quiet():
                torch.onnx.export(exported, f=str(file), input_names=names, external_data=False, verbose=False)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            family = family_of(artifact.model)
            raise ZooError(f"ONNX cannot say what this {family} model computes ({_first(error)})") from error
        taken = [item.name for item in session.get_inputs()]

        def run(given: tuple[Tensor, ...]) -> list[Tensor]:
            feed = {name: value.numpy() for name, value in zip(taken, given, strict=True)}
            return [torch.from_numpy(value) for value in session.run(None, feed)]

        return run

    _, free, error = _first_that_works(artifact.model, inputs, write)
    return [
        f"model.onnx  {_sizes(free, inputs)}; ONNX Runtime gives the same outputs "
        f"(largest relative difference {error:.1e})"
    ]


def _first_that_works(
    model: nn.Module, inputs: tuple[Tensor, ...], write: Callable[[Any], Run]
) -> tuple[Any, tuple[bool, ...], float]:
    """Trace for any batch and length, else any batch, else the example's sizes: the first that gives our outputs.

    Returns:
        The program, its open axes (none but for token ids), and the largest difference.

    Raises:
        ZooError: none does; says why the last one does not.
    """
    ids = len(inputs) == 1 and inputs[0].dim() == 2 and not inputs[0].dtype.is_floating_point
    auto = torch.export.Dim.AUTO
    tried: list[dict[int, Any] | None] = [{0: auto, 1: auto}, {0: auto}, None] if ids else [None]
    for open_axes in tried:
        free = (open_axes is not None and 0 in open_axes, open_axes is not None and 1 in open_axes) if ids else ()
        try:
            with _quiet(), torch.no_grad():
                shapes = None if open_axes is None else {"inputs": (open_axes,)}
                exported = torch.export.export(_Program(model), inputs, dynamic_shapes=shapes, strict=False)
            error = _compare(model, inputs, free, write(exported))
            _check_error(error, "the exported program")
            return exported, free, error
        except ZooError as error:
            problem = error
        except Exception as error:
            problem = ZooError(f"torch.export cannot trace this {family_of(model)} model ({_first(error)})")
    raise problem


class _Program(nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return tuple(_listed(self.model(*inputs)))


def _listed(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, tuple | list):
        return [value for value in result if isinstance(value, Tensor)]
    named = result if isinstance(result, dict) else vars(result)
    return [value for value in named.values() if isinstance(value, Tensor)]


def _inputs(model: nn.Module, length: int) -> tuple[Tensor, ...]:
    """The model's example, without the mask of padding: an exported program reads whole sequences."""
    given = example(model)
    if length and "ids" in given:
        most = getattr(model, "max_len", None)
        if most is not None and length > most:
            raise ZooError(f"--length {length} is more than the {most} tokens this model takes")
        repeats = -(-length // given["ids"].shape[1])
        given["ids"] = given["ids"].repeat(1, repeats)[:, :length]
    # copies: of a view the exporter would also describe the tensor that it is a part of, which no caller has
    return tuple(value.clone() for name, value in given.items() if name != "valid")


def _compare(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    free: tuple[bool, ...],
    run: Run,
) -> float:
    """Largest difference on the example, and on a smaller one where the program is for any size."""
    cases = [inputs]
    if any(free):
        rows, length = inputs[0].shape
        cases.append((inputs[0][: rows // 2 if free[0] else rows, : length // 2 + 1 if free[1] else length],))
    errors = []
    with torch.no_grad():
        for given in cases:
            wanted = _listed(model(*given))
            try:
                found = run(given)
            except Exception as error:
                raise ZooError(f"the exported program does not run ({_first(error)})") from error
            errors += [_error(a, b) for a, b in zip(found, wanted, strict=True)]
    return max(errors)


def _error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        raise ZooError(f"the exported model gives {list(found.shape)} where {list(wanted.shape)} was expected")
    scale = float(wanted.double().abs().max()) or 1.0
    return float((found.double() - wanted.double()).abs().max()) / scale


def _check_error(error: float, what: str) -> None:
    if not error < 1e-3:
        raise ZooError(f"{what} differs from the model by {error:.1e} of its largest output, so it is not kept")


def _converter(model: nn.Module) -> tuple[str, Any, dict[str, Tensor]]:
    """The converter of the model's family, and its weights under their official names.

    Raises:
        ZooError: no official weights exist that this model could be.
    """
    family, why = family_of(model), ""
    for name in [family] if family in catalogue.CONVERTERS else list(catalogue.CONVERTERS):
        module = converter_module(catalogue.CONVERTERS[name])
        if family not in (name, getattr(module, "MODEL", name)):
            continue
        try:
            return name, module, module.to_official(model.state_dict(), model.config)
        except (ZooError, AttributeError, KeyError, TypeError) as error:
            why = _first(error)
    reason = f" ({why})" if why else ""
    raise ZooError(f"there is no official layout for this {family} model{reason}: its family has none, or another head")


def _check_config(config: Any, ours: Any) -> None:
    """Official configs leave some of our fields out; those that decide a weight's shape must come back."""
    from zoo.config import to_dict

    wanted, found = to_dict(config), to_dict(ours)
    for key in ("d_model", "n_layer", "vocab_size", "d_inner", "n_head"):
        if wanted.get(key) and wanted[key] != found.get(key):
            raise ZooError(f"the official config cannot say {key}={wanted.get(key)!r}")


def _check_same(back: dict[str, Tensor], state: dict[str, Tensor], name: str) -> None:
    for key, value in back.items():
        if not torch.equal(state[key].cpu(), value):
            raise ZooError(f"the official layout of {name} does not keep '{key}' as it is")


def _tokenizer(artifact: Artifact, out: Path) -> list[str]:
    """A byte-pair vocabulary goes along in the format of the tokenizers library."""
    import shutil

    path = getattr(artifact.tokenizer, "path", None)
    if path is None or getattr(artifact.tokenizer, "name", "") != "bpe":
        return []
    shutil.copyfile(path, out / "tokenizer.json")
    section = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (out / "tokenizer_config.json").write_text(json.dumps(section, indent=2) + "\n", encoding="utf-8")
    return ["tokenizer.json     the vocabulary, as the tokenizers library reads it"]


def _sizes(free: tuple[bool, ...], inputs: tuple[Tensor, ...]) -> str:
    if not free:
        return f"inputs of exactly {', '.join(str(list(value.shape)) for value in inputs)}"
    rows, length = inputs[0].shape
    return f"{'any batch' if free[0] else f'batches of {rows}'}, {'any length' if free[1] else f'{length} tokens'}"


def _first(error: BaseException) -> str:
    """The first line of what went wrong at the bottom; exporters wrap it in pages of advice, some of it coloured."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0][:150]


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters speak much of their own future."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
