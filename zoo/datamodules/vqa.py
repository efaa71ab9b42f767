"""Questions about pictures: JSON lines beside a folder of pictures, and the set that easy-vqa ships."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from zoo.config import config
from zoo.datamodules.base import Data
from zoo.datamodules.loader import Source
from zoo.datamodules.manifest import FileConfig, check
from zoo.datamodules.pictures import fit, open_rgb
from zoo.datamodules.settings import DataConfig
from zoo.errors import ZooError
from zoo.nn.preprocess import PreprocessConfig
from zoo.tokenizers.base import Tokenizer

IGNORE = -100
DEFAULT_PROMPT = "{image}{question}"


@config
class VQADataConfig(DataConfig):
    """Pictures, questions and answers.

    Attributes:
        root: folder that the paths are relative to; None: the catalogue's, then the working directory.
        train, val, test: files of JSON lines, `{"image": path beside the file, "question": ..., "answer": ...}`.
        builtin: in place of files, `easy_vqa`: the pictures and questions of the package easy-vqa; its test pictures
            are halved into val and test.
        image_token: id that stands for the picture, as the model's.
        prompt: what stands before the answer; {image} is the picture, {question} the question.
        preprocess: resizing, crop and size of the pictures.
        cache: keep the resized pictures in memory.
        limit: use only so many questions of each split, spread evenly; 0 uses all.
        val_limit: the same for the val split alone, which is measured while a model trains.
        batch_size, eval_batch_size: questions a batch, in training and otherwise (None: the same).
    """

    train: FileConfig | None = None
    val: FileConfig | None = None
    test: FileConfig | None = None
    builtin: Literal["", "easy_vqa"] = ""
    image_token: int = -200
    prompt: str = "{image}{question}"
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    cache: bool = True
    limit: int = 0
    val_limit: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.builtin) == any(split is not None for split in (self.train, self.val, self.test)):
            raise ValueError("a set of questions needs files (train, val, test) or one 'builtin' name, and not both")
        if self.image_token >= 0:
            raise ValueError(f"image_token must be negative, no id of a word, got {self.image_token}")
        if self.prompt.count("{image}") != 1:
            raise ValueError(f"prompt must hold {{image}} once, got '{self.prompt}'")
        if min(self.limit, self.val_limit) < 0:
            raise ValueError("limit and val_limit must not be negative")


@dataclass(frozen=True)
class Question:
    """One sample."""

    image: Path
    question: str
    answer: str


def read_questions(file: Path) -> list[Question]:
    """The lines of a JSON-lines file.

    Raises:
        ZooError: a line that is no such object; it is named.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[key] for key in ("image", "question", "answer")]
        except (json.JSONDecodeError, KeyError, TypeError):
            texts = []
        if len(texts) != 3 or not all(isinstance(text, str) and text for text in texts):
            raise ZooError(f"line {number} of '{file}' needs the texts 'image', 'question' and 'answer'")
        found.append(Question(file.parent / texts[0], texts[1], texts[2]))
    if not found:
        raise ZooError(f"'{file}' holds no question")
    return found


