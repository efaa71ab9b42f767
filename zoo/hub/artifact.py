"""The artifact: a folder that holds a model and all it takes to use, check and reproduce it; the same on the Hub.

config.json           schema, family, the model's whole config, what the outputs mean
model.safetensors     weights; tensors that the model ties are stored once
tokenizer_config.json and the files it needs
parity.safetensors    an input and what the model made of it when it was saved
recipe.yaml, run.json, metrics.csv    how it was trained
README.md             the card
files.json            size and sha256 of all of them but the card, which people edit
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zoo import __version__, catalogue
from zoo._resources import folder
from zoo.config import from_dict, resolve, to_dict
from zoo.errors import ConfigError, ZooError
from zoo.hub import files, parity, peft
from zoo.hub.building import build, compare, untied
from zoo.hub.names import find, has_weights


@dataclass
class Artifact:
    """A loaded artifact.

    Attributes:
        model: in evaluation mode, on the CPU.
        tokenizer: or None where the model reads no text.
        path: the folder; for weights converted on the fly, the file they came from.
        info: `outputs` (`task_kind`, `classes`), `model` (family), `ref`.
    """

    model: nn.Module
    tokenizer: Any
    path: Path
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def classes(self) -> list[str]:
        """Names of the outputs; empty where they have none."""
        return list(self.info.get("outputs", {}).get("classes", ()))

    @cached_property
    def run(self) -> dict[str, Any]:
        """run.json: seed, versions, commit, data, metrics; empty where the artifact was not trained here."""
        file = self.path / "run.json"
        return files.read_json(file) if file.is_file() else {}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe; empty where the artifact was not trained here.

        Raises:
            ZooError: recipe.yaml holds more than plain YAML.
        """
        import yaml

        file = self.path / "recipe.yaml"
        if not file.is_file():
            return {}
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ZooError(f"{file} is no plain YAML ({str(error).splitlines()[0]})") from None
        return found if isinstance(found, dict) else {}


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    recipe: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    metrics_csv: str | Path | None = None,
    card: str | None = None,
    classes: list[str] | tuple[str, ...] | None = None,
    task_kind: str | None = None,
    samples: dict[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write *model* as an artifact and return its folder, which appears only when it is complete.

    Args:
        model: of a family in the catalogue, with its `config`.
        directory: must not exist, unless *overwrite*, or be empty.
        tokenizer: saved along.
        recipe, run, metrics_csv: how it was trained; the card is made from them.
        card: Markdown to use in place of the generated card.
        classes, task_kind: what the outputs mean; taken from `run["data"]` where not given.
        samples: inputs for parity.safetensors (`ids`, `valid`); by default made from a seed.
        overwrite: replace an artifact that is there.

    Raises:
        ZooError: the folder exists, the family is unknown, or the config does not rebuild the model.
    """
    target = Path(directory).expanduser()
    _check_target(target, overwrite)
    data = (run or {}).get("data", {})
    outputs = {
        "task_kind": task_kind or data.get("task_kind"),
        "classes": list(data.get("classes", ()) if classes is None else classes),
    }
    described = {
        "schema": files.SCHEMA,
        "library_name": "seqzoo",
        "library_version": __version__,
        "model": family_of(model),
        "config": to_dict(model.config),
        "outputs": {key: value for key, value in outputs.items() if value},
        "tokenizer": None if tokenizer is None else tokenizer.section()["name"],
    }
    with _beside(target) as place:
        files.write_json(place / files.CONFIG, described)
        files.write_tensors(place / files.WEIGHTS, untied(model))
        if tokenizer is not None:
            tokenizer.save(place)
        _write_training(place, recipe, run, metrics_csv)
        rebuilt = _model(place, described)  # from the files: what is published is what is checked
        parity.write(rebuilt, place / files.PARITY, samples)
        files.write_json(place / files.FILES, {"schema": files.SCHEMA, "files": files.listing(place)})
        if card is None:
            from zoo.hub.card import artifact_card

            card = artifact_card(Artifact(rebuilt, tokenizer, place, described))
        (place / files.CARD).write_text(card, encoding="utf-8")
        _publish(place, target)
    return target


def load(
    ref: str | Path, *, adapter: str | Path | None = None, allow_pickle: bool = False, offline: bool = False
) -> Artifact:
    """The artifact that *ref* names: a folder, a Hub id (`user/name` or `user/name@revision`), or a catalogue name.

    A repository of official weights (`LongSafari/hyenadna-small-32k-seqlen-hf`) is recognised and converted, and so
    is the one behind a catalogue name. What is in the local Hub cache is not fetched again.

    Args:
        ref: see above; or a folder with an adapter in peft's format, which names its base itself.
        adapter: such a folder, to be merged into what *ref* names.
        allow_pickle: fetch and open weights that are published only as a pickle, by the restricted loader. Those that
            `zoo pull --allow-pickle` put into the cache need no second permission.
        offline: stay off the network, as with `HF_HUB_OFFLINE`.

    Raises:
        ZooError: nothing of that name, a missing, truncated or changed file, or weights that the config does not fit.
    """
    text = str(ref)
    path = Path(text).expanduser()
    if adapter is not None:
        return peft.load(adapter, load(ref, allow_pickle=allow_pickle, offline=offline))
    if path.is_dir() and peft.is_adapter(path):
        return peft.load(path)
    if path.is_dir():
        return _load_folder(path, text)
    if text not in catalogue.ENTRIES and path.exists():
        raise ZooError(f"'{text}' is a file, not an artifact folder; `zoo convert` reads official weight files")
    wanted, file, what = find(text)
    from zoo.hub import client

    place = client.pull(
        wanted.repo, wanted.revision, what=what, file=file, allow_pickle=allow_pickle, local=offline
    )  # fmt: skip
    if (place / files.FILES).is_file() or not has_weights(place):
        return _load_folder(place, text)
    return _load_official(place, wanted.repo, text, file)


def verify(directory: str | Path) -> list[Any]:
    """Check every file's sha256, load strictly, and replay parity.safetensors; one `OutputCheck` for each output.

    Raises:
        ZooError: as `load` for a folder.
    """
    place = Path(directory).expanduser()
    return parity.replay(_load_folder(place, str(directory)).model, place / files.PARITY)


def family_of(model: nn.Module) -> str:
    """The catalogue's name of a model's class.

    Raises:
        ZooError: the class is not in the catalogue.
    """
    target = f"{type(model).__module__}:{type(model).__name__}"
    for name, known in catalogue.MODELS.items():
        if known == target:
            return name
    raise ZooError(f"{type(model).__name__} is not in the catalogue, so an artifact of it could not be loaded")


def _load_folder(place: Path, ref: str) -> Artifact:
    described = files.check_files(place)
    model = _model(place, described)
    tokenizer = None
    if described["tokenizer"]:
        from zoo import tokenizers

        tokenizer = tokenizers.load(place)
    return Artifact(model, tokenizer, place, {**described, "ref": ref})


def _model(place: Path, described: dict[str, Any]) -> nn.Module:
    target = catalogue.lookup(catalogue.MODELS, described["model"], f"model family in {place / files.CONFIG}:")
    try:
        config = from_dict(resolve(catalogue.schema_target(target)), described["config"], "config")
    except ConfigError as error:
        raise ZooError(f"{place / files.CONFIG}: {error}") from None
    weights = place / files.WEIGHTS
    model = build(resolve(target), config, weights, str(place / files.CONFIG))
    load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill *model* from a safetensors file: the same names, shapes and dtypes, nothing missing, nothing left over.

    Raises:
        ZooError: the file is damaged or of another architecture; names the first difference.
    """
    try:
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
            compare(model, {name: tuple(stored.get_slice(name).get_shape()) for name in names}, file)
            with torch.no_grad():
                for name, tensor in untied(model).items():
                    value = stored.get_tensor(name)
                    tensor.data = tensor.data.to(value.dtype)  # keeps the parameter, and with it what is tied to it
                    tensor.copy_(value)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{file} is damaged or no safetensors file ({error})") from None


def _load_official(place: Path, repo: str, ref: str, file: str = "") -> Artifact:
    """Official weights as they were published, converted on the fly."""
    from zoo.hub import official

    model, tokenizer, facts = official.load(place, repo, file)
    return Artifact(model, tokenizer, place, {**facts, "ref": ref})


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_file():
        raise ZooError(f"'{target}' is a file; an artifact is a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise ZooError(f"'{target}' exists and is not empty: choose another folder, or pass overwrite")
        if not (target / files.FILES).is_file():
            raise ZooError(f"'{target}' is not an artifact, so it is not overwritten")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, gone after any error.

    Raises:
        ZooError: nothing can be written there, or the disk is full.
    """
    place: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        place.chmod(0o755)
        yield place
    except (OSError, SafetensorError) as error:
        raise ZooError(f"cannot write '{target}': {getattr(error, 'strerror', None) or error}") from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _publish(place: Path, target: Path) -> None:
    """Flush and rename; an older artifact stands aside until the new one is in place."""
    for file in place.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if target.is_dir():
        old = place.with_suffix(".old")
        target.rename(old)
        place.rename(target)
        shutil.rmtree(old)
    else:
        place.rename(target)


def _write_training(place: Path, recipe: Any, run: Any, metrics_csv: str | Path | None) -> None:
    import yaml

    if recipe is not None:
        text = yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)
        (place / "recipe.yaml").write_text(text, encoding="utf-8")
    if run is not None:
        files.write_json(place / "run.json", _portable(run))
    if metrics_csv is not None:
        shutil.copyfile(metrics_csv, place / "metrics.csv")


def _portable(run: dict[str, Any]) -> dict[str, Any]:
    """The record with data paths relative to the catalogue or the working directory: home folders are private."""
    data = run.get("data", {})
    if not data.get("files"):
        return run
    bases = (folder("datamodules"), Path.cwd())
    kept = []
    for item in data["files"]:
        path = Path(item["path"])
        base = next((base for base in bases if path.is_relative_to(base)), path.parent)
        kept.append({**item, "path": str(path.relative_to(base))})
    return {**run, "data": {**data, "files": kept}}
