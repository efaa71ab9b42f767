"""Benchmark suites: which data sets they have, where their files lie, by which metric their papers measure.

A suite is a YAML file in `datamodules/suites/`; the published numbers stand there beside their source. Each set becomes
a `data` section of a recipe, so that the models read a public set as they read any other.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.errors import ZooError, nearest

METRICS = ("mcc", "accuracy", "f1", "auroc")
SHORT = {"nt": "nucleotide_transformer", "gb": "genomic_benchmarks", "genomicbenchmarks": "genomic_benchmarks"}
_SPLITS = {"train": ("train",), "val": ("dev", "val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class BenchSet:
    """One data set of a suite.

    Attributes:
        name, folder: its name, and its folder in the suite's published layout.
        length: bases of its longest sequences, as published.
        classes: number of classes.
        metric: the paper's.
        published: model -> score in percent; the name says so where it is not of that metric.
    """

    name: str
    folder: str
    length: int
    classes: int
    metric: str
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A benchmark suite.

    Attributes:
        layout: `csv` (train.csv, dev.csv, test.csv), `folders` (one folder a class, one sequence a file), `fasta`
            (train.fna, test.fna, headers >name|label) or `catalogue` (datamodules/<set>.yaml).
        hub: Hub data set to fetch from when no folder is given; `{set}` stands for the set.
        val_fraction: part of train held out for choosing weights where the suite publishes no dev split.
        sequence: column of the sequences in tables.
        sources: model -> where its published numbers are from.
    """

    name: str
    title: str
    layout: str
    sets: dict[str, BenchSet]
    hub: str | None = None
    val_fraction: float = 0.0
    sequence: str = "sequence"
    sources: dict[str, str] = field(default_factory=dict)


def suite_names() -> list[str]:
    """The suites of the catalogue."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    from zoo._resources import folder

    return folder("datamodules") / "suites"


def load_suite(name: str) -> Suite:
    """The suite *name*; `nt` and `gb` are short for the two long names.

    Raises:
        ZooError: no such suite, with the nearest one.
    """
    import yaml

    wanted = name.lower().replace("-", "_")
    wanted = SHORT.get(wanted, wanted)
    path = _folder() / f"{wanted}.yaml"
    if not path.is_file():
        raise ZooError(f"unknown benchmark suite '{name}'" + nearest(wanted, suite_names()))
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    sets = {
        key: BenchSet(
            name=key,
            folder=fields.get("folder", key),
            length=fields["length"],
            classes=fields["classes"],
            metric=fields.get("metric", data["metric"]),
            published={model: float(score) for model, score in fields.get("published", {}).items()},
        )
        for key, fields in data["sets"].items()
    }
    return Suite(
        name=wanted,
        title=data["title"],
        layout=data["layout"],
        sets=sets,
        hub=data.get("hub"),
        val_fraction=data.get("val_fraction", 0.0),
        sequence=data.get("sequence", "sequence"),
        sources=data.get("published_source", {}),
    )


def choose_sets(suite: Suite, names: list[str]) -> list[BenchSet]:
    """The named sets of a suite, all of them for an empty list.

    Raises:
        ZooError: no such set, with the nearest one.
    """
    for name in names:
        if name not in suite.sets:
            raise ZooError(f"suite '{suite.name}' has no set '{name}'" + nearest(name, suite.sets))
    return [suite.sets[name] for name in names or suite.sets]


def section(suite: Suite, item: BenchSet, root: Path | None = None, cache: Path | None = None) -> dict[str, Any]:
    """The `data` section of one set: `{"name": "labelled", **fields}`.

    Args:
        suite, item: which set.
        root: folder of the suite's files as published; without it they come from the Hub where the suite has a place
            there.
        cache: where parquet files are written out as CSV; beside them by default.

    Raises:
        ZooError: no such folder, files missing in it, or nowhere to take them from.
    """
    from zoo import datamodules

    if suite.layout == "catalogue":
        return datamodules.section(item.name)
    place = locate(suite, item, root) if root is not None else fetch(suite, item)
    own = f"{suite.name}_{item.name}"
    if own in datamodules.names():  # the catalogue knows the files' sha256
        return datamodules.section(own, root=str(place))
    found: dict[str, Any] = {"name": "labelled", "id": own, "upper": True}
    parquet = sorted(place.rglob("*.parquet"))
    if parquet:
        found |= from_parquet(suite, item, place, parquet, cache or place / "csv")
    elif suite.layout == "folders":
        found |= {"format": "folder", "train": {"path": str(place / "train")}, "test": {"path": str(place / "test")}}
    else:
        suffix = ".csv" if suite.layout == "csv" else ".fna"
        for split, stems in _SPLITS.items():
            file = next((place / f"{stem}{suffix}" for stem in stems if (place / f"{stem}{suffix}").is_file()), None)
            if file is not None:
                found[split] = {"path": str(file)}
        if suite.layout == "fasta":
            found["format"] = "fasta"
    missing = [split for split in ("train", "test") if split not in found or not Path(found[split]["path"]).exists()]
    if missing:
        raise ZooError(f"'{place}' holds no {missing[0]} split of {suite.name}/{item.name} (layout: {suite.layout})")
    if "val" not in found:
        found["val_fraction"] = suite.val_fraction or 0.1
    return found


def locate(suite: Suite, item: BenchSet, root: Path) -> Path:
    """The folder of a set under *root*: at its published path, under the suite's own folder, or by its name.

    Raises:
        ZooError: none of these is there.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ZooError(f"folder '{root}' does not exist; --root is the folder that holds the sets of {suite.name}")
    last = item.folder.rsplit("/", 1)[-1]
    tried = [item.folder, f"{suite.name.upper()}/{item.folder}", item.name, last]
    for path in tried:
        if (root / path).is_dir():
            return root / path
    if suite.layout == "fasta" and list(root.rglob("*.parquet")):
        return root  # one table for all tasks
    raise ZooError(f"'{root}' holds no folder '{item.folder}' (or '{item.name}') of {suite.name}")