def easy_vqa() -> dict[str, list[Question]]:
    """The questions of the package easy-vqa, which is not imported.

    Raises:
        ZooError: it is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise ZooError("the set 'easy_vqa' comes with easy-vqa, which is not installed: pip install 'seqzoo[vqa]'")
    place = Path(next(iter(spec.submodule_search_locations))) / "data"
    parts = {}
    for split in ("train", "test"):
        rows = json.loads((place / split / "questions.json").read_text(encoding="utf-8"))
        parts[split] = [(i, Question(place / split / "images" / f"{i}.png", q, a)) for q, a, i in rows]
    return {
        "train": [question for _, question in parts["train"]],
        "val": [question for i, question in parts["test"] if i % 2 == 0],
        "test": [question for i, question in parts["test"] if i % 2],
    }


class QuestionSource:
    """Batches ids, labels [B, L], valid [B, L], pixels [B, 3, S, S] float32 in [0, 1], and index [B].

    A row is <s> picture question answer </s>; labels are -100 but for the answer and </s>.
    """

    def __init__(self, questions: list[Question], cfg: VQADataConfig, tokenizer: Tokenizer) -> None:
        self.questions, self.cfg, self.tokenizer = questions, cfg, tokenizer
        self.kept: dict[Path, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self.questions)

    def picture(self, place: Path) -> NDArray[np.uint8]:
        """[3, S, S] of one picture."""
        if place in self.kept:
            return self.kept[place]
        pixels = fit(open_rgb(place), self.cfg.preprocess)
        if self.cfg.cache:
            self.kept[place] = pixels
        return pixels

    def row(self, question: Question) -> tuple[list[int], int]:
        """Ids of one sample and how many of them stand before the answer."""
        special = self.tokenizer.special
        head = prompt(question.question, self.tokenizer, self.cfg.image_token, self.cfg.prompt)
        answer = self.tokenizer.encode(question.answer, add_special=False).tolist()
        return [*head, *answer, special["eos"]], len(head)

    def batch(self, index: NDArray[np.int64], epoch: int, step: int) -> dict[str, Any]:
        chosen = [self.questions[int(i)] for i in index]
        rows = [self.row(question) for question in chosen]
        width = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), width), self.tokenizer.special["pad"], np.int64)
        labels = np.full((len(rows), width), IGNORE, np.int64)
        valid = np.zeros((len(rows), width), np.bool_)
        for i, (row, head) in enumerate(rows):
            ids[i, : len(row)], valid[i, : len(row)] = row, True
            labels[i, head : len(row)] = row[head:]
        pixels = np.stack([self.picture(question.image) for question in chosen]).astype(np.float32) / np.float32(255)
        return {"ids": ids, "valid": valid, "labels": labels, "pixels": pixels, "index": index}


def prompt(question: str, tokenizer: Tokenizer, image_token: int, template: str = DEFAULT_PROMPT) -> list[int]:
    """Ids of a question about a picture, up to where the answer begins; texts on both sides are tokenized apart."""
    before, after = (part.replace("{question}", question) for part in template.split("{image}"))
    sides = [tokenizer.encode(text, add_special=False).tolist() if text else [] for text in (before, after)]
    return [tokenizer.special["bos"], *sides[0], image_token, *sides[1]]


class VQAData(Data):
    """Datamodule of questions about pictures; see `VQADataConfig`.

    Raises (in setup):
        ZooError: a file is missing, changed or broken; a picture is missing; the tokenizer lacks a special token.
    """

    Config: ClassVar[type] = VQADataConfig
    config: VQADataConfig
    task_kind = "image"
    serves: ClassVar[tuple[str, ...]] = ("vqa",)
    modality: ClassVar[str] = "vqa"

    def _files(self) -> list[FileConfig]:
        return [file for file in (self.config.train, self.config.val, self.config.test) if file is not None]

    def _load(self) -> dict[str, Source]:
        cfg = self.config
        for name in ("pad", "bos", "eos"):
            if name not in self.tokenizer.special:
                raise ZooError(
                    f"questions need a tokenizer with a '{name}' token, the {self.tokenizer.name} one has none"
                )
        splits = easy_vqa() if cfg.builtin else {
            split: read_questions(check(file, cfg.root))
            for split in ("train", "val", "test")
            if (file := getattr(cfg, split)) is not None
        }  # fmt: skip
        sources: dict[str, Source] = {}
        for split, questions in splits.items():
            limit = min(n for n in (cfg.limit, cfg.val_limit * (split == "val"), len(questions)) if n)
            if len(questions) > limit:
                questions = [questions[i] for i in np.linspace(0, len(questions) - 1, limit).astype(int)]
            missing = next((question.image for question in questions if not question.image.is_file()), None)
            if missing is not None:
                raise ZooError(f"the {split} split asks about the picture '{missing}', which does not exist")
            sources[split] = QuestionSource(questions, cfg, self.tokenizer)
        return sources

    @property
    def max_tokens(self) -> int:
        sources: list[Any] = list(self.sources.values())
        return max(len(source.row(question)[0]) for source in sources for question in source.questions)
