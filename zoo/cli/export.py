"""`zoo export`: a model in the formats of others, checked before it is reported."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser
from zoo.errors import ZooError, nearest

FORMATS = ("official", "transformers", "torch", "onnx")


def parser() -> Parser:
    command = Parser(
        "export",
        "Write REF (an artifact's folder, a Hub id, a name of the catalogue) in another format:\n"
        "  official      the names, shapes and config of the family's official repository\n"
        "  transformers  a folder that `from_pretrained` loads (GENERator, METAGENE-1), logits compared\n"
        "  torch         a torch.export program, run and compared\n"
        "  onnx          an ONNX file, run by ONNX Runtime and compared (extra: onnx)",
        [
            "zoo export runs/splice/artifact --format official --out official",
            "zoo export generator-eukaryote-1.2b --format transformers --out llama",
            "zoo export me/my-model@v1 --format onnx --out onnx",
        ],
    )
    command.add_argument("ref", metavar="REF")
    command.add_argument("--format", required=True, metavar="FORMAT", help=" | ".join(FORMATS))
    command.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="folder to write; must not exist or be empty"
    )
    command.add_argument(
        "--length", type=int, default=0, metavar="N", help="tokens that torch and onnx are traced with"
    )
    command.add_argument("--allow-pickle", action="store_true", help="fetch weights that exist only as a pickle")
    return command


def run(args: argparse.Namespace) -> int:
    if args.format not in FORMATS:
        raise ZooError(f"zoo export does not know the format '{args.format}'" + nearest(args.format, FORMATS))
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"'{out}' exists: choose another folder for --out")
    from zoo.hub import artifact
    from zoo.hub.export import export

    found = artifact.load(args.ref, allow_pickle=args.allow_pickle)
    for line in export(found, args.format, out, args.length):
        print(line)
    print(f"written to {out}")
    return 0
