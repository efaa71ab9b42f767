"""The files of an artifact: their names, the listing with sizes and sha256, and the checks before anything is read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from zoo.config import to_dict
from zoo.errors import ZooError, nearest

SCHEMA = 1
CONFIG, WEIGHTS, PARITY = "config.json", "model.safetensors", "parity.safetensors"
FILES, CARD = "files.json", "README.md"
NEEDED = (CONFIG, WEIGHTS, PARITY)
_KEYS = ("schema", "library_name", "library_version", "model", "config", "outputs", "tokenizer")


def check_files(place: Path) -> dict[str, Any]:
    """config.json of the artifact in *place*, after every listed file proved to be the one that was saved.

    Raises:
        ZooError: the first file that is missing, truncated or changed, or a listing that is not ours.
    """
    if not place.is_dir():
        raise ZooError(f"artifact folder '{place}' does not exist")
    if not (place / FILES).is_file():
        hint = "; `zoo convert` reads official weights" if (place / "config.json").is_file() else ""
        raise ZooError(f"'{place}' is no artifact: it has no {FILES}{hint}")
    listed = read_json(place / FILES).get("files")
    if not isinstance(listed, dict) or any(name not in listed for name in NEEDED):
        raise ZooError(f"{place / FILES} does not list {', '.join(NEEDED)}: the artifact is damaged")
    for name, wanted in listed.items():
        if name != Path(name).name or "\\" in name or name in (".", "..") or not isinstance(wanted, dict):
            raise ZooError(f"{place / FILES} lists '{name}', which is not the plain name of a file in the folder")
        file = place / name
        _check_link(place, file)
        if not file.is_file():
            raise ZooError(f"the artifact '{place}' is incomplete: {name} is missing")
        size = file.stat().st_size
        if size != wanted.get("size"):
            raise ZooError(f"{file} has {size} bytes where {wanted.get('size')} were saved: copy or download it again")
        if sha256(file) != wanted.get("sha256"):
            raise ZooError(f"{file} is not what was saved (its sha256 differs): copy or download it again")
    return described(place)


def _check_link(place: Path, file: Path) -> None:
    """A link may end in its own folder or, in the Hub cache, among the blobs of the same repository."""
    if not file.is_symlink():
        return
    real, home = file.resolve(), place.resolve()
    cached = home.parent.name == "snapshots"
    blobs = [home.parent.parent / "blobs", home.parent.parent.parent / "blobs"] if cached else []
    if not any(real.is_relative_to(base) for base in (home, *blobs)):
        raise ZooError(f"{file} is a link that leads out of the artifact, so it is not followed")


def published_files(place: Path) -> list[Path]:
    """The files of an artifact that belong on the Hub: those listed, the listing and the card.

    Raises:
        ZooError: one is a link to something outside, which would be published in its place.
    """
    found = [place / name for name in (*read_json(place / FILES)["files"], FILES, CARD) if (place / name).is_file()]
    for file in found:
        _check_link(place, file)
    return found


def described(place: Path) -> dict[str, Any]:
    """config.json, its keys checked; the model's own config is checked by its class."""
    content = read_json(place / CONFIG)
    if content.get("schema") != SCHEMA:
        raise ZooError(
            f"{place / CONFIG} has schema {content.get('schema')!r}; this version of seqzoo reads schema {SCHEMA}"
        )
    for key in content:
        if key not in _KEYS:
            raise ZooError(f"{place / CONFIG}: unknown key '{key}'" + nearest(key, _KEYS))
    for key in ("model", "config"):
        if key not in content:
            raise ZooError(f"{place / CONFIG}: missing key '{key}'")
    if not isinstance(content["model"], str) or not isinstance(content["config"], dict):
        raise ZooError(f"{place / CONFIG}: 'model' must be a name and 'config' a mapping")
    content = {"outputs": {}, "tokenizer": None, **content}
    if not isinstance(content["outputs"], dict) or not isinstance(content["tokenizer"], str | None):
        raise ZooError(f"{place / CONFIG}: 'outputs' must be a mapping and 'tokenizer' a name or null")
    return content


def listing(place: Path) -> dict[str, Any]:
    """Size and sha256 of every file but the listing itself and the card."""
    files = sorted(path for path in place.iterdir() if path.name not in (FILES, CARD))
    return {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in files}


def sha256(file: Path) -> str:
    """Hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write JSON, indented."""
    file.write_text(json.dumps(to_dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Tensors of any device as safetensors, readable by whom the umask lets read: the library makes them private."""
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(values, file, {"format": "pt", **(metadata or {})})
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ZooError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ZooError(f"{file} holds a {type(value).__name__} where an object was expected")
    return value
