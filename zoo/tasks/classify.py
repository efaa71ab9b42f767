"""Supervised targets: classes, several labels at once, or numbers; one of them a sequence or one a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.config import config
from zoo.errors import ZooError
from zoo.tasks.base import Batch, Task, forward
from zoo.tasks.metrics import multiclass_metrics, multilabel_metrics, regression_metrics
from zoo.tasks.optim import OptimConfig
from zoo.tasks.strands import BOTH, at, both_strands, merged

METRICS = {"multiclass": multiclass_metrics, "multilabel": multilabel_metrics, "regression": regression_metrics}


@config
class ClassifyConfig:
    """Classification or regression with the model's own head and pooling.

    Attributes:
        optim: optimiser and schedule.
        kind: what the labels are. `multiclass`: one class index (-100 ignored); `multilabel`: 0 or 1 for each label;
            `regression`: one or several numbers.
        class_weights: weight of each class (multiclass) or of each label's positives (multilabel) in the training
            loss; empty weighs all alike.
        label_smoothing: share of the target mass spread over all classes (multiclass).
        rc: what is made of the two strands. `augment` trains on a random one of them; `average` does so too and takes
            the mean of both strands' probabilities at test time; `conjoin` trains on the strand that is given (add
            data.rc_augment=true to draw it) and takes the mean of both strands' logits at test time (post-hoc
            conjoining), so that both strands get the same answer. Predictions for tokens are turned round first.
    """

    optim: OptimConfig = field(default_factory=OptimConfig)
    kind: Literal["multiclass", "multilabel", "regression"] = "multiclass"
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    rc: Literal["none", "augment", "average", "conjoin"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie between 0 and 1, got {self.label_smoothing}")


class Classify(Task):
    """Cross entropy, binary cross entropy or squared error. Batches add labels ([B], [B, K] or [B, L]) to ids, valid.

    Raises:
        ZooError: the model's head gives no outputs to train, or class_weights do not fit it.
    """

    scores: Any
    class_weights: Tensor | None

    def __init__(self, model: nn.Module, config: ClassifyConfig) -> None:
        super().__init__(model, config)
        self.outputs = _outputs(model)
        weights = torch.tensor(config.class_weights) if config.class_weights else None
        if weights is not None and len(weights) != self.outputs:
            raise ZooError(f"task.class_weights has {len(weights)} numbers but the head has {self.outputs} outputs")
        self.register_buffer("class_weights", weights, persistent=False)
        make = METRICS[config.kind]
        self.scores = nn.ModuleDict({stage: make(self.outputs) for stage in ("val", "test")})

    def metric_names(self) -> list[str]:
        return ["val/loss", *(f"val/{name}" for name in self.scores["val"])]

    def compute(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        logits, labels = self.flat(self.predict_logits(batch, stage), batch["labels"])
        loss = self.loss(logits, labels, stage)
        if stage != "train" and len(labels):
            counted = labels.int() if self.config.kind == "multilabel" else labels
            self.scores[stage].update(self.probabilities(logits), counted)
        return loss, torch.tensor(len(labels), device=loss.device)

    def predict_logits(self, batch: Batch, stage: str) -> Tensor:
        """Logits [B, K], [B, L, K] or, where the batch says which token covers each base, [B, N, K].

        Where `rc` asks for it and the stage is not `train`, one prediction from both strands.
        """
        if stage != "train" and "ids_frames" in batch:
            views = {name: batch[f"{name}_frames"] for name in ("ids", "valid")}  # [B, V, L]
            every = forward(self.model, {name: x.flatten(0, 1) for name, x in views.items()})
            return merged(every.unflatten(0, views["ids"].shape[:2]).unbind(1), self.config.rc, self.config.kind)
        logits = self.bases(forward(self.model, batch), batch, "")
        if stage == "train" or self.config.rc not in BOTH:
            return logits
        if "ids_rc" not in batch:
            raise ZooError(f"task.rc={self.config.rc} reads both strands: set data.rc_views=true")
        turned = forward(self.model, {"ids": batch["ids_rc"], "valid": batch["valid_rc"]})
        known = batch["base_rc"] >= 0 if "base_rc" in batch else None
        return both_strands(logits, self.bases(turned, batch, "_rc"), self.config.rc, self.config.kind, known)

    def bases(self, logits: Tensor, batch: Batch, strand: str) -> Tensor:
        """Logits of a `token` head at the bases, or tokens, of the given strand that have labels; others as they are.

        *strand* is "_rc" for logits of the reverse complement.
        """
        if f"base{strand}" not in batch:
            if logits.dim() == 4:
                raise ZooError("a head with slots predicts single bases: set data.per_base=true")
            return logits
        return at(logits, batch[f"base{strand}"], batch.get(f"place{strand}"))

    def flat(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, K] (or [N] for a single number) and labels without ignored places."""
        if self.config.kind == "multiclass":
            logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
            kept = labels != -100
            return (logits, labels) if bool(kept.all()) else (logits[kept], labels[kept])
        labels = labels.reshape(len(labels), -1)
        if labels.shape != logits.shape:
            raise ZooError(f"the labels have {labels.shape[-1]} columns but the head has {logits.shape[-1]} outputs")
        if self.config.kind == "regression":
            labels = labels.float()
            return (logits[:, 0], labels[:, 0]) if logits.shape[1] == 1 else (logits, labels)
        return logits, labels

    def loss(self, logits: Tensor, labels: Tensor, stage: str) -> Tensor:
        """Mean loss of flat logits and labels; weights and smoothing act in training only, so that val compares."""
        train = stage == "train"
        weights = self.class_weights if train else None
        if self.config.kind == "regression":
            return F.mse_loss(logits, labels)
        if self.config.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weights)
        smoothing = self.config.label_smoothing if train else 0.0
        if not len(labels):
            return logits.sum() * 0.0
        return F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over classes, sigmoid of each label, or the numbers themselves."""
        activate: dict[str, Callable[[Tensor], Tensor]] = {
            "multiclass": lambda x: x.softmax(-1),
            "multilabel": torch.sigmoid,
            "regression": lambda x: x,
        }
        return activate[self.config.kind](logits)

    def finish(self, stage: str) -> dict[str, Tensor | float]:
        scores = self.scores[stage]
        values = {name: value.float().mean() for name, value in scores.compute().items()}
        scores.reset()
        return values


def _outputs(model: Any) -> int:
    head = model.config.head
    if head.kind == "lm":
        raise ZooError(
            "the model has a language-model head: set model.head.kind=sequence (or token) and model.head.num_outputs"
        )
    return int(head.num_outputs)
