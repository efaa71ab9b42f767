"""Questions about pictures: words, samples, the task, budgets, and the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import tokenizers
from zoo.cli.main import main
from zoo.datamodules.manifest import FileConfig
from zoo.datamodules.vqa import VQAData, VQADataConfig, read_questions
from zoo.errors import ZooError
from zoo.hub import artifact
from zoo.models.decoder import DecoderConfig
from zoo.models.mqt import MQT, MQTConfig
from zoo.nn.clip import VisionTowerConfig
from zoo.nn.heads import HeadConfig
from zoo.nn.mlp import MLPConfig
from zoo.nn.preprocess import PreprocessConfig
from zoo.nn.query_transformer import QueryTransformerConfig
from zoo.nn.vit import ViTConfig
from zoo.tasks.vqa import VQA, VQAConfig
from zoo.tokenizers.word import WordTokenizer, WordTokenizerConfig
from zoo.train.budget import budget_table, budgets_of, decoder_flops, plot_budget

WORDS = ("?", "what", "color", "is", "it", "red", "blue", "dark")


def words() -> WordTokenizer:
    return WordTokenizer(WordTokenizerConfig(words=WORDS))


def model(**changes: object) -> MQT:
    torch.manual_seed(0)
    vit = ViTConfig(width=32, layers=1, heads=2, mlp=MLPConfig(kind="gelu", width=64))
    queries = QueryTransformerConfig(
        grid=2, width=32, out_width=32, heads=2, source=(2, 2), keys="position+content", law="uniform"
    )
    lm = DecoderConfig(
        d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=12, max_len=32, head=HeadConfig(tied=False)
    )
    fields = {
        "tower": VisionTowerConfig(vit=vit, size=16, patch=8, layer=-1), "queries": queries, "lm": lm,
        "freeze_tower": False, **changes,
    }  # fmt: skip
    return MQT(MQTConfig(**fields))  # type: ignore[arg-type]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eight red or blue squares and what color they have."""
    rows = []
    for i in range(8):
        red = i % 2 == 0
        Image.new("RGB", (16, 16), (200 + i, 10, 20) if red else (10, 20, 200 + i)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what color is it?", "answer": "red" if red else "dark blue"})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def data(file: Path, **changes: object) -> VQAData:
    place = FileConfig(path=str(file))
    config = VQADataConfig(
        train=place,
        test=place,
        preprocess=PreprocessConfig(size=16),
        batch_size=8,
        **changes,  # type: ignore[arg-type]
    )
    found = VQAData(config, words())
    found.setup()
    return found


def tensors(batch: dict) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in batch.items()}


def test_words_and_marks_are_tokens(tmp_path: Path) -> None:
    tokenizer = words()
    ids = tokenizer.encode("What  color is it?")
    assert tokenizer.tokens(ids) == ["what", "color", "is", "it", "?"]
    assert tokenizer.decode([1, *ids, 2], skip_special=True) == "what color is it ?"
    assert tokenizer.encode("green").tolist() == [3]
    assert tokenizer.offsets("it is ?").tolist() == [[0, 2], [3, 5], [6, 7]]
    tokenizer.save(tmp_path)
    assert tokenizers.load(tmp_path).section() == tokenizer.section()
    with pytest.raises(ValueError, match="not one word"):
        WordTokenizerConfig(words=("two words",))
    with pytest.raises(ValueError, match="each once"):
        WordTokenizerConfig(words=("a", "a"))


def test_a_sample_is_picture_question_answer(questions: Path) -> None:
    batch = data(questions).sources["train"].batch(np.array([0, 1]), 0, 0)
    head = [1, -200, 5, 6, 7, 8, 4]
    assert batch["ids"].tolist() == [[*head, 9, 2, 0], [*head, 11, 10, 2]]
    assert batch["labels"].tolist() == [[-100] * 7 + [9, 2, -100], [-100] * 7 + [11, 10, 2]]
    assert batch["valid"].sum(1).tolist() == [9, 10]
    assert batch["pixels"].shape == (2, 3, 16, 16)
    assert batch["pixels"][0, 0].mean() > batch["pixels"][0, 2].mean()
    assert data(questions).max_tokens == 10
    assert len(data(questions, limit=3).sources["train"]) == 3


