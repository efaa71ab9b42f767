"""`zoo eval` on pictures: a visual tokenizer's reconstructions, or a generator's samples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from zoo.cli.common import print_json, table
from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact


def add_options(command: Any) -> None:
    """Options that only pictures have."""
    group = command.add_argument_group("pictures")
    group.add_argument(
        "--extractor", metavar="NAME:FILE", help="network of torchvision and its weights, for FID and IS"
    )
    group.add_argument("--extractor-sha256", default="", metavar="HEX", help="of that file")
    group.add_argument("--lpips", metavar="FILE", help="weights of LPIPS (VGG): whole, or the linear heads")
    group.add_argument(
        "--vgg", default="", metavar="FILE", help="torchvision's VGG-16, where --lpips holds heads alone"
    )
    group.add_argument("--tokens", type=int, default=0, metavar="K", help="only the first K tokens (FlexTok)")
    group.add_argument(
        "--steps", type=int, default=0, metavar="N", help="FlexTok: Euler steps (20); MaskGIT: passes (8)"
    )
    group.add_argument("--guidance", type=float, metavar="G", help="FlexTok (7.5), generators (3)")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="RAR (1)")
    group.add_argument("--gumbel", type=float, default=4.0, metavar="T", help="MaskGIT (4)")
    group.add_argument("--tokenizer", metavar="REF", help="visual tokenizer of a generator's ids")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")


def wanted(found: Artifact) -> bool:
    """Whether an artifact is measured on pictures."""
    from zoo.models.visual import VisualModel

    return isinstance(found.model, VisualModel) or found.info.get("model") in ("maskgit", "rar")


def run(found: Artifact, section: dict[str, Any], args: argparse.Namespace) -> int:
    """Print the metrics and the protocol they were taken by."""
    from zoo import datamodules
    from zoo.models.visual import VisualModel
    from zoo.train.image_eval import open_extractor

    data: Any = datamodules.build(section, None)
    data.setup()
    if not hasattr(data, "serves") or not hasattr(data.sources.get(args.split), "reader"):
        raise ZooError(f"data set '{args.data}' has no pictures in its {args.split} split")
    extractor = open_extractor(args.extractor, args.extractor_sha256) if args.extractor else None
    measure = _reconstructions if isinstance(found.model, VisualModel) else _samples
    report = measure(found, data, args, extractor)
    name = section.get("id") or args.data
    if args.json:
        metrics = {f"{args.split}/{key}": value for key, value in report.metrics.items()}
        about = {"title": report.title, "protocol": list(report.protocol)}
        print_json({"ref": args.ref, "data": name, "split": args.split, "metrics": metrics, **about})
        return 0
    print(f"{args.ref} on {args.split} of {name}: {report.title}")
    print(table([(key, f"{value:.4f}") for key, value in report.metrics.items()], ("metric", "value"), right=(1,)))
    print("\n".join(report.protocol))
    return 0


def _reconstructions(found: Artifact, data: Any, args: argparse.Namespace, extractor: Any) -> Any:
    from zoo.cli.pictures import decode
    from zoo.nn.perceptual import PerceptualConfig
    from zoo.train.image_eval import reconstruction_report

    model: Any = found.model
    if model.vocab_size is None:
        raise model.continuous()
    if not 0 <= args.tokens <= model.num_tokens:
        raise ZooError(f"--tokens must be 1 to {model.num_tokens}, got {args.tokens}")
    guidance = 7.5 if args.guidance is None else args.guidance
    options = argparse.Namespace(steps=args.steps or 20, guidance=guidance, seed=args.seed)
    perceptual = None
    if args.lpips:
        perceptual = PerceptualConfig(lpips=1.0, lpips_weights=args.lpips, vgg_weights=args.vgg)
    report = reconstruction_report(
        model,
        _pictures(data, args.split, model.config.preprocess),
        lambda ids: decode(model, ids, options),
        tokens=args.tokens,
        extractor=extractor,
        perceptual=perceptual,
    )
    return report


def _samples(found: Artifact, data: Any, args: argparse.Namespace, extractor: Any) -> Any:
    """One generated picture for each real one, of its class."""
    import torch

    from zoo.cli import generate_images, pictures
    from zoo.train.image_eval import generation_report

    if extractor is None:
        raise ZooError("samples are measured by FID and IS, which need --extractor NAME:FILE")
    ref = args.tokenizer or generate_images.trained_on(found)
    _, tokenizer = pictures.load_visual(ref)
    generate_images.check_pair(found.model, tokenizer, ref)
    classes_known: int = found.config.classes
    labels = torch.from_numpy(data.sources[args.split].reader.labels)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes_known):
        raise ZooError(f"the pictures of '{args.data}' are not of this generator's {classes_known} classes")
    steps, guidance = args.steps or 8, 3.0 if args.guidance is None else args.guidance

    def make() -> Any:
        for number, classes in enumerate(labels.split(64)):
            seed = args.seed * 1_000_003 + number
            ids = generate_images.sample(found.model, classes, seed, steps, guidance, args.temperature, args.gumbel)
            yield generate_images.decode(tokenizer, ids, seed)

    real = _pictures(data, args.split, tokenizer.config.preprocess)
    how = f"guidance {guidance:g}, seed {args.seed}, tokenizer {ref}"
    return generation_report(real, make(), extractor, tokenizer.config.preprocess, how)


def _pictures(data: Any, split: str, preprocess: Any) -> Any:
    """Batches of a split, prepared as the model says."""
    from zoo.cli.pictures import Pictures

    reader = data.sources[split].reader
    return Pictures(list(reader.names), [], data.classes, reader).batches(preprocess, 32)
