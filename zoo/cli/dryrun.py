"""What a run would be, without running it: the resolved recipe, sizes, steps, memory, files."""

from __future__ import annotations

import yaml

from zoo.cli.common import short, table
from zoo.train.dry_run import DryRun, dry_run
from zoo.train.recipe import RecipeConfig


def describe(recipe: RecipeConfig) -> str:
    """The text of `--dry-run`: everything is checked as for the run itself; nothing is trained or written.

    Raises:
        ZooError: whatever would stop the run before its first step.
    """
    found = dry_run(recipe)
    pictures = found.recipe["data"]["name"] in ("images", "shards")
    unit, most = ("samples", "") if pictures else ("tokens", f" at most{_product(found)}")
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("trained", f"{found.trained:,} ({100 * found.trained / found.parameters:.3g} %)"),
        ("steps", f"{found.steps:,}"),
        ("epochs", f"{found.epochs:.4g}"),
        (f"{unit} a step", f"{found.tokens_per_step:,}{most}"),
        (f"{unit} in all", short(found.tokens_per_step * found.steps)),
        ("memory", _memory(found.memory)),
        ("classes", ", ".join(found.classes) if found.classes else "none"),
        *found.notes,
    ]
    files = [(file["path"], size(file["bytes"]), file["sha256"][:12]) for file in found.files]
    text = yaml.safe_dump(found.recipe, sort_keys=False, allow_unicode=True)
    start = [f"start from {recipe.init}"] if recipe.init else []
    if found.pending:
        start = [f"start from {found.pending}, which is not there yet: the sizes above are those of this recipe alone"]
    return "\n".join([text, table(rows, ("run", "")), "", table(files, ("file", "size", "sha256"), right=(1,)), *start])


def _product(found: DryRun) -> str:
    times = found.tokens_per_step // (found.batch * found.length)
    return f" ({found.batch} x {found.length}" + (f", {times} times)" if times > 1 else ")")


def _memory(memory: dict[str, int]) -> str:
    parts = ", ".join(f"{size(count)} {name}" for name, count in memory.items())
    return f"about {size(sum(memory.values()))} ({parts})"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