def fetch(suite: Suite, item: BenchSet) -> Path:
    """The set's files from the Hub, in its cache.

    Raises:
        ZooError: the suite is not on the Hub, or it cannot be reached.
    """
    if suite.hub is None:
        raise ZooError(f"{suite.name} is not on the Hub: download it and name its folder with --root")
    from zoo.hub.client import pull_dataset

    repo = suite.hub.format(set=item.name)
    found = pull_dataset(repo, [f"{item.folder}/*", "*.parquet"] if "{set}" not in suite.hub else ["*.parquet"])
    return found / item.folder if (found / item.folder).is_dir() else found


def from_parquet(suite: Suite, item: BenchSet, place: Path, files: list[Path], cache: Path) -> dict[str, Any]:
    """The splits as CSV files written beside each other in *cache*; a `task` column picks the set's rows.

    Raises:
        ZooError: pyarrow is not installed, a column is missing, or the set has no rows.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise ZooError("reading parquet files needs pyarrow: pip install 'seqzoo[parquet]'") from None

    found: dict[str, Any] = {}
    for split, stems in _SPLITS.items():
        wanted = [file for file in files if re.match(rf"({'|'.join(stems)})\b", file.name)]
        rows: list[tuple[str, str]] = []
        for file in wanted:
            table = parquet.read_table(file).to_pydict()
            if not {suite.sequence, "sequence"} & set(table) or "label" not in table:
                raise ZooError(f"'{file}' has no columns '{suite.sequence}' and 'label'")
            texts = table.get(suite.sequence, table.get("sequence"))
            tasks = table.get("task", [item.name] * len(texts))
            rows += [
                (text, str(label))
                for text, label, task in zip(texts, table["label"], tasks, strict=True)
                if task == item.name
            ]
        if wanted and not rows:
            raise ZooError(f"'{place}' has no rows of the task '{item.name}'")
        if rows:
            target = cache / f"{item.name}-{split}.csv"
            write_atomic(target, ("sequence", "label"), rows)
            found[split] = {"path": str(target)}
    return found


def write_atomic(path: Path, header: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    """A CSV file that appears whole or not at all.

    Raises:
        ZooError: the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        temporary.replace(path)
    except OSError as error:
        raise ZooError(f"cannot write '{path}': {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
