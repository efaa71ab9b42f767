"""`zoo predict --image`: what a vision-language model answers to a question about a picture."""

from __future__ import annotations

import argparse
from typing import Any

from zoo.cli.common import existing_file, write_rows
from zoo.errors import ZooError


def run(args: argparse.Namespace) -> int:
    """Answer `--question` about every picture of `--image`, one line each."""
    if not args.question:
        raise ZooError("--image needs a --question about the picture")
    files = [existing_file(name, "picture") for name in args.image]
    from zoo.hub import artifact
    from zoo.models.mqt import MQT

    found = artifact.load(args.ref)
    if not isinstance(found.model, MQT):
        raise ZooError(f"'{args.ref}' holds a {type(found.model).__name__}, which answers no questions about pictures")
    if found.tokenizer is None:
        raise ZooError(f"'{args.ref}' has no tokenizer for the question")
    rows = [[file.name, args.question, answer(found, file, args.question, args.tokens)] for file in files]
    write_rows(rows, ["image", "question", "answer"], args.out)
    return 0


def answer(found: Any, file: Any, question: str, tokens: int = 0) -> str:
    """The words of the greedy answer; *tokens* visual tokens, 0 for as many as the model makes."""
    import torch

    from zoo.datamodules.pictures import fit, open_rgb
    from zoo.datamodules.vqa import DEFAULT_PROMPT, prompt
    from zoo.nn.preprocess import PreprocessConfig

    model, tokenizer = found.model.eval(), found.tokenizer
    settings = PreprocessConfig(size=model.config.size, resize="both")
    pixels = torch.from_numpy(fit(open_rgb(file), settings)).float()[None] / 255
    template = found.recipe.get("data", {}).get("prompt", DEFAULT_PROMPT)
    ids = torch.tensor(prompt(question, tokenizer, model.config.image_token, template))
    end = tokenizer.special["eos"]
    return tokenizer.decode(model.answer(ids, pixels, tokens or None, end=end).tolist(), skip_special=True)
