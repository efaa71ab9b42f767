"""What a reference to the Hub may look like, and which files of a repository are data. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from zoo import catalogue
from zoo.errors import ZooError, nearest

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REVISION = re.compile(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9_][\w.+-]*)*")
_PART = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|]+")

WEIGHTS = (".safetensors",)
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
TEXT = (".json", ".yaml", ".csv", ".md", ".txt", ".png", ".svg")
PLAIN = ("LICENSE", "NOTICE")
# weights of other frameworks, and what a trainer leaves behind
_OTHER = re.compile(r"optimizer|scheduler|rng_state|training_args|flax_model|tf_model")


@dataclass(frozen=True)
class Ref:
    """A repository of the Hub at a revision: a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def parse_ref(text: str) -> Ref:
    """`user/name` or `user/name@revision`.

    Raises:
        ZooError: not of that form; names a Hub could not have, and paths, are refused here.
    """
    repo, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise ZooError(f"'{repo}' is no Hub id: it should read user/name, with letters, digits, '-', '_' and '.'")
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ZooError(f"'{revision}' is no revision of '{repo}': it should be a branch, a tag or a commit")
    return Ref(repo, revision or "main")


def find(text: str, file: str = "") -> tuple[Ref, str, str | None]:
    """What *text* stands for: a Hub id, or a name of the catalogue.

    Args:
        text: see above.
        file: the weights that are wanted, where a repository has several; by default the catalogue's.

    Returns:
        The repository, its file of weights (empty where there is no choice), and for messages the name of the model.

    Raises:
        ZooError: neither, or a repository of several models of which none is named.
    """
    entry = catalogue.ENTRIES.get(text)
    if entry is not None:
        return parse_ref(entry.hub), file or entry.file, f"the published weights of {text}"
    if not looks_like_ref(text):
        hint = nearest(text, catalogue.ENTRIES)
        raise ZooError(f"'{text}' is neither a folder, a Hub id (user/name) nor a model of the catalogue{hint}")
    ref = parse_ref(text)
    models = {name: entry.file for name, entry in catalogue.ENTRIES.items() if entry.hub == ref.repo}
    if len(models) > 1 and not file:
        raise ZooError(f"'{ref.repo}' holds several models: name one of {', '.join(models)}, or its file")
    return ref, file or next(iter(models.values()), ""), None


def looks_like_ref(text: str) -> bool:
    """Whether *text* is meant as a Hub id rather than as a path."""
    return text.partition("@")[0].count("/") == 1 and not text.startswith((".", "/", "~"))


def check_path(name: object, where: str) -> str:
    """*name* as a path inside a repository.

    Raises:
        ZooError: it is absolute, leads out of the folder, or has characters that file systems read in their own way.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(not _PART.fullmatch(part) or part in (".", "..") or part != part.strip() for part in parts):
        raise ZooError(f"{where} holds a file named {name!r}, which is no plain path, so nothing of it is read")
    return str(name)


def check_name(name: object, where: str) -> str:
    """*name* as that of a file right in the folder.

    Raises:
        ZooError: it is a path, or no plain name.
    """
    if "/" in check_path(name, where):
        raise ZooError(f"{where} names {name!r}, which is not the plain name of a file in the folder")
    return str(name)


def has_weights(place: Path, pickles: bool = True) -> bool:
    """Whether a folder holds a file that looks like weights of any format."""
    kinds = WEIGHTS + PICKLES if pickles else WEIGHTS
    return any(path.name.endswith(kinds) for path in place.iterdir())


def choose(paths: Iterable[str], file: str = "", pickles: bool = False) -> list[str]:
    """The files to fetch: text and weights of the top folder; no code, no pickles unless asked for.

    Args:
        paths: all files of the repository.
        file: the weights that are wanted, where a repository holds several models; may lie in a folder.
        pickles: fetch pickled weights too, where the repository has no safetensors.
    """
    top = [path for path in paths if "/" not in path]
    chosen = [path for path in top if path.endswith(TEXT) or path in PLAIN]
    if file:
        folder = PurePosixPath(file).parent
        beside = [path for path in paths if path != file and "/" in path and PurePosixPath(path).parent == folder]
        wanted = [file] if pickles or not file.endswith(PICKLES) else []
        return [*chosen, *(path for path in beside if path.endswith(TEXT)), *wanted]
    weights = [path for path in top if path.endswith(WEIGHTS)]
    if not weights and pickles:
        weights = [path for path in top if path.endswith(PICKLES) and not _OTHER.search(path)]
    return [*chosen, *weights]


def pickled(paths: Iterable[str], file: str = "") -> list[str]:
    """The pickled weights of a repository that has no others (or, where *file* names weights, that one)."""
    paths = list(paths)
    if file:
        return [file] if file.endswith(PICKLES) else []
    if any(path.endswith(WEIGHTS) and "/" not in path for path in paths):
        return []
    return [path for path in paths if path.endswith(PICKLES) and "/" not in path and not _OTHER.search(path)]
