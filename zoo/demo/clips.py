"""Behind the pages of video models: a next-block model's clips, and a tokenizer's reconstruction."""

from __future__ import annotations

import argparse
import math
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zoo.errors import ZooError

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.hub.artifact import Artifact

SHOWN = 256  # least side of a clip on the page
PICTURES = (".gif", ".png", ".webp", ".jpg", ".jpeg")


class _Clips:
    """GIFs in a folder that goes with the object."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="zoo-demo-")
        self._count = 0

    def write(self, clips: Tensor, fps: float) -> str:
        """A GIF of clips [N, 3, T, H, W] side by side, enlarged without smoothing."""
        from zoo.cli.clips import save_clips

        factor = -(-SHOWN // min(clips.shape[-2:]))
        large = clips.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        self._count += 1
        file = Path(self._place.name) / f"clip_{self._count}.gif"
        save_clips(large, file, fps, columns=len(clips))
        return str(file)


class ClipGeneratorDemo:
    """A next-block model and the tokenizer of its codes.

    Attributes:
        continues: clips begin with given frames, those of a dropped file or of the data set.
        classes: names of the classes of a model that takes one.
        samples: clips of the data set that can be chosen from.
        latent_frames: of a clip.

    Raises:
        ZooError: no tokenizer is known or given, another one's codes, or a model that takes texts.
    """

    def __init__(self, artifact: Artifact, tokenizer: str = "", source: Any = None) -> None:
        from zoo.cli.generate_images import trained_on
        from zoo.cli.pictures import load_visual
        from zoo.models.video import VideoModel

        self.model = cast(Any, artifact.model.eval())
        config = self.config = self.model.config
        ref = tokenizer or trained_on(artifact)
        _, found = load_visual(ref)
        if not isinstance(found, VideoModel):
            raise ZooError(f"'{ref}' holds a {type(found).__name__}, not a video tokenizer")
        if found.vocab_size != config.video_vocab:
            raise ZooError(f"the model makes {config.video_vocab} codes, but '{ref}' decodes {found.vocab_size}")
        if config.cond_tokens > 1:
            raise ZooError("this model takes texts, which are for the Python interface")
        self.tokenizer: Any = found.eval()
        self.source = source
        self.samples = 0 if source is None else len(source)
        self.continues = not config.hybrid
        names = artifact.classes
        self.classes = [names[i] if i < len(names) else str(i) for i in range(config.cond_vocab)]
        self.latent_frames = int(config.grid[0])
        self._clips = _Clips()

    def generate(
        self,
        file: str | None = None,
        sample: int = 0,
        given: int = 2,
        name: str = "",
        temperature: float = 1.0,
        guidance: float = 1.0,
        seed: int = 0,
        fps: float = 8.0,
    ) -> tuple[str, str]:
        """(GIF, a line of facts): the given frames, where the model continues some, and what it makes of them.

        Args:
            file: a GIF, video or picture to begin with; None takes clip number *sample* of the data set.
            sample: see *file*.
            given: latent frames that are given.
            name: class, for a model that takes one.
            temperature, guidance, seed: of the draws; guidance only with a class.
            fps: of the GIF.

        Raises:
            ZooError: nothing to continue, too few frames, or numbers that the model does not take.
        """
        import torch

        from zoo.generate.next_block import generate_blocks

        frames = self._given(file, int(sample), int(given)) if self.continues else None
        cond = torch.tensor([[self._class(name)]]) if self.classes else None
        made = generate_blocks(
            self.model,
            cond,
            frames,
            temperature=float(temperature),
            guidance=float(guidance) if cond is not None and guidance > 0 else 1.0,
            generator=torch.Generator().manual_seed(int(seed)),
        )
        with torch.no_grad():
            clip = self.tokenizer.decode(made.codes).float().clamp(0, 1)
        begun = f", the first {int(given)} latent frames given" if frames is not None else ""
        facts = f"{clip.shape[2]} frames from {made.codes[0].numel()} tokens in {made.steps} passes{begun}."
        return self._clips.write(clip, fps), facts

    def _class(self, name: str) -> int:
        if name not in self.classes:
            raise ZooError(f"'{name}' is no class of this model")
        return self.classes.index(name)

    def _given(self, file: str | None, sample: int, given: int) -> Tensor:
        """Codes [1, given, H, W]."""
        import numpy as np
        import torch

        most = self.latent_frames - 1
        if not 1 <= given <= most:
            raise ZooError(f"the given latent frames must be 1 to {most}, got {given}")
        t, h, w = self.tokenizer.factor
        rows, columns = self.config.grid[1:]
        if file:
            need = 1 + (given - 1) * t if self.tokenizer.lone_first else given * t
            clip = read_clip(Path(file), need, rows * h, columns * w)
        elif self.source is None:
            raise ZooError("this model continues clips: drop one, or start the page with --data NAME")
        elif not 0 <= sample < self.samples:
            raise ZooError(f"the data set has clips 0 to {self.samples - 1}, got {sample}")
        else:
            clip = torch.from_numpy(self.source.batch(np.array([sample]), 0, 0)["pixels"])
        with torch.no_grad():
            codes = self.tokenizer.encode(clip)
        if tuple(codes.shape[2:]) != (rows, columns):
            raise ZooError(f"the model makes frames of {[rows, columns]} tokens, these have {list(codes.shape[2:])}")
        if codes.shape[1] < given:
            raise ZooError(f"the clip has {codes.shape[1]} latent frames, {given} are to be given")
        return codes[:, :given].long()


class ClipTokenizerDemo:
    """A video tokenizer.

    Attributes:
        size, frames: of the clips it was trained on, or what goes with its factors.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.model = cast(Any, artifact.model.eval())
        data = artifact.recipe.get("data", {})
        t, h, w = self.model.factor
        step = math.lcm(h, w)
        self.size = max(step, int(data.get("size") or 128) // step * step)
        frames = int(data.get("frames") or 17)
        lone = int(self.model.lone_first)
        self.frames = max(1, (frames - lone) // t) * t + lone
        self._clips = _Clips()

    def reconstruct(self, file: str | None, fps: float = 8.0) -> tuple[str, str]:
        """(GIF of the clip beside what the model makes of it, a line of facts).

        Raises:
            ZooError: no file, or one that is no clip.
        """
        import torch

        from zoo.nn.image_metrics import psnr

        if not file:
            raise ZooError("drop a clip first")
        clip = read_clip(Path(file), self.frames, self.size, self.size, pad=True)
        with torch.no_grad():
            if self.model.vocab_size is None:
                output = self.model.decode_latents(self.model.encode_latents(clip)).float().clamp(0, 1)
                facts = "continuous latents"
            else:
                ids = self.model.encode(clip)
                output = self.model.decode(ids).float().clamp(0, 1)
                facts = f"{' x '.join(map(str, ids.shape[1:]))} tokens"
        error = float(psnr(output.transpose(1, 2).flatten(0, 1), clip.transpose(1, 2).flatten(0, 1)).mean())
        file = self._clips.write(torch.cat([clip, output]), fps)
        side = f"{self.size} x {self.size}"
        return file, f"{clip.shape[2]} frames of {side} pixels, {facts}, {error:.2f} dB PSNR a frame."


def read_clip(file: Path, frames: int, height: int, width: int, pad: bool = False) -> Tensor:
    """[1, 3, frames, height, width] in [0, 1]: the first frames of a GIF, a video or a picture, cut from the centre.

    Args:
        file: by its suffix; videos need PyAV.
        frames, height, width: of the clip.
        pad: repeat the last frame where there are too few.

    Raises:
        ZooError: not a clip, or one of too few frames.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

    from zoo.datamodules.videos import VIDEOS, read_frames, video_facts

    suffix = file.suffix.lower()
    if suffix in PICTURES:
        try:
            with Image.open(file) as image:
                found = [part.convert("RGB") for part in islice(ImageSequence.Iterator(image), frames)]
        except (UnidentifiedImageError, OSError) as error:
            raise ZooError(f"'{file.name}' is not a readable picture ({error})") from None
    elif suffix in VIDEOS:
        count = min(video_facts(file)[0], frames)
        found = [Image.fromarray(frame) for frame in read_frames(file, np.arange(count))]
    else:
        raise ZooError(f"'{file.name}' is no clip: it should end in one of {', '.join((*PICTURES, *VIDEOS))}")
    if len(found) < frames and not pad:
        raise ZooError(f"'{file.name}' has {len(found)} frames, {frames} are needed")
    found += [found[-1]] * (frames - len(found))
    fitted = [np.asarray(ImageOps.fit(part, (width, height), Image.Resampling.BILINEAR)) for part in found]
    return torch.from_numpy(np.stack(fitted)).permute(3, 0, 1, 2)[None].float() / 255


def load_source(data: str, split: str, root: str) -> Any:
    """The clips that `--data --split --root` name."""
    from zoo.cli.clips import load_split

    return load_split(argparse.Namespace(data=data, split=split, root=root or None, set=None))[1]
