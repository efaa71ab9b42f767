"""Pictures from a class-conditional generator: the image part of `zoo generate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.hub.artifact import Artifact


def add_options(command: Any) -> None:
    """Options that only pictures have; `--num`, `--temperature`, `--seed` and `--out` are those of sequences."""
    group = command.add_argument_group("pictures (MaskGIT, RAR): --num of each class, in a PNG")
    group.add_argument("--tokenizer", metavar="REF", help="visual tokenizer of the ids (default: the one trained on)")
    group.add_argument("--classes", metavar="NAME,...", help="names or numbers of classes (default: all)")
    group.add_argument("--guidance", type=float, default=3.0, metavar="G", help="0 for none (default: 3)")
    group.add_argument("--steps", type=int, default=8, metavar="N", help="MaskGIT: forward passes (default: 8)")
    group.add_argument("--gumbel", type=float, default=4.0, metavar="T", help="MaskGIT: noise on choices (default: 4)")


def run(found: Artifact, args: argparse.Namespace) -> int:
    """Write a grid of pictures, one column for each class, to `args.out`."""
    import torch

    from zoo.cli.pictures import grid, load_visual, save_image

    if args.out is None:
        raise ZooError("pictures need a file: --out samples.png")
    if args.steps < 1:
        raise ZooError(f"--steps must be at least 1, got {args.steps}")
    numbers = class_numbers(args.classes, found)
    ref = args.tokenizer or trained_on(found)
    _, tokenizer = load_visual(ref)
    check_pair(found.model, tokenizer, ref)
    columns = []
    for number in numbers:
        classes = torch.full((args.num,), number)
        seed = args.seed * 1_000_003 + number  # a class's pictures do not depend on which others are asked for
        ids = sample(found.model, classes, seed, args.steps, args.guidance, args.temperature, args.gumbel)
        columns.append(decode(tokenizer, ids, seed))
    titles = [str(found.classes[n]) if n < len(found.classes) else str(n) for n in numbers]
    save_image(grid(columns, titles), args.out)
    print(f"{args.out}: {args.num} pictures of each of {len(numbers)} classes")
    return 0


def class_numbers(text: str | None, found: Artifact) -> list[int]:
    """The classes that `--classes` names.

    Raises:
        ZooError: an unknown name or a number out of range.
    """
    count: int = found.config.classes
    if text is None:
        return list(range(count))
    numbers = []
    for part in (p.strip() for p in text.split(",")):
        if part in found.classes:
            numbers.append(found.classes.index(part))
        elif part.isdigit() and int(part) < count:
            numbers.append(int(part))
        else:
            raise ZooError(f"'{part}' is no class of this generator ({count} classes)" + nearest(part, found.classes))
    return numbers


def trained_on(found: Artifact) -> str:
    """The visual tokenizer whose ids a generator was trained on.

    Raises:
        ZooError: the artifact does not say.
    """
    ref = found.run.get("data", {}).get("visual_tokenizer", "")
    if not ref:
        raise ZooError("this generator does not say which visual tokenizer decodes its ids: name it with --tokenizer")
    return str(ref)


def check_pair(generator: Any, tokenizer: Any, ref: str) -> None:
    """Raise ZooError unless the tokenizer decodes what the generator makes."""
    codes, length, most = generator.config.codes, generator.config.length, tokenizer.num_tokens
    if tokenizer.vocab_size != codes or not (length == most or (tokenizer.ordered and length < most)):
        raise ZooError(
            f"the generator makes {length} ids out of {codes}, but '{ref}' decodes {tokenizer.num_tokens} out of "
            f"{tokenizer.vocab_size}"
        )


def sample(
    model: Any,
    classes: Tensor,
    seed: int,
    steps: int = 8,
    guidance: float = 3.0,
    temperature: float = 1.0,
    gumbel: float = 4.0,
) -> Tensor:
    """Ids [B, L] of pictures of *classes* [B] from a MaskGIT (*steps*, *gumbel*) or a RAR (*temperature*)."""
    import torch

    source = torch.Generator().manual_seed(seed)
    if type(model).__name__ == "RAR":
        from zoo.generate.autoregressive_image import generate_rar

        return generate_rar(model, classes, guidance, temperature=temperature, generator=source)
    from zoo.generate.maskgit import MaskGITSampling, maskgit

    sampling = MaskGITSampling(steps=min(steps, model.config.length), temperature=gumbel, guidance=guidance)
    none = torch.full_like(classes, model.dropped)
    count, length = len(classes), model.config.length

    def logits(ids: Tensor, unconditional: bool) -> Tensor:
        return model(ids, none if unconditional else classes)

    def draw(shape: torch.Size) -> Tensor:
        return torch.rand(shape, generator=source)

    return maskgit(logits, count, length, model.mask_id, sampling, draw)


def decode(tokenizer: Any, ids: Tensor, seed: int) -> Tensor:
    """Ids -> pictures in [0, 1]; FlexTok samples with its published settings."""
    from zoo.cli import pictures

    return pictures.decode(tokenizer, ids, argparse.Namespace(steps=20, guidance=7.5, seed=seed))
