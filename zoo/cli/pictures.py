"""What the commands on pictures share: finding files, running a visual tokenizer, and laying pictures out on a grid."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.common import Parser
from zoo.errors import ZooError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from zoo.hub.artifact import Artifact
    from zoo.models.visual import VisualModel


@dataclass(frozen=True)
class Pictures:
    """Pictures that a command works on, read one by one.

    Attributes:
        names: of the files, or of the samples of a data set.
        labels: class of each, -1 where it has none.
        classes: names of the classes.
        reader: gives the picture of a number as RGB.
    """

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    reader: Any

    def batches(self, preprocess: Any, size: int) -> Iterator[Tensor]:
        """[B, 3, S, S] in [0, 1], resized and cut as *preprocess* says."""
        import numpy as np
        import torch

        from zoo.datamodules.pictures import fit

        for start in range(0, len(self.names), size):
            stop = min(start + size, len(self.names))
            rows: list[NDArray[Any]] = [fit(self.reader.read(i), preprocess) for i in range(start, stop)]
            yield torch.from_numpy(np.stack(rows)).float() / 255


class _Files:
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def read(self, index: int) -> Any:
        from zoo.datamodules.pictures import open_rgb

        return open_rgb(self.files[index])


def add_source_options(command: Parser) -> None:
    """`IMAGES... --data --split --limit --batch-size`."""
    command.add_argument("images", nargs="*", metavar="IMAGES", help="picture files, or folders of them")
    command.add_argument(
        "--data", metavar="NAME", help="pictures of a data set of the catalogue or a YAML file, instead"
    )
    command.add_argument(
        "--split", default="test", metavar="SPLIT", help="of --data: train, val or test (default: test)"
    )
    command.add_argument(
        "--root", metavar="DIR", help="folder that holds the files of --data, where the catalogue does not ship them"
    )
    command.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N pictures")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (default: 32)")


def find(args: argparse.Namespace) -> Pictures:
    """The pictures that the arguments name.

    Raises:
        ZooError: none, both files and a data set, a path without pictures, an unknown split.
    """
    if args.batch_size < 1 or args.limit < 0:
        raise ZooError("--batch-size must be at least 1 and --limit must not be negative")
    if bool(args.images) == bool(args.data):
        raise ZooError("name picture files or folders, or a data set with --data, and not both")
    found = _of_data(args) if args.data else _of_files(args.images)
    keep = slice(args.limit or None)
    return Pictures(found.names[keep], found.labels[keep], found.classes, found.reader)


def _of_files(images: Sequence[str]) -> Pictures:
    from zoo.datamodules.pictures import SUFFIXES

    files: list[Path] = []
    names: list[str] = []
    for text in images:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in SUFFIXES]
            if not inside:
                raise ZooError(f"folder '{text}' holds no picture ({', '.join(SUFFIXES)})")
            files += inside
            names += [f.relative_to(path).as_posix() for f in inside]
        elif path.is_file():
            files.append(path)
            names.append(path.name)
        else:
            raise ZooError(f"picture '{text}' does not exist")
    return Pictures(names, [-1] * len(files), (), _Files(files))


def _of_data(args: argparse.Namespace) -> Pictures:
    from zoo import datamodules
    from zoo.cli.evaluate import SPLITS, data_section

    if args.split not in SPLITS:
        raise ZooError(f"unknown split '{args.split}'" + nearest(args.split, SPLITS))
    data: Any = datamodules.build(data_section(args.data, [f"root={args.root}"] if args.root else []), None)
    data.setup()
    source = data.sources.get(args.split)
    if not hasattr(source, "reader"):
        what = "holds no pictures" if source is not None else f"has no {args.split} split"
        raise ZooError(f"data set '{args.data}' {what}")
    reader = source.reader
    return Pictures(list(reader.names), [int(label) for label in reader.labels], data.classes, reader)


def load_visual(ref: str) -> tuple[Artifact, VisualModel]:
    """The visual tokenizer of an artifact.

    Raises:
        ZooError: another kind of model, or a tokenizer whose latents are continuous.
    """
    from zoo.cli.finetune import check_ref
    from zoo.hub import artifact
    from zoo.models.visual import VisualModel

    check_ref(ref)
    found = artifact.load(ref)
    model = found.model
    if not isinstance(model, VisualModel):
        raise ZooError(f"'{ref}' holds a {type(model).__name__}, not a visual tokenizer")
    if model.vocab_size is None:
        raise model.continuous()
    return found, model


def add_decode_options(command: Parser) -> None:
    """Options of FlexTok's decoder."""
    command.add_argument("--steps", type=int, default=20, metavar="N", help="FlexTok: Euler steps (default: 20)")
    command.add_argument("--guidance", type=float, default=7.5, metavar="G", help="FlexTok: guidance (default: 7.5)")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default: 0)")


def decode(model: VisualModel, ids: Tensor, args: argparse.Namespace) -> Tensor:
    """Ids [B, k] -> pixels [B, 3, S, S] in [0, 1]; the noise of a batch is a function of the seed.

    Raises:
        ZooError: too few ids for a tokenizer that needs all, or one that gives no pixels.
    """
    import torch

    if model.ordered:
        from zoo.nn.flow import Guidance

        source = torch.Generator().manual_seed(args.seed)
        guidance = Guidance(args.guidance, projected=args.guidance != 1)
        pixels = model.decode(ids, steps=args.steps, guidance=guidance, generator=source)  # type: ignore[call-arg]
    else:
        if ids.shape[1] != model.num_tokens:
            raise ZooError(
                f"a {type(model).__name__} decodes all of its {model.num_tokens} tokens, not {ids.shape[1]}: "
                "only tokenizers that order them, such as FlexTok, take fewer"
            )
        pixels = model.decode(ids)
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ZooError(f"a {type(model).__name__} decodes to vectors of shape {list(pixels.shape)}, not to pictures")
    return pixels.float().clamp(0, 1)


def to_image(pixels: Tensor) -> Any:
    """[3, H, W] in [0, 1] -> PIL picture, rounded to 8 bits."""
    from PIL import Image

    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(columns: Sequence[Tensor], titles: Sequence[str] = (), gap: int = 2) -> Any:
    """PIL picture of equal-sized pictures: column i holds `columns[i]` [N, 3, H, W], under its title."""
    from PIL import Image, ImageDraw

    height, width = columns[0].shape[-2:]
    head = 14 if titles else 0
    rows = max(len(column) for column in columns)
    size = (len(columns) * (width + gap) + gap, rows * (height + gap) + gap + head)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, column in enumerate(columns):
        x = gap + i * (width + gap)
        if titles:
            draw.text((x, 1), titles[i], fill="black")
        for j, pixels in enumerate(column):
            sheet.paste(to_image(pixels), (x, head + gap + j * (height + gap)))
    return sheet


def save_image(image: Any, out: str) -> None:
    """Write a PNG.

    Raises:
        ZooError: the name does not end in .png, or the folder is not there.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() != ".png":
        raise ZooError(f"'{out}' must end in .png")
    if not path.parent.is_dir():
        raise ZooError(f"folder '{path.parent}' does not exist")
    image.save(path)
