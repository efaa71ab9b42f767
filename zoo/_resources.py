"""Where the catalogue folders are: beside `zoo/` in a checkout, under `zoo/_data` in an installed wheel."""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("recipes", "tokenizers", "datamodules", "model_cards")


def root() -> Path:
    """The folder that holds recipes/, tokenizers/, datamodules/ and model_cards/; it is Hydra's config path."""
    package = Path(__file__).resolve().parent
    installed = package / "_data"
    return installed if installed.is_dir() else package.parent


def folder(name: str) -> Path:
    """Path of one catalogue folder."""
    assert name in FOLDERS, name
    return root() / name
