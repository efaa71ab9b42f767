"""The floors of every benchmark table: a logistic regression on k-mers or bases, and a small convolutional network.

Both read the same rows as the models and choose everything on the dev split.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from zoo import datamodules
from zoo.tasks.metrics import multiclass_metrics
from zoo.tokenizers import build as build_tokenizer

BASELINES = ("lr", "cnn")
PENALTIES = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4)  # of the regression's squared weights, beside the mean loss
EPOCHS, STEPS, BATCH = 10, 600, 64  # of the network
PLACES = 16  # of its head


@dataclass
class Rows:
    """One split as single bases: codes [N, L] int64 (A C G T = 0 to 3, anything else and padding 4), labels [N]."""

    codes: Tensor
    labels: Tensor


@dataclass
class Fitted:
    """What a baseline gives: its scores on val and test, how it was chosen, its size and the seconds it took."""

    val: dict[str, float]
    test: dict[str, float]
    choice: str
    parameters: int
    seconds: float


def read_rows(section: dict[str, Any], seed: int = 0) -> tuple[dict[str, Rows], int]:
    """The splits of a `data` section and its number of classes.

    Raises:
        ZooError: as the datamodule's setup.
    """
    plain = {key: value for key, value in section.items() if key not in ("rc_augment", "pad_to", "max_len")}
    data = datamodules.build(plain, build_tokenizer({"name": "char", "template": "none"}), seed)
    data.setup()
    splits = {}
    for name, source in data.sources.items():
        texts = source.texts  # type: ignore[attr-defined]
        splits[name] = Rows(encode(texts), torch.as_tensor(np.asarray(source.labels), dtype=torch.long))  # type: ignore[attr-defined]
    longest = max(rows.codes.shape[1] for rows in splits.values())
    for rows in splits.values():
        rows.codes = F.pad(rows.codes, (0, longest - rows.codes.shape[1]), value=4)
    return splits, data.num_outputs


def encode(texts: list[bytes]) -> Tensor:
    """Codes [N, L] of sequences, padded on the right with 4."""
    table = np.full(256, 4, np.uint8)
    for code, letters in enumerate((b"Aa", b"Cc", b"Gg", b"TtUu")):
        table[list(letters)] = code
    codes = np.full((len(texts), max(map(len, texts))), 4, np.uint8)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = table[np.frombuffer(text, np.uint8)]
    return torch.from_numpy(codes).long()


def fit(name: str, section: dict[str, Any], seed: int) -> Fitted:
    """Fit baseline *name* (`lr` or `cnn`) on a `data` section; *seed* moves the network only."""
    splits, classes = read_rows(section, seed)
    began = time.monotonic()
    make = fit_regression if name == "lr" else fit_network
    val, test, choice, parameters = make(splits, classes, seed)
    return Fitted(val, test, choice, parameters, time.monotonic() - began)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and AUROC, and Matthews' correlation of logits [N, C]."""
    metrics = multiclass_metrics(logits.shape[1])
    metrics.update(logits.softmax(-1), labels)
    return {key: float(value) for key, value in metrics.compute().items()}


def features(codes: Tensor, kind: str) -> NDArray[np.float32]:
    """[N, 4^k] shares of the k-mers of a sequence (`4-mer`, `5-mer`) or [N, 4 L] `one-hot` bases."""
    if kind == "one-hot":
        return F.one_hot(codes, 5)[..., :4].flatten(1).float().numpy()
    k = int(kind[0])
    array = codes.numpy()
    words = np.zeros((len(array), array.shape[1] - k + 1), np.int64)
    known = np.ones_like(words, bool)
    for shift in range(k):
        part = array[:, shift : shift + words.shape[1]]
        words, known = words * 4 + part % 4, known & (part < 4)
    rows = np.repeat(np.arange(len(array)), words.shape[1])[known.ravel()]
    counts = np.bincount(rows * 4**k + words.ravel()[known.ravel()], minlength=len(array) * 4**k)
    shares = counts.reshape(len(array), 4**k).astype(np.float32)
    return shares / np.maximum(shares.sum(1, keepdims=True), 1)


