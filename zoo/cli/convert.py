"""`zoo convert`: a file of official weights becomes an artifact."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.cli.common import Parser, existing_file
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.tokenizers.base import Tokenizer


def parser() -> Parser:
    command = Parser(
        "convert",
        "Turn official weights (safetensors, or a PyTorch or Lightning checkpoint that holds only tensors) into an\n"
        "artifact. The family is recognised by its weights; every key must be used and every shape fit.",
        [
            "zoo convert weights.ckpt --config config.json --out hyenadna-small",
            "zoo convert model.safetensors --out hyenadna-tiny --tokenizer dna-char",
            "zoo convert downloaded/folder --out my-model",
        ],
    )
    command.add_argument("file", metavar="OFFICIAL_FILE", help="file of weights, or a downloaded folder")
    command.add_argument("--config", metavar="FILE", help="the official config.json (default: the one beside it)")
    command.add_argument("--tokenizer", metavar="NAME", help="tokenizer of the catalogue to save along")
    command.add_argument("-o", "--out", metavar="DIR", required=True, help="folder of the artifact; must not exist")
    return command


def run(args: argparse.Namespace) -> int:
    source = Path(args.file).expanduser()
    if not source.is_dir():
        source = existing_file(args.file, "weight file")
    config = existing_file(args.config, "config file") if args.config else None
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"'{out}' exists: choose another folder for --out")
    import torch

    from zoo import catalogue, tokenizers
    from zoo.config import resolve
    from zoo.convert.official import convert_file
    from zoo.hub import artifact

    tokenizer = tokenizers.from_catalogue(args.tokenizer) if args.tokenizer else None
    family, settings, weights = convert_file(source, config)
    if tokenizer is None:
        tokenizer = _usual_tokenizer(family)
    with torch.random.fork_rng(devices=[]):
        model = resolve(catalogue.MODELS[family])(settings)
    model.load_state_dict(weights)
    path = artifact.save(model, out, tokenizer=tokenizer)
    count = sum(p.numel() for p in model.parameters())
    print(f"{args.file}: {family}, {count:,} parameters, {len(weights)} tensors")
    print(f"artifact  {path}")
    return 0


def _usual_tokenizer(family: str) -> Tokenizer | None:
    """The tokenizer of the family's published models, where it needs no file that is not here."""
    from zoo import catalogue, tokenizers

    for entry in catalogue.ENTRIES.values():
        if entry.model == family and entry.tokenizer:
            try:
                return tokenizers.from_catalogue(entry.tokenizer)
            except ZooError:  # its vocabulary is published elsewhere; --tokenizer or a file can add it
                return None
    return None
