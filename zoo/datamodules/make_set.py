"""From an annotated genome to a data set on disk: three CSV files and the YAML that names them with their sha256."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from zoo.datamodules.features import Row, coding_windows, feature_rows, read_annotated, write_csv
from zoo.datamodules.manifest import digest


def make_set(
    annotation: str | Path,
    folder: str | Path,
    *,
    kind: Literal["coding", "features"] = "coding",
    length: int = 200,
    types: Sequence[str] = ("CDS",),
    fasta: str | Path | None = None,
    by: Literal["position", "record"] = "position",
    fractions: tuple[float, float] = (0.7, 0.1),
    seed: int = 0,
) -> Path:
    """Write a labelled data set made from a GenBank or GFF3 file.

    Args:
        annotation: the annotated genome.
        folder: where `train.csv`, `dev.csv`, `test.csv` and `data.yaml` are written.
        kind: `coding` windows of *length* bases inside and outside of features of the *types*, or `features`, whole
            features of the *types*, labelled by type.
        length: bases a window.
        types: feature types.
        fasta: sequences of a GFF3 file that does not hold them.
        by: what is kept apart by the split: stretches of each record (`position`), or whole records.
        fractions: of train and dev.
        seed: of the choice of windows.

    Returns:
        The path of `data.yaml`: a `data` section for recipes, `name: labelled`, with `root` set to *folder*.

    Raises:
        ZooError: as `read_annotated`, `coding_windows`, `feature_rows` and `write_csv`.
    """
    records = read_annotated(annotation, fasta)
    rows: list[Row]
    if kind == "coding":
        rows = coding_windows(records, length, seed=seed, positive=types, labels=("other", "coding"))
    else:
        rows = feature_rows(records, types)
    classes = ["other", "coding"] if kind == "coding" else sorted({row.label for row in rows})
    place = Path(folder)
    paths = write_csv(rows, place, by=by, fractions=fractions)
    section: dict[str, Any] = {
        "name": "labelled",
        "title": f"{Path(annotation).name}: {kind}, {', '.join(types)}"
        + (f", {length} bp" if kind == "coding" else ""),
        "source": f"{Path(annotation).name}, sha256 {digest(Path(annotation))}",
        "root": str(place.resolve()),
    }
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        section[split] = {"path": f"{name}.csv", "sha256": digest(paths[name])}
    section["classes"] = classes
    target = place / "data.yaml"
    target.write_text(yaml.safe_dump(section, sort_keys=False), encoding="utf-8")
    return target
