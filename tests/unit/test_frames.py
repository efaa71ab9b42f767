"""Words cut in every frame: drawn in training, all of them read and averaged otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zoo import datamodules, tokenizers
from zoo.datamodules.augment import reverse_complement
from zoo.errors import ZooError
from zoo.models.generator import GENERator, GENERatorConfig
from zoo.tasks.classify import Classify, ClassifyConfig
from zoo.train.predict import Predictor

TEXTS = ["ACGTTGCAAC", "GATTACAGAT"]


def make(tmp_path: Path, **fields: Any) -> Any:
    file = tmp_path / "rows.csv"
    file.write_text("sequence,label\n" + "".join(f"{text},{i}\n" for i, text in enumerate(TEXTS)))
    split = {"path": str(file)}
    section = {"name": "labelled", "train": split, "val": split, "frames": 3, "batch_size": 2, **fields}
    tokenizer = tokenizers.build({"name": "kmer", "k": 3, "align": "left"})
    data = datamodules.build(section, tokenizer, 5)
    data.setup()
    return data


def words(text: str, ids: torch.Tensor, valid: torch.Tensor, tokenizer: Any) -> int:
    """The frame of a text that a row of ids holds."""
    return [tokenizer.encode(text[skip:]).tolist() for skip in range(3)].index(ids[valid].tolist())


def test_training_draws_a_frame_and_evaluation_reads_all(tmp_path: Path) -> None:
    data = make(tmp_path)
    source = data.sources["train"]
    seen = {i: set() for i in (0, 1)}
    for epoch in range(30):
        batch = source.batch(torch.arange(2).numpy(), epoch, 0)
        assert "ids_frames" not in batch
        for i in (0, 1):
            ids, valid = (torch.as_tensor(batch[name][i]) for name in ("ids", "valid"))
            seen[i].add(words(TEXTS[i], ids, valid, data.tokenizer))
    assert seen == {0: {0, 1, 2}, 1: {0, 1, 2}}
    batch = next(iter(data.loader("val", train=False)))
    assert batch["ids_frames"].shape[:2] == (2, 3)
    for i, text in enumerate(TEXTS):
        rows = zip(batch["ids_frames"][i], batch["valid_frames"][i], strict=True)
        assert [words(text, ids, valid, data.tokenizer) for ids, valid in rows] == [0, 1, 2]
    both = next(iter(make(tmp_path, rc_views=True).loader("val", train=False)))
    for i, text in enumerate(TEXTS):
        rows = list(zip(both["ids_frames"][i], both["valid_frames"][i], strict=True))
        turned = reverse_complement(text.encode()).decode()
        assert [words(text, *row, data.tokenizer) for row in rows[:3]] == [0, 1, 2]
        assert [words(turned, *row, data.tokenizer) for row in rows[3:]] == [0, 1, 2]


@pytest.mark.parametrize("rc", ["none", "conjoin", "average"])
def test_the_task_and_predictions_average_all_views(tmp_path: Path, rc: str) -> None:
    data = make(tmp_path, rc_views=rc != "none")
    torch.manual_seed(0)
    sizes = {"d_model": 8, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_inner": 16, "vocab_size": 96, "max_len": 16}
    head: Any = {"kind": "sequence", "num_outputs": 2, "pooling": "mean"}
    config = GENERatorConfig(**sizes, head=GENERatorConfig().head.__class__(**head))  # type: ignore[arg-type]
    task = Classify(GENERator(config), ClassifyConfig(rc=rc)).eval()
    for parameter in task.model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    batch = next(iter(data.loader("val", train=False)))
    with torch.no_grad():
        found = task.predict_logits(batch, "val")
        want = []
        for text in TEXTS:
            strands = [text, reverse_complement(text.encode()).decode()][: 1 if rc == "none" else 2]
            ids = [torch.as_tensor(data.tokenizer.encode(strand[skip:])) for strand in strands for skip in range(3)]
            each = torch.cat([task.model(row[None]) for row in ids])
            want.append(each.softmax(-1).mean(0) if rc == "average" else each.mean(0).softmax(-1))
    torch.testing.assert_close(found.softmax(-1), torch.stack(want))
    assert not torch.allclose(found, task.predict_logits(batch, "train"))

    kept = SimpleNamespace(  # what `Predictor` reads of an artifact
        model=task.model,
        tokenizer=data.tokenizer,
        path=tmp_path,
        classes=["a", "b"],
        recipe={"data": {"frames": 3}, "task": {"rc": rc}},
        info={},
    )
    with torch.no_grad():
        predicted, _ = Predictor(kept, "cpu").logits([text.encode() for text in TEXTS])
    torch.testing.assert_close(predicted.softmax(-1), torch.stack(want))


def test_frames_are_for_single_sequences(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="frames must be at least 1"):
        make(tmp_path, frames=0)