def test_broken_files_are_named(tmp_path: Path, questions: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"image": "a.png", "question": "?", "answer": "red"}\n{"image": "a.png"}\n')
    with pytest.raises(ZooError, match="line 2 of"):
        read_questions(tmp_path / "bad.jsonl")
    (tmp_path / "lost.jsonl").write_text('{"image": "none.png", "question": "what?", "answer": "red"}\n')
    with pytest.raises(ZooError, match=r"none.png', which does not exist"):
        data(tmp_path / "lost.jsonl")
    with pytest.raises(ValueError, match="and not both"):
        VQADataConfig()


def test_the_official_pictures_are_there() -> None:
    pytest.importorskip("easy_vqa")
    config = VQADataConfig(builtin="easy_vqa", preprocess=PreprocessConfig(size=64, resize="none"), limit=20)
    found = VQAData(config, words())
    found.setup()
    assert {split: len(source) for split, source in found.sources.items()} == {"train": 20, "val": 20, "test": 20}
    assert found.sources["val"].batch(np.array([3]), 0, 0)["pixels"].shape == (1, 3, 64, 64)


def test_it_learns_colours_at_every_budget(questions: Path) -> None:
    net = model()
    task = VQA(net, VQAConfig(budgets=(1, 4)))
    batch = tensors(data(questions).sources["train"].batch(np.arange(8), 0, 0))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    torch.manual_seed(1)
    for _ in range(60):
        loss, _ = task.compute(batch, "train")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    task.compute(batch, "val")
    found = task.finish("val")
    assert found == {"accuracy_1": pytest.approx(1.0), "accuracy_4": pytest.approx(1.0)}
    swapped = {**batch, "pixels": batch["pixels"].flip(1)}  # red becomes blue: the picture is what it looks at
    assert int(task.answer(swapped, 4)[1].sum()) == 0


def test_training_draws_budgets_and_a_fixed_one_stays() -> None:
    torch.manual_seed(0)
    net = model()
    assert {VQA(net, VQAConfig()).draw() for _ in range(40)} == {1, 2, 3, 4}
    assert VQA(net, VQAConfig(tokens=2)).draw() == 2
    with pytest.raises(ZooError, match="at most 4 visual tokens a picture, not 5"):
        VQA(net, VQAConfig(budgets=(5,)))
    with pytest.raises(ZooError, match="trains an MQT"):
        VQA(torch.nn.Linear(1, 1), VQAConfig())


def test_the_table_of_budgets(questions: Path, tmp_path: Path) -> None:
    net = model()
    rows = budget_table(net, data(questions).loader("test", train=False), repeats=1)
    assert [row["tokens"] for row in rows] == [1, 2, 4]
    assert all(0 <= row["accuracy"] <= 1 and row["latency_ms"] > 0 and row["questions"] == 8 for row in rows)
    weights = sum(p.numel() for p in net.lm.backbone.parameters())
    assert decoder_flops(net, 3, 7) == 2 * weights * 10 + 2 * 2 * 32 * 100
    plot_budget(rows, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    with pytest.raises(ZooError, match="1 to 4 visual tokens, asked for 9"):
        budgets_of(net, (9,))
    with pytest.raises(ZooError, match="no budget to choose"):
        budgets_of(model(projector="mlp"))


def test_commands_answer_and_measure(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "art"
    artifact.save(model(), place, tokenizer=words())
    ask = ["predict", str(place), "--image", str(tmp_path / "0.png"), "--question", "what color is it?"]
    assert main([*ask, "--tokens", "2"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split("\t") == ["image", "question", "answer"]
    assert line.split("\t")[:2] == ["0.png", "what color is it?"]
    assert main(ask[:-2]) == 2
    assert "--image needs a --question" in capsys.readouterr().err
    sheet = tmp_path / "set.yaml"
    sheet.write_text(f"name: vqa\ntest: {{path: {questions}}}\npreprocess: {{size: 16}}\n")
    assert main(["bench", "budget", str(place), "--data", str(sheet), "--tokens", "1", "4", "--limit", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t")[:3] == ["method", "tokens", "accuracy"]
    assert [line.split("\t")[1] for line in lines[1:]] == ["1", "4"]
    assert main(["bench", "other", str(place), "--data", str(sheet)]) == 2
