"""Write the results of `image_training.py` into the tutorial on pictures, between its two markers.

python benchmarks/image_page.py [--check]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "image_training.json", HERE.parent / "docs" / "tutorials" / "images.md"
SHEETS = HERE.parent / "docs" / "img"
BEGIN, END = "<!-- results: benchmarks/image_page.py -->\n", "<!-- end of results -->\n"


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(
        lines + ["| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    )


def reconstruction(found: dict[str, Any]) -> str:
    """PSNR against plain coders of as many bits."""
    rows = []
    for kind, label in (("titok", "TiTok"), ("flextok", "FlexTok, one step")):
        if kind in found:
            one = found[kind]
            best = one["psnr"] if kind == "titok" else one["psnr"]["steps 1"][str(one["tokens"])]
            used = one["codes used"]
            rows.append(
                [label, one["bits"], f"{best:.2f}", f"{100 * used['test']:.1f}, {100 * used['all pictures']:.1f}"]
            )
    rows += [[name, None, f"{value:.2f}", None] for name, value in found.get("floors at titok's bits", {}).items()]
    for row in rows:
        if row[1] is None:
            row[1] = found["titok"]["bits"] if "(" not in row[0] else row[0].split("(")[1].split(" ")[0]
    return table(["coder", "bits", "PSNR, dB", "codes used, %: test, all pictures"], rows)


def prefixes(found: dict[str, Any]) -> str:
    """PSNR by the number of tokens."""
    flextok, titok = found["flextok"], found.get("titok", {})
    counts = list(flextok["psnr"]["steps 1"])
    same = titok.get("bits") == flextok["bits"]
    first = {**titok.get("first tokens only", {}), str(titok.get("tokens")): titok.get("psnr")} if same else {}
    rows = [
        [f"FlexTok, {name.removeprefix('steps ')} steps" if name != "steps 1" else "FlexTok, 1 step (mean picture)"]
        + [f"{by_count[n]:.2f}" for n in counts]
        for name, by_count in flextok["psnr"].items()
    ]
    if first:
        rows.append(["TiTok, its first tokens", *(f"{first[n]:.2f}" for n in counts)])
    for label in ("PCA, 8 bits a component", "PCA, bits allocated"):
        rows.append([label, *(f"{flextok['floors'][n][label]:.2f}" for n in counts)])
    return table(["tokens", *counts], rows)


def logged(found: dict[str, Any]) -> str:
    """PSNR of FlexTok by the number of tokens, as its run measured it with one Euler step, beside TiTok's."""
    metrics, titok = found["runs"]["flextok"]["metrics"], found["titok"]
    at = {key.removeprefix("test/psnr_"): value for key, value in metrics.items() if key.startswith("test/psnr_")}
    first = {**titok["first tokens only"], str(titok["tokens"]): titok["psnr"]}
    rows = [["FlexTok, 1 step (mean picture)", *(f"{value:.2f}" for value in at.values())]]
    rows.append(["TiTok, its first tokens", *(f"{first[n]:.2f}" for n in at)])
    return table(["tokens", *at], rows)


def dataset(name: str, found: dict[str, Any]) -> str:
    pictures = found["pictures"]
    parts = [f"### {name}", f"{pictures['train']:,} training pictures, {pictures['test']} test pictures."]
    runs = found.get("runs", {})
    if runs:
        rows = [[kind, f"{run['parameters']:,}", f"{run['steps']:,}"] for kind, run in runs.items()]
        parts.append(table(["recipe", "parameters", "steps"], [[f"`{row[0]}_{name}`", *row[1:]] for row in rows]))
    if "titok" in found:
        parts.append(reconstruction(found))
    if "flextok" in found:
        parts.append("PSNR, dB, by the number of tokens that the decoder is given:\n\n" + prefixes(found))
    elif "titok" in found and "flextok" in runs:
        parts.append("PSNR, dB, by the number of tokens that the decoder is given:\n\n" + logged(found))
    if (SHEETS / f"{name}_reconstructions.png").is_file():
        parts.append(f"![Test pictures of {name} and their reconstructions](../img/{name}_reconstructions.png)")
    seen = found.get("class seen by a CNN")
    if seen:
        rows = [[key.removesuffix(", %"), value] for key, value in seen.items()]
        parts.append(
            "How often a CNN sees the class that was asked for:\n\n" + table(["pictures", "accuracy, %"], rows)
        )
    for kind, title in (("maskgit", "MaskGIT"), ("rar", "the autoregressive model")):
        if (SHEETS / f"{name}_{kind}.png").is_file():
            parts.append(f"Samples of {title}, a column a class, guidance 1:\n\n![Samples](../img/{name}_{kind}.png)")
    return "\n\n".join(parts)


def section() -> str:
    """Markdown between the markers."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return BEGIN + "\n".join(f"{dataset(name, found[name])}\n" for name in sorted(found)) + END


def page(text: str) -> str:
    """The tutorial with its results replaced."""
    before, rest = text.split(BEGIN)
    return before + section() + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    text = PAGE.read_text(encoding="utf-8")
    if parser.parse_args().check:
        raise SystemExit(None if page(text) == text else f"{PAGE} is not what the results say")
    PAGE.write_text(page(text), encoding="utf-8")


if __name__ == "__main__":
    main()
