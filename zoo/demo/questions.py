"""Behind the page of a vision-language model: a picture, a question, and how many visual tokens to spend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zoo.errors import ZooError

if TYPE_CHECKING:
    from zoo.hub.artifact import Artifact


class QuestionDemo:
    """A model that answers.

    Attributes:
        most: visual tokens it can spend; 0 where their number is fixed.

    Raises:
        ZooError: no tokenizer for the question.
    """

    def __init__(self, artifact: Artifact) -> None:
        if artifact.tokenizer is None:
            raise ZooError(f"{artifact.path} has no tokenizer for the question")
        self.artifact = artifact
        self.model = cast(Any, artifact.model)
        self.most = int(getattr(self.model.projector, "max_tokens", 0))

    def answer(self, file: str | None, question: str, tokens: int = 0) -> tuple[str, str]:
        """(the answer, a line on what it cost); *tokens* 0 for as many as the model makes.

        Raises:
            ZooError: no picture, no question, or a word that the tokenizer does not know.
        """
        from zoo.cli.answer import answer
        from zoo.train.budget import decoder_flops

        if not file:
            raise ZooError("drop a picture first")
        if not question.strip():
            raise ZooError("ask something about the picture")
        words = answer(self.artifact, Path(file), question.strip(), int(tokens))
        if not self.most:
            return words, ""
        spent = int(tokens) or self.most
        text = len(self.artifact.tokenizer.encode(question.strip(), add_special=False))
        share = decoder_flops(self.model, spent, text) / decoder_flops(self.model, self.most, text)
        return words, f"{spent} of {self.most} visual tokens: {share:.0%} of the decoder's work on the prompt."
