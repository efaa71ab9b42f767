"""Losses, metrics and schedules against their definitions, and against scikit-learn and scipy."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import tasks
from zoo.errors import ConfigError, ZooError
from zoo.tasks.metrics import WeightedMean
from zoo.tasks.optim import OptimConfig, lr_factor, make_optimizer


class Fixed(nn.Module):
    """A model that answers with the logits it was given, one row a sample index stored in ids[:, 0]."""

    def __init__(self, table: Tensor, kind: str = "sequence") -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.config = SimpleNamespace(head=SimpleNamespace(kind=kind, num_outputs=table.shape[-1]))

    def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.table[ids] if self.config.head.kind == "lm" else self.table[ids[:, 0]]

    def param_groups(self) -> list[Any]:
        return [{"params": [self.table]}]


def run(task: Any, batches: list[dict[str, Tensor]], stage: str = "val") -> dict[str, float]:
    """One evaluation loop without a trainer."""
    logged: dict[str, Any] = {}
    task.log_dict = logged.update
    for batch in batches:
        task._evaluate(batch, stage)
    task._finish(stage)
    return {key.removeprefix(f"{stage}/"): float(value) for key, value in logged.items()}


def test_causal_lm_counts_real_tokens_and_real_bases() -> None:
    vocab = 8  # 0 pad, 1 end, 4..7 the bases
    model = Fixed(torch.randn(vocab, vocab), "lm")
    task = tasks.build({"name": "causal_lm"}, model)
    task.set_bases([0, 0, 0, 0, 1, 1, 1, 1])
    first = torch.tensor([[4, 5, 6, 7, 1], [0, 0, 5, 4, 1]])  # the second row is padded on the left
    second = torch.tensor([[7, 7, 1]])
    batches = [{"ids": ids, "valid": ids != 0} for ids in (first, second)]
    got = run(task, batches)

    nats: list[float] = []
    bits: list[float] = []
    for ids in (first, second):
        for row in ids.tolist():
            real = [token for token in row if token != 0]
            for before, after in pairwise(real):
                nat = -float(model.table.detach()[before].log_softmax(-1)[after])
                nats.append(nat)
                if after >= 4:
                    bits.append(nat / math.log(2))
    assert got["loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-6)
    assert got["bits_per_base"] == pytest.approx(np.mean(bits), rel=1e-6)


def test_causal_lm_bits_of_tokens_with_several_bases() -> None:
    task = tasks.build({"name": "causal_lm"}, Fixed(torch.zeros(3, 3), "lm"))
    task.set_bases([0, 6, 2])  # uniform over 3 tokens: log2(3) bits a token
    ids = torch.tensor([[1, 1, 2, 0]])
    got = run(task, [{"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)}])
    assert got["bits_per_base"] == pytest.approx(2 * math.log2(3) / 8, rel=1e-6)


def test_causal_lm_official_padding_and_z_loss() -> None:
    model = Fixed(torch.randn(8, 8), "lm")
    ids = torch.tensor([[0, 0, 5, 4]])
    batch = {"ids": ids, "valid": ids != 0}
    logits = model.table[ids][:, :-1]
    official = tasks.build({"name": "causal_lm", "loss_on_pad": True}, model)
    assert float(official.compute(batch, "train")[0]) == pytest.approx(
        float(F.cross_entropy(logits.reshape(-1, 8), ids[:, 1:].reshape(-1))), rel=1e-6
    )
    plain, z = (tasks.build({"name": "causal_lm", "z_loss": weight}, model) for weight in (0.0, 0.5))
    extra = float(z.compute(batch, "train")[0] - plain.compute(batch, "train")[0])
    assert extra == pytest.approx(0.5 * float(torch.logsumexp(logits[0, 2], -1)) ** 2, rel=1e-5)


def test_packed_documents_are_predicted_as_if_alone() -> None:
    from zoo.config import from_dict
    from zoo.models.lm import LM, LMConfig

    options = {"heads": 2, "rope": {}}
    layer = {"mixer": "attention", "options": options, "mlp": {"width": 16}}
    model = LM(from_dict(LMConfig, {"d_model": 8, "vocab_size": 16, "layers": [layer, layer]})).eval()
    first, second = torch.randint(1, 16, (1, 5)), torch.randint(1, 16, (1, 7))
    task = tasks.build({"name": "causal_lm"}, model)
    alone = [
        task.compute({"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool)}, "train") for ids in (first, second)
    ]
    ids = torch.cat([first, second, torch.zeros(1, 2, dtype=torch.long)], 1)
    segment = torch.tensor([[0] * 5 + [1] * 7 + [2] * 2])
    loss, weight = task.compute({"ids": ids, "valid": segment < 2, "segment": segment}, "train")
    assert int(weight) == sum(int(count) for _, count in alone) == 10
    expected = sum(float(mean) * int(count) for mean, count in alone) / 10
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    ignoring, _ = task.compute({"ids": ids, "valid": segment < 2}, "train")
    assert float(ignoring) != pytest.approx(expected, rel=1e-4)


def masked_task(**fields: Any) -> Any:
    task = tasks.build({"name": "masked_lm", **fields}, Fixed(torch.randn(12, 12), "lm"))
    task.set_vocabulary(12, {"pad": 0, "mask": 1}, frozenset({2}))
    return task


def test_masked_lm_hides_the_declared_shares() -> None:
    ids = torch.randint(3, 12, (200, 100))
    ids[:, :10], ids[:, 10] = 0, 2
    valid = ids != 0
    hidden, chosen = masked_task().hide(ids, valid, None)
    assert not chosen[:, :11].any()
    assert torch.equal(hidden[~chosen], ids[~chosen])
    assert chosen[:, 11:].float().mean() == pytest.approx(0.15, abs=0.01)
    masked = (hidden[chosen] == 1).float().mean()
    kept = (hidden[chosen] == ids[chosen]).float().mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1 + 0.1 / 9, abs=0.02)
    assert (hidden[chosen & (hidden != 1)] >= 3).all()


def test_masked_lm_predicts_hidden_tokens_only_and_the_same_each_time() -> None:
    task = masked_task(probability=0.5, masked=1.0, random=0.0)
    task.set_bases([0] * 3 + [1] * 9)
    ids = torch.randint(3, 12, (4, 30))
    batch = {"ids": ids, "valid": torch.ones_like(ids, dtype=torch.bool), "index": torch.arange(4)}
    first, second = run(task, [batch]), run(task, [batch])
    assert first == second
    _, chosen = task.hide(ids, None, torch.Generator().manual_seed(0))
    nats = -task.model.table[1].log_softmax(-1)[ids[chosen]]
    assert first["loss"] == pytest.approx(float(nats.mean()), rel=1e-6)
    assert first["bits_per_base"] == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-6)
    assert float(task.compute(batch, "train")[0]) != float(task.compute(batch, "train")[0])


def test_masked_lm_needs_a_mask_token() -> None:
    task = tasks.build({"name": "masked_lm"}, Fixed(torch.randn(4, 4), "lm"))
    with pytest.raises(ZooError, match="mask token"):
        task.set_vocabulary(4, {"pad": 0})


def classify_batches(labels: Tensor, size: int) -> list[dict[str, Tensor]]:
    places = torch.arange(len(labels))
    return [{"ids": part[:, None], "labels": labels[part]} for part in places.split(size)]


def test_multiclass_metrics_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    table, labels = torch.randn(101, 3), torch.randint(3, (101,))
    got = run(tasks.build({"name": "classify"}, Fixed(table)), classify_batches(labels, 16))
    predicted, truth = table.argmax(1).numpy(), labels.numpy()
    assert got["loss"] == pytest.approx(float(F.cross_entropy(table, labels)), rel=1e-5)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-6)
    assert got["f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert got["mcc"] == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-6)
    auroc = metrics.roc_auc_score(truth, table.softmax(1).numpy(), multi_class="ovr", average="macro")
    assert got["auroc"] == pytest.approx(auroc, abs=1e-6)


def test_multilabel_metrics_are_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    table, labels = torch.randn(90, 4), torch.randint(2, (90, 4)).float()
    task = tasks.build({"name": "classify", "kind": "multilabel"}, Fixed(table))
    got = run(task, classify_batches(labels, 32))
    assert got["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(table, labels)), rel=1e-5)
    truth, predicted = labels.numpy(), (table > 0).numpy()
    assert got["f1"] == pytest.approx(metrics.f1_score(truth, predicted, average="macro"), abs=1e-6)
    assert got["auroc"] == pytest.approx(metrics.roc_auc_score(truth, table.numpy(), average="macro"), abs=1e-6)
    assert got["mcc"] == pytest.approx(metrics.matthews_corrcoef(truth.ravel(), predicted.ravel()), abs=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression_metrics_are_scipys(outputs: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    table = torch.randn(80, outputs)
    labels = table + torch.randn(80, outputs)
    given = labels[:, 0] if outputs == 1 else labels
    task = tasks.build({"name": "classify", "kind": "regression"}, Fixed(table))
    got = run(task, classify_batches(given, 32))
    pairs = list(zip(labels.T.numpy(), table.T.numpy(), strict=True))
    assert got["loss"] == pytest.approx(float(F.mse_loss(table, labels)), rel=1e-5)
    assert got["pearson"] == pytest.approx(np.mean([stats.pearsonr(*pair)[0] for pair in pairs]), abs=1e-5)
    assert got["spearman"] == pytest.approx(np.mean([stats.spearmanr(*pair)[0] for pair in pairs]), abs=1e-5)
    assert got["r2"] == pytest.approx(metrics.r2_score(labels.numpy(), table.numpy()), abs=1e-5)


def test_class_weights_and_smoothing_act_in_training_only() -> None:
    table, labels = torch.randn(12, 3), torch.randint(3, (12,))
    weights = (1.0, 2.0, 0.5)
    section = {"name": "classify", "class_weights": weights, "label_smoothing": 0.1}
    task = tasks.build(section, Fixed(table))
    (batch,) = classify_batches(labels, 12)
    expected = F.cross_entropy(table, labels, weight=torch.tensor(weights), label_smoothing=0.1)
    assert float(task.compute(batch, "train")[0]) == pytest.approx(float(expected), rel=1e-6)
    assert float(task.compute(batch, "val")[0]) == pytest.approx(float(F.cross_entropy(table, labels)), rel=1e-6)


def test_token_labels_leave_out_ignored_places() -> None:
    class PerToken(Fixed):
        def forward(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
            return self.table[ids]

    table = torch.randn(5, 3)
    ids, labels = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([[2, -100, 0], [1, 1, -100]])
    task = tasks.build({"name": "classify"}, PerToken(table, "token"))
    loss, weight = task.compute({"ids": ids, "labels": labels}, "train")
    assert int(weight) == 4
    assert float(loss) == pytest.approx(
        float(F.cross_entropy(table[[0, 2, 3, 4]], torch.tensor([2, 0, 1, 1]))), rel=1e-6
    )


def test_refusals_name_both_sides() -> None:
    with pytest.raises(ZooError, match="2 numbers but the head has 3 outputs"):
        tasks.build({"name": "classify", "class_weights": [1.0, 2.0]}, Fixed(torch.zeros(1, 3)))
    with pytest.raises(ZooError, match=r"model\.head\.kind=sequence"):
        tasks.build({"name": "classify"}, Fixed(torch.zeros(1, 3), "lm"))
    with pytest.raises(ConfigError, match="did you mean 'classify'"):
        tasks.build({"name": "clasify"}, Fixed(torch.zeros(1, 3)))
    task = tasks.build({"name": "classify", "kind": "multilabel"}, Fixed(torch.zeros(4, 3)))
    with pytest.raises(ZooError, match="2 columns but the head has 3 outputs"):
        task.compute({"ids": torch.zeros(4, 1, dtype=torch.long), "labels": torch.zeros(4, 2)}, "train")


def test_weighted_mean_of_nothing_and_of_unequal_batches() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor(float("nan")), 0)
    mean.update(torch.tensor(1.0), 3)
    mean.update(torch.tensor(5.0), 1)
    assert float(mean.compute()) == 2.0


def test_schedule_warms_up_and_falls_to_its_floor() -> None:
    config = OptimConfig(warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    factors = [lr_factor(step, 110, config) for step in range(111)]
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    linear = OptimConfig(warmup_ratio=0.5, schedule="linear", min_lr_ratio=0.0)
    assert lr_factor(75, 100, linear) == pytest.approx(0.5)
    assert lr_factor(75, 100, OptimConfig(schedule="constant")) == 1.0


def test_groups_keep_their_own_settings() -> None:
    a, b, c, d = (nn.Parameter(torch.zeros(1)) for _ in range(4))
    config = OptimConfig(lr=0.5, weight_decay=0.2, backbone_lr_ratio=0.1, warmup_ratio=0.0, schedule="constant")
    groups = [{"params": [a], "weight_decay": 0.0, "lr_scale": 0.5}, {"params": [b], "lr": 0.3}, {"params": [c, d]}]
    optimizer, _ = make_optimizer(groups, config, 10, head={id(d)})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[id(a)] == pytest.approx((0.025, 0.0))
    assert found[id(b)] == pytest.approx((0.03, 0.2))
    assert found[id(c)] == pytest.approx((0.05, 0.2))
    assert found[id(d)] == pytest.approx((0.5, 0.2))


def test_hyperparameters_are_plain_values() -> None:
    task = tasks.build({"name": "causal_lm"}, Fixed(torch.zeros(2, 2), "lm"))
    assert type(task.hparams["task"]) is dict
    assert type(task.hparams["task"]["optim"]["betas"]) is list


@pytest.mark.parametrize("quirk", [False, True])
def test_causal_lm_per_base_is_the_marginal_loss(quirk: bool) -> None:
    from zoo.nn.losses import per_base_loss
    from zoo.tokenizers.kmer import KmerTokenizer, KmerTokenizerConfig
    from zoo.train.assemble import equip, kmers_of

    tokenizer = KmerTokenizer(KmerTokenizerConfig(k=2, specials="<oov> <s> </s> <pad> <mask>"))
    size = tokenizer.vocab_size + 3  # rows that no token uses
    model = Fixed(torch.randn(size, size), "lm")
    task = tasks.build({"name": "causal_lm", "objective": "per_base", "specials_as_first": quirk}, model)
    equip(task, tokenizer)
    ids = torch.tensor([[1, 7, 9, 0, 20, 2, 3], [1, 6, 6, 14, 2, 3, 3]])
    batch = {"ids": ids, "valid": ids != 3}
    table = torch.tensor([*(kmers_of(tokenizer) or ()), *[[-1, -1]] * 3])
    assert [tokenizer.config.alphabet[i] for i in table[7].tolist()] == list(tokenizer.vocab[7])
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 3, -100)
    expected = per_base_loss(model.table[ids][:, :-1], targets, table, specials_as_first=quirk)
    loss, weight = task.compute(batch, "train")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(weight) == 8  # neither padding nor <oov>
    loss.backward()
    assert float(model.table.grad.abs().sum()) > 0


def test_causal_lm_z_of_the_largest_logit() -> None:
    model = Fixed(torch.randn(8, 8), "lm")
    ids = torch.tensor([[5, 4, 6]])
    batch = {"ids": ids, "valid": ids != 0}
    plain, z = (tasks.build({"name": "causal_lm", "z_loss": w, "z_of": "max"}, model) for w in (0.0, 0.5))
    extra = float((z.compute(batch, "train")[0] - plain.compute(batch, "train")[0]).detach())
    assert extra == pytest.approx(0.5 * float(model.table[ids][0, :2].amax(-1).square().mean().detach()), rel=1e-5)


def test_whole_kmers_are_hidden_in_runs_of_one_fate() -> None:
    task = masked_task(whole_kmer=6)
    ids = torch.randint(3, 12, (400, 120))
    hidden, chosen = task.hide(ids, None, None)
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.015)
    edges = F.pad(chosen.int(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero()[:, 1], (edges == -1).nonzero()[:, 1]
    inner = (starts > 0) & (ends < 120)
    assert ((ends - starts)[inner] % 6 == 0).all()
    masked = hidden == 1
    runs = F.pad(masked.int(), (1, 1)).diff(dim=1)
    lengths = (runs == -1).nonzero()[:, 1] - (runs == 1).nonzero()[:, 1]
    assert (lengths[lengths % 6 != 0].numel()) < 0.35 * lengths.numel()  # only runs cut by a row's end
    assert masked[chosen].float().mean() == pytest.approx(0.8, abs=0.03)
    first, second = (task.hide(ids, None, torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_both_strands_join_logits_or_probabilities() -> None:
    from zoo.tasks.strands import at, both_strands

    one, two = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(both_strands(one, two, "conjoin", "multiclass"), (one + two) / 2)
    average = both_strands(one, two, "average", "multiclass")
    torch.testing.assert_close(average.softmax(-1), (one.softmax(-1) + two.softmax(-1)) / 2)
    torch.testing.assert_close(average.logsumexp(-1), torch.zeros(4), atol=1e-6, rtol=0)
    each = both_strands(one, two, "average", "multilabel")
    torch.testing.assert_close(each.sigmoid(), (one.sigmoid() + two.sigmoid()) / 2)
    assert torch.equal(both_strands(one, two, "average", "regression"), (one + two) / 2)
    known = torch.tensor([True, False, True, False])
    assert torch.equal(both_strands(one, two, "conjoin", "multiclass", known)[1], one[1])
    logits = torch.randn(1, 2, 3, 5)
    token, place = torch.tensor([[0, 0, 1, -1]]), torch.tensor([[0, 2, 1, -1]])
    assert torch.equal(at(logits, token, place)[0, 1], logits[0, 0, 2])
    assert torch.equal(at(logits[:, :, 0], token)[0, 2], logits[0, 1, 0])


def test_rates_fall_from_the_head_to_the_embedding() -> None:
    from zoo.tasks.optim import layer_scales

    names = ["embed.weight", "backbone.layers.0.a", "backbone.layers.1.a", "backbone.norm.weight", "head.weight"]
    assert list(layer_scales(names, 0.5).values()) == [0.125, 0.25, 0.5, 1.0, 1.0]
    with pytest.raises(ConfigError, match="layer_decay needs a model with a backbone"):
        layer_scales(["vocab.weight"], 0.5)
    low, high = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups = [{"params": [low, high], "weight_decay": 0.0, "lr": 0.2}]
    config = OptimConfig(lr=1.0, schedule="constant", layer_decay=0.5)
    optimizer, _ = make_optimizer(groups, config, 10, scales={id(low): 0.5})
    assert [(g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.0), (0.2, 0.0)]
