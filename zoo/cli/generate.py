"""`zoo generate`: sequences from a language model, pictures and clips from generators of their tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import generate_clips, generate_images
from zoo.cli.common import Parser, existing_file
from zoo.cli.sequences import add_batch, check
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.generate.dna import DnaSample
    from zoo.hub.artifact import Artifact

# families whose tokens are not letters: family -> "module:function" of (artifact, arguments) -> exit status
FAMILIES: dict[str, str] = {
    "maskgit": "zoo.cli.generate_images:run",
    "rar": "zoo.cli.generate_images:run",
    "nbp": "zoo.cli.generate_clips:run",
}
WIDTH = 80  # letters a line


def parser() -> Parser:
    command = Parser(
        "generate",
        "Continue DNA with a causal language model; FASTA out. Special tokens and letters other than A, C, G, T are\n"
        "never drawn. The same seed gives the same sequences, whatever --batch-size is. Without a prompt the model's\n"
        "start token is continued, if it has one. k-mers are counted from the prompt's right end: 1 to k-1 bases on\n"
        "its left may go unread.",
        [
            "zoo generate runs/ecoli/artifact --prompt ATGACCATGATT --bases 300 --stream",
            "zoo generate hyenadna-tiny-1k --fasta prompts.fa --num 5 --top-k 3 --seed 7 -o samples.fa",
            "zoo generate generator-eukaryote-1.2b --prompt ATGGCC --temperature 0.8 --top-p 0.9 --with-prompt",
            "zoo generate runs/nbp_moving_mnist/artifact --continue moving_mnist --num 4 --top-k 50 -o clips.gif",
            "zoo generate runs/maskgit_clothing64/artifact --classes hat,shoes --num 8 -o samples.png",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    source = command.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="BASES", action="append", help="what to continue; may be given repeatedly")
    source.add_argument("--fasta", metavar="FILE", help="prompts, plain or gzip-compressed")
    command.add_argument("-o", "--out", metavar="FILE", help="FASTA, compressed if it ends in .gz (default: stdout)")
    command.add_argument("--num", type=int, default=1, metavar="N", help="sequences for each prompt (default: 1)")
    command.add_argument("--bases", type=int, default=200, metavar="N", help="bases of each (default: 200)")
    command.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that "
                         "together reach this probability")  # fmt: skip
    command.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw from tokens at least this "
                         "fraction as likely as the likeliest")  # fmt: skip
    command.add_argument("--repetition", type=float, default=1.0, metavar="X", help="penalty on tokens that came "
                         "before; 1: none")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="default: 0")
    command.add_argument("--any-letter", action="store_true", help="let N and other letters of the vocabulary come out")
    command.add_argument("--end", action="store_true", help="let the model's end token end a sequence early")
    command.add_argument("--with-prompt", action="store_true", help="write the prompt before its continuation")
    command.add_argument("--stream", action="store_true", help="print the bases of one sequence as they come")
    add_batch(command, 16)
    generate_images.add_options(command)
    generate_clips.add_options(command)
    return command


def run(args: argparse.Namespace) -> int:
    check(args)
    _check_numbers(args)
    prompts = _prompts(args)
    if args.stream and len(prompts) * args.num > 1:
        raise ZooError(f"--stream shows one sequence, but {len(prompts) * args.num} were asked for")
    from zoo.hub import artifact

    found = artifact.load(args.ref)
    family = found.info.get("model", "")
    if family in FAMILIES:
        from zoo.config import resolve

        return int(resolve(FAMILIES[family])(found, args) or 0)
    return dna(found, args, prompts)


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, value in (("--num", args.num), ("--bases", args.bases)):
        if value < 1:
            raise ZooError(f"{flag} must be at least 1, got {value}")
    if args.temperature < 0:
        raise ZooError(f"--temperature must be at least 0, got {args.temperature:g}")
    if args.top_k < 0:
        raise ZooError(f"--top-k must be at least 0, got {args.top_k}")
    if not 0 < args.top_p <= 1:
        raise ZooError(f"--top-p must be above 0 and at most 1, got {args.top_p:g}")
    if not 0 <= args.min_p < 1:
        raise ZooError(f"--min-p must be at least 0 and below 1, got {args.min_p:g}")
    if args.repetition <= 0:
        raise ZooError(f"--repetition must be above 0, got {args.repetition:g}")


def _prompts(args: argparse.Namespace) -> list[tuple[str, bytes]]:
    if args.fasta:
        from zoo.datamodules.fasta import read_fasta

        records = read_fasta(existing_file(args.fasta, "FASTA file"))
        return [
            (header.split()[0] if header.split() else f"prompt_{i}", text)
            for i, (header, text) in enumerate(records, 1)
        ]
    texts = args.prompt or [""]
    names = [f"prompt_{i}" for i in range(1, len(texts) + 1)] if args.prompt else ["sample"]
    return [(name, text.strip().encode("latin-1", "replace")) for name, text in zip(names, texts, strict=True)]


def dna(found: Artifact, args: argparse.Namespace, prompts: list[tuple[str, bytes]]) -> int:
    """Letters from a language model over letters, k-mers or byte pairs."""
    import torch

    from zoo.generate.dna import DnaGenerator, DnaOptions
    from zoo.generate.engine import GenerateConfig

    if found.tokenizer is None:
        raise ZooError(f"{args.ref} holds no tokenizer of letters, so it cannot generate DNA")
    model = found.model.to("cuda" if torch.cuda.is_available() else "cpu")
    generator = DnaGenerator(model, found.tokenizer, str(args.ref))
    config = GenerateConfig(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
        repetition=args.repetition, seed=args.seed,
    )  # fmt: skip
    options = DnaOptions(args.bases, args.num, args.any_letter, args.end, args.batch_size)
    samples = generator(prompts, options, config, _show if args.stream else None)
    records = _records(samples, prompts, args)
    if args.out is not None:
        from zoo.datamodules.vcf import written

        with written(Path(args.out).expanduser()) as out:
            for record in records:
                out.write(record)
    elif not args.stream:
        text = "".join(records)  # an error shows before the first line
        sys.stdout.write(text)
    else:
        for _ in records:
            pass
    if args.stream:
        print()
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _records(samples: Iterator[DnaSample], prompts: list[tuple[str, bytes]], args: Any) -> Iterator[str]:
    """FASTA records, named after their prompts: `>name_2 bases=200 seed=0 log_likelihood=-276.1`."""
    for sample in samples:
        name, prompt = prompts[sample.prompt]
        text = (prompt.decode("latin-1") if args.with_prompt else "") + sample.text
        about = f"bases={len(sample.text)} seed={args.seed} log_likelihood={sample.log_likelihood:.4f}"
        lines = [text[i : i + WIDTH] for i in range(0, len(text), WIDTH)]
        yield "\n".join([f">{name}_{sample.copy + 1} {about}{' ended' if sample.ended else ''}", *lines, ""])
