"""Answering questions about pictures with an elastic number of visual tokens.

Hu et al. 2024 (MQT-LLaVA, arXiv:2405.19315), section 3.2: each training step draws one number of tokens for its batch.
"""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.models.mqt import IGNORE, MQT, next_token_loss
from zoo.nn.query_transformer import QueryTransformer
from zoo.tasks.base import Batch, Task
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig


@config
class VQAConfig:
    """Settings of the task.

    Attributes:
        optim: optimiser and schedule.
        tokens: visual tokens of every training step; 0 draws them anew by the law of the query transformer.
        budgets: numbers of visual tokens that validation measures one after the other; () takes all of them at once.
        tower: weights the vision tower starts from: artifact of an MQT, CLIP in transformers' layout (file, folder or
            Hub id) or, for a tower of timm, a file of its weights.
        lm: weights the decoder starts from: artifact of an MQT or of a decoder, or a Llama in transformers' layout.
        random_frozen: let a frozen tower or decoder keep the random weights it was made with.
    """

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95)))
    tokens: int = 0
    budgets: tuple[int, ...] = ()
    tower: str = ""
    lm: str = ""
    random_frozen: bool = False

    def __post_init__(self) -> None:
        if self.tokens < 0 or any(m < 1 for m in self.budgets):
            raise ValueError("tokens must be at least 0, and every budget at least 1")


class VQA(Task):
    """Batches as `zoo.datamodules.vqa` makes them. An answer counts where every word of it, and its end, is right.

    Raises:
        ZooError: the model is no MQT, or cannot make so many tokens.
    """

    correct: Any

    def __init__(self, model: nn.Module, config: VQAConfig) -> None:
        super().__init__(model, config)
        if not isinstance(model, MQT):
            raise ZooError(f"task vqa trains an MQT, not a {type(model).__name__}")
        elastic, most = isinstance(model.projector, QueryTransformer), model.config.max_tokens
        for m in (*config.budgets, *([config.tokens] if config.tokens else [])):
            if m > most or (not elastic and m != most):
                raise ZooError(
                    f"the model makes {'at most ' if elastic else ''}{most} visual tokens a picture, not {m}"
                )
        self.budgets: tuple[int, ...] = config.budgets or (most,)
        self.correct = nn.ModuleDict(
            {f"{stage}_{m}": WeightedMean() for stage in ("val", "test") for m in self.budgets}
        )

    def draw(self) -> int | None:
        """Visual tokens of a training step."""
        if self.config.tokens:
            return self.config.tokens
        return self.model.projector.draw() if isinstance(self.model.projector, QueryTransformer) else None

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        if stage == "train":
            loss, hits = self.answer(batch, self.draw())
            return loss, hits.new_tensor(len(hits))
        losses = []
        for m in self.budgets:
            loss, hits = self.answer(batch, m)
            self.correct[f"{stage}_{m}"].update(hits.float().mean(), float(len(hits)))
            losses.append(loss)
        return torch.stack(losses).mean(), loss.new_tensor(len(batch["ids"]))

    def answer(self, batch: Batch, m: int | None, reducer: str = "") -> tuple[Tensor, Tensor]:
        """Loss, and [B] whether each answer is right; *m* and *reducer* as `MQT.visual_tokens` takes them."""
        model = self.model
        tokens = model.visual_tokens(batch["pixels"], m, reducer)
        spliced = model.splice(batch["ids"], tokens, batch["valid"], batch["labels"])
        logits = model.read(spliced)
        wanted = spliced.labels[:, 1:]
        same = (logits[:, :-1].argmax(-1) == wanted) | (wanted == IGNORE)
        return next_token_loss(logits, spliced.labels), same.all(1)

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        values: dict[str, Tensor | float] = {}
        for m in self.budgets:
            metric = self.correct[f"{stage}_{m}"]
            values[f"accuracy_{m}"] = metric.compute()
            metric.reset()
        return values

    def metric_names(self) -> list[str]:
        return ["val/loss", *(f"val/accuracy_{m}" for m in self.budgets)]

    def notes(self) -> list[tuple[str, str]]:
        """What a dry run says of pictures and of the stage of training."""
        model, c = self.model, self.model.config
        count = lambda part: sum(p.numel() for p in part.parameters() if p.requires_grad)
        parts = {"vision tower": model.tower, "projector": model.projector, "decoder": model.lm}
        sizes = {name: (count(part), sum(p.numel() for p in part.parameters())) for name, part in parts.items()}
        adapted = {name for name, part in parts.items() if any("lora_" in key for key, _ in part.named_parameters())}
        words = [
            f"{name} {'by adapters ' if name in adapted else ''}{trained:,} of {of:,}"
            for name, (trained, of) in sizes.items()
            if trained
        ]
        still = [name for name, (trained, _) in sizes.items() if not trained]
        starts = [
            f"{name} from {ref}" for name, ref in (("tower", self.config.tower), ("decoder", self.config.lm)) if ref
        ]
        tokens = f"{c.max_tokens} visual tokens"
        if isinstance(model.projector, QueryTransformer):
            law = f"always {self.config.tokens}" if self.config.tokens else f"drawn by the law '{c.queries.law}'"
            tokens = f"1 to {c.max_tokens} visual tokens, in training {law}"
        rows = [
            ("pictures", f"{c.size} pixels, {c.side**2} patches, {tokens}"),
            ("trains", "; ".join(words)),
            ("stands still", ", ".join(still) if still else "nothing"),
        ]
        return rows + ([("starts", "; ".join(starts))] if starts else [])
