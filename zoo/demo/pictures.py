"""Behind the pages of picture models: a tokenizer's reconstruction, and a generator's samples."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, cast

from zoo.errors import ZooError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from zoo.hub.artifact import Artifact

SHOWN = 256  # least side of a picture on the page
IDS_SHOWN = 32


class PictureTokenizerDemo:
    """A visual tokenizer.

    Attributes:
        most: tokens of a picture.
        ordered: any first few of them decode (FlexTok), by sampling.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.model = cast(Any, artifact.model.eval())
        self.most: int = self.model.num_tokens
        self.ordered: bool = self.model.ordered

    def reconstruct(
        self, image: Image | None, tokens: int = 0, steps: int = 20, guidance: float = 7.5, seed: int = 0
    ) -> tuple[Image, Image | None, str]:
        """(what the model sees, what it makes of it, a line of facts); *tokens* 0 for all of them.

        The second is None for a tokenizer whose ids do not decode to pixels; the line then says so.

        Raises:
            ZooError: no picture.
        """
        import numpy as np
        import torch

        from zoo.cli.pictures import decode
        from zoo.datamodules.pictures import fit
        from zoo.nn.image_metrics import psnr

        if image is None:
            raise ZooError("drop a picture first")
        settings = self.model.config.preprocess
        pixels = torch.from_numpy(np.ascontiguousarray(fit(flat(image), settings))).float()[None] / 255
        seen = enlarged(pixels)
        with torch.no_grad():
            if self.model.vocab_size is None:
                output = self.model.decode_latents(self.model.encode_latents(pixels)).float().clamp(0, 1)
                return seen, enlarged(output), f"{float(psnr(output, pixels)):.2f} dB PSNR from continuous latents."
            ids = self.model.encode(pixels)
            kept = ids[:, : int(tokens) or None] if self.ordered else ids
            facts = f"{kept.shape[1]} of {self.most} tokens: {listed(kept[0].tolist())}."
            options = argparse.Namespace(steps=int(steps), guidance=float(guidance), seed=int(seed))
            try:
                output = decode(self.model, kept, options)
            except ZooError as error:
                return seen, None, f"{facts} No picture: {error}."
        return seen, enlarged(output), f"{float(psnr(output, pixels)):.2f} dB PSNR from {facts}"


class PictureGeneratorDemo:
    """A class-conditional generator and the tokenizer that decodes its ids.

    Attributes:
        classes: names of the classes, or their numbers.
        stepwise: the number of passes can be chosen (MaskGIT).

    Raises:
        ZooError: no tokenizer is known or given, or another one's codes.
    """

    def __init__(self, artifact: Artifact, tokenizer: str = "") -> None:
        from zoo.cli.generate_images import check_pair, trained_on
        from zoo.cli.pictures import load_visual

        ref = tokenizer or trained_on(artifact)
        _, self.tokenizer = load_visual(ref)
        check_pair(artifact.model, self.tokenizer, ref)
        self.model = cast(Any, artifact.model.eval())
        names, count = artifact.classes, int(artifact.config.classes)
        self.classes = [names[i] if i < len(names) else str(i) for i in range(count)]
        self.stepwise = type(self.model).__name__ != "RAR"

    def sample(
        self, name: str, number: int = 4, guidance: float = 3.0, steps: int = 8, temperature: float = 1.0, seed: int = 0
    ) -> tuple[Image, str]:
        """A row of *number* pictures of the class *name*, and a line of facts."""
        import torch

        from zoo.cli.generate_images import decode, sample
        from zoo.cli.pictures import grid

        if name not in self.classes:
            raise ZooError(f"'{name}' is no class of this generator")
        classes = torch.full((int(number),), self.classes.index(name))
        ids = sample(self.model, classes, int(seed), int(steps), float(guidance), float(temperature))
        pixels = decode(self.tokenizer, ids, int(seed))
        sheet = grid([pixels[i : i + 1] for i in range(len(pixels))])
        return nearest_up(sheet, SHOWN), f"{len(pixels)} pictures of {ids.shape[1]} tokens each."


def flat(image: Image) -> Image:
    """RGB, transparency laid on white."""
    from PIL import Image as Images

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Images.alpha_composite(Images.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def enlarged(pixels: Tensor) -> Image:
    """[1, 3, H, W] in [0, 1] -> a picture that can be seen."""
    from zoo.cli.pictures import to_image

    return nearest_up(to_image(pixels[0]), SHOWN)


def nearest_up(image: Image, least: int) -> Image:
    """Whole-number enlargement, without smoothing, so that the shorter side has at least *least* pixels."""
    from PIL import Image as Images

    factor = -(-least // min(image.size))
    return image.resize((image.width * factor, image.height * factor), Images.Resampling.NEAREST)


def listed(ids: list[int]) -> str:
    """The first ids, and dots where there are more."""
    return ", ".join(map(str, ids[:IDS_SHOWN])) + (", ..." if len(ids) > IDS_SHOWN else "")
