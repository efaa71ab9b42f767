"""Sums that average rightly over unequal batches, and the torchmetrics that belong to each kind of target."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelF1Score,
    MultilabelMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, R2Score, SpearmanCorrCoef


class WeightedMean(Metric):
    """Mean of batch means by weight, in float64: 3 tokens in the last batch count as 3 tokens."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, weight: Tensor | float) -> None:
        weight = torch.as_tensor(weight, dtype=torch.float64, device=mean.device)
        # 0 * nan is nan: a batch without any counted item adds nothing
        self.total += torch.where(weight > 0, mean.double() * weight, 0.0)
        self.weight += weight

    def compute(self) -> Tensor:
        return (self.total / self.weight.clamp_min(1e-300)).float()


def multiclass_metrics(classes: int) -> MetricCollection:
    """Accuracy, macro F1 and AUROC, and Matthews' correlation, from probabilities [N, C] and labels [N]."""
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "f1": MulticlassF1Score(classes, average="macro"),
            "mcc": MulticlassMatthewsCorrCoef(classes),
            "auroc": MulticlassAUROC(classes, average="macro"),
        }
    )


def multilabel_metrics(labels: int) -> MetricCollection:
    """Macro accuracy, F1 and AUROC over labels, and Matthews' correlation over all decisions, from [N, K]."""
    return MetricCollection(
        {
            "accuracy": MultilabelAccuracy(labels, average="macro"),
            "f1": MultilabelF1Score(labels, average="macro"),
            "mcc": MultilabelMatthewsCorrCoef(labels),
            "auroc": MultilabelAUROC(labels, average="macro"),
        }
    )


def regression_metrics(outputs: int) -> MetricCollection:
    """Pearson, Spearman and R2 from predictions and targets [N] or [N, K]; means over the K targets."""
    return MetricCollection(
        {
            "pearson": PearsonCorrCoef(num_outputs=outputs),
            "spearman": SpearmanCorrCoef(num_outputs=outputs),
            "r2": R2Score(multioutput="uniform_average"),
        }
    )