def fit_regression(
    splits: dict[str, Rows], classes: int, seed: int
) -> tuple[dict[str, float], dict[str, float], str, int]:
    """Multinomial logistic regression by L-BFGS; k-mers or bases and the penalty are those best on val by MCC."""
    best: tuple[float, Any] = (-2.0, None)
    for kind in ("4-mer", "5-mer", "one-hot"):
        if kind != "one-hot" and splits["train"].codes.shape[1] < int(kind[0]):
            continue
        inputs = {name: torch.from_numpy(features(rows.codes, kind)) for name, rows in splits.items()}
        # one scale for all: rare words keep their small variance, so that the penalty holds them down
        mean, deviation = inputs["train"].mean(0), inputs["train"].var(0).mean().sqrt()
        inputs = {name: (x - mean) / deviation for name, x in inputs.items()}
        weight = torch.zeros(classes, inputs["train"].shape[1] + 1)  # from a strong penalty to a weak one, warm
        for penalty in PENALTIES:
            weight = regression(inputs["train"], splits["train"].labels, weight, penalty)
            val = scores(_linear(inputs["val"], weight), splits["val"].labels)
            if val["mcc"] > best[0]:
                test = scores(_linear(inputs["test"], weight), splits["test"].labels)
                best = val["mcc"], (val, test, f"{kind}, penalty {penalty:g}", weight.numel())
    return best[1]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:, :-1].T + weight[:, -1]


def regression(x: Tensor, labels: Tensor, start: Tensor, penalty: float, steps: int = 60) -> Tensor:
    """[C, F + 1] weights (bias last) that minimise mean cross entropy + penalty · squared norm of the rest."""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_linear(x, weight), labels) + penalty * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


class SmallCNN(nn.Module):
    """Three convolutions over one-hot bases (about 60,000 parameters): x [B, 4, L] -> logits [B, classes].

    The head reads each channel's maximum in PLACES equal parts of the sequence, for what must stand at its place, and
    its maximum and mean over the whole, for what may stand anywhere. Sequences of more than 200 bases are pooled by 8
    before it, shorter ones, in which single bases have their places, by 4.
    """

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        widths, taps, pools = (4, 64, 64, 56), (11, 7, 7), (4 if length > 200 else 2, 2)
        self.layers = nn.Sequential()
        for i, size in enumerate(taps):
            self.layers.append(nn.Conv1d(widths[i], widths[i + 1], size, padding=size // 2))
            self.layers.append(nn.BatchNorm1d(widths[i + 1]))
            self.layers.append(nn.ReLU())
            if i < len(pools):
                self.layers.append(nn.MaxPool1d(pools[i], ceil_mode=True))
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(widths[-1] * (PLACES + 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers(x)  # [B, 56, L / 4 or L / 8]
        parts = F.adaptive_max_pool1d(h, PLACES).flatten(1)
        return self.out(self.dropout(torch.cat([parts, h.amax(-1), h.mean(-1)], dim=1)))


def one_hot(codes: Tensor) -> Tensor:
    """[N, 4, L] float32 of codes [N, L]; zeros where no base is known."""
    return F.one_hot(codes, 5)[..., :4].float().transpose(1, 2).contiguous()


def fit_network(
    splits: dict[str, Rows], classes: int, seed: int
) -> tuple[dict[str, float], dict[str, float], str, int]:
    """The small network by AdamW; the epoch is the one best on val by MCC.

    Small sets get many epochs: at least STEPS steps, at least EPOCHS passes.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    x = {name: one_hot(rows.codes) for name, rows in splits.items()}
    model = SmallCNN(classes, x["train"].shape[2])
    labels = splits["train"].labels
    batches = -(-len(labels) // BATCH)
    epochs = max(EPOCHS, -(-STEPS // batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches, pct_start=0.1)
    best: tuple[float, Any] = (-2.0, None)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x["train"][index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
        val = scores(predict(model, x["val"]), splits["val"].labels)
        if val["mcc"] > best[0]:
            test = scores(predict(model, x["test"]), splits["test"].labels)
            best = val["mcc"], (val, test, f"epoch {epoch + 1} of {epochs}")
    return *best[1], sum(p.numel() for p in model.parameters())


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits [N, C]."""
    model.eval()
    return torch.cat([model(part) for part in x.split(256)])
