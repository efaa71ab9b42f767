"""Vision-language models in two stages: what is frozen, where weights come from, adapters, dry runs at full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from zoo.cli.main import main
from zoo.config import from_dict
from zoo.convert import mqt as convert
from zoo.errors import ConfigError, ZooError
from zoo.hub import artifact
from zoo.models.mqt import MQT, MQTConfig
from zoo.nn.timm_tower import TimmTower, TimmTowerConfig
from zoo.nn.token_reduction import pool_tokens
from zoo.tasks.vqa import VQA, VQAConfig
from zoo.train.compose import compose
from zoo.train.recipe import validate
from zoo.train.run import train
from zoo.train.vision_language import load_decoder, load_tower

TINY: dict[str, Any] = {
    "tower": {
        "vit": {"width": 16, "layers": 3, "heads": 2, "mlp": {"kind": "quick_gelu", "width": 32}},
        "size": 32,
        "patch": 8,
    },
    "queries": {"grid": 4, "width": 16, "out_width": 24, "heads": 2, "source": [4, 4], "keys": "position+content"},
    "lm": {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 20, "max_len": 64},
}


def model(seed: int = 0, **changes: Any) -> MQT:
    torch.manual_seed(seed)
    return MQT(from_dict(MQTConfig, {**TINY, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight coloured squares with a question each, as the training data of every recipe here."""
    rows = []
    for i in range(8):
        Image.new("RGB", (64, 64), (200 + i, 10, 20) if i % 2 else (10, 20, 200 + i)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what color is the shape?", "answer": "red" if i % 2 else "blue"})
    for name in ("questions", "pretrain", "instruct"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


@pytest.fixture
def words(folder: Path) -> Path:
    """A tokenizer.json of Llama's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + i for i, letter in enumerate("abcdefghijklmnopqrs")}}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def small(folder: Path, name: str, *overrides: str) -> Any:
    """A shipped recipe of coloured shapes on the questions of *folder*."""
    data = [f"data.{key}" for key in ('builtin=""', f"root={folder}", "batch_size=8", "val_limit=0")]
    files = [f"+data.{split}.path=questions.jsonl" for split in ("train", "val")]
    steps = ["trainer.max_steps=3", "trainer.val_every=0", "trainer.log_every=1"]
    return validate(compose(name, [*data, *files, *steps, *overrides]))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


def test_two_stages_make_a_trained_model_elastic(folder: Path) -> None:
    host = train(small(folder, "mqt_easy_vqa_patches"), folder / "host").artifact
    starts = [f"task.tower={host}", f"task.lm={host}"]
    first = train(small(folder, "mqt_easy_vqa_stage1", *starts), folder / "first").artifact
    second = train(small(folder, "mqt_easy_vqa_stage2", f"init={first}"), folder / "second").artifact
    zero, one, two = (artifact.load(place).model for place in (host, first, second))
    fresh = MQT(one.config)
    assert same(one.tower, zero.tower)
    assert same(one.lm, zero.lm)
    assert not same(one.projector, fresh.projector)
    assert same(two.tower, zero.tower)
    assert not same(two.projector, one.projector)
    # adapters change their own layers and nothing else of the decoder
    old, new = one.lm.state_dict(), two.lm.state_dict()
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    assert {key.split(".")[-2] for key in changed} == {"qkv", "out_proj", "gate_up", "down"}
    assert all(key.startswith("backbone.") for key in changed)
    apart = artifact.load(folder / "second" / "adapter").model
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[key], atol=1e-5, rtol=1e-5)


def test_adapters_are_trained_beside_the_whole_projector(folder: Path) -> None:
    from zoo.nn.lora import LoRAConfig
    from zoo.train.finetune import FinetuneConfig, head_modules, prepare

    net = model()
    prepare(net, FinetuneConfig(mode="lora", lora=LoRAConfig(rank=2)), "mqt")
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"lm", "projector"}
    assert all("lora_" in name for name in trained if name.startswith("lm."))
    assert "projector.pos_embed" not in trained
    assert "projector.query" in trained
    assert head_modules(net) == ["projector"]


def test_full_size_stages_are_planned_without_their_weights(
    folder: Path, words: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    places = [f"data.root={folder}", f"tokenizer.file={words}", "data.batch_size=1", "--dry-run"]
    assert main(["train", "mqt_llava15_7b_stage1", *places]) == 0
    told = capsys.readouterr().out
    projector = 2 * 256 * 1024 + 3 * 2 * 1024 + 4 * 1024 * 1025 + 1024 * 4096
    assert "7,050,846,208" in told
    assert f"trains         projector {projector:,} of {projector:,}" in told
    assert "stands still   vision tower, decoder" in told
    assert "1 to 256 visual tokens, in training always 256" in told
    assert "tower from openai/clip-vit-large-patch14-336; decoder from lmsys/vicuna-7b-v1.5" in told
    assert main(["train", "mqt_llava15_7b_stage2", *places]) == 0
    told = capsys.readouterr().out
    assert "drawn by the law 'even'" in told
    assert "start from runs/mqt_llava15_7b_stage1/artifact, which is not there yet" in told
    assert "stands still   vision tower\n" in told
    lora = ["finetune.mode=lora", "finetune.lora.rank=128", "finetune.lora.alpha=256", "task.optim.lr=2e-4"]
    assert main(["train", "mqt_llava15_7b_stage2", *lora, *places]) == 0
    adapters = 32 * 128 * (4096 * 4 + 4096 * 2 + 4096 + 2 * 11008 + 11008 + 4096)
    assert f"decoder by adapters {adapters:,} of" in capsys.readouterr().out


def test_official_settings_of_both_stages() -> None:
    first, second = (validate(compose(f"mqt_llava15_7b_stage{i}")) for i in (1, 2))
    assert (first.task["tokens"], first.task["optim"]["lr"], first.trainer.max_epochs) == (256, 1e-3, 1)
    assert (second.task["tokens"], second.task["optim"]["lr"], second.trainer.max_epochs) == (0, 2e-5, 2)
    sizes = [r.data["batch_size"] * int(r.trainer.devices) * r.trainer.accumulate for r in (first, second)]
    assert sizes == [256, 128]
    assert second.model["queries"]["law"] == "even"
    assert all(
        r.task["optim"]["warmup_ratio"] == 0.03 and r.task["optim"]["weight_decay"] == 0 for r in (first, second)
    )


def test_frozen_parts_of_random_weights_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.freeze_tower keeps the tower .* name them as task.tower"):
        train(small(folder, "mqt_easy_vqa", "model.freeze_tower=true"), folder / "out")
    with pytest.raises(ConfigError, match=r"model.freeze_lm"):
        train(small(folder, "mqt_easy_vqa", "+model.freeze_lm=true"), folder / "out")
    allowed = small(folder, "mqt_easy_vqa", "model.freeze_tower=true", "+task.random_frozen=true")
    result = train(allowed, folder / "out")
    assert result.steps == 3


def test_frozen_parts_stay_in_evaluation() -> None:
    net = model(freeze_tower=True, freeze_lm=True).train()
    assert [part.training for part in (net.tower, net.lm, net.projector)] == [False, False, True]
    assert {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad} == {"projector"}


# --- where weights come from


def test_clip_and_llama_files_fill_the_parts(tmp_path: Path) -> None:
    source, target = model(1), model(2)
    official = convert.to_official(source.state_dict(), source.config)
    eyes = {
        "vision_model." + key.removeprefix(convert.TOWER): value.contiguous()
        for key, value in official.items()
        if key.startswith(convert.TOWER)
    }
    text = {k: v.contiguous() for k, v in official.items() if not k.startswith((convert.TOWER, convert.ABSTRACTOR))}
    extra = {"text_model.final_layer_norm.bias": torch.zeros(3), "vision_model.embeddings.position_ids": torch.zeros(1)}
    save_file(eyes | extra, str(tmp_path / "clip.safetensors"))
    save_file(text, str(tmp_path / "llama.safetensors"))
    load_tower(target, str(tmp_path / "clip.safetensors"))
    load_decoder(target, str(tmp_path / "llama.safetensors"))
    assert same(target.tower, source.tower)
    assert same(target.lm, source.lm)
    with pytest.raises(ZooError, match="holds no CLIP"):
        load_tower(target, str(tmp_path / "llama.safetensors"))
    with pytest.raises(ZooError, match="is no Llama"):
        load_decoder(target, str(tmp_path / "clip.safetensors"))
    wider = model(0, lm={**TINY["lm"], "d_inner": 40})
    with pytest.raises(ZooError, match="another architecture"):
        load_decoder(wider, str(tmp_path / "llama.safetensors"))


# --- towers of timm


def timm_config(**changes: Any) -> TimmTowerConfig:
    return TimmTowerConfig(**{"name": "test_vit", "size": 32, "patch": 16, "width": 64, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"stage": -2}, {"name": "test_resnet", "size": 64, "patch": 32, "width": 96}],
    ids=["vit", "-2", "cnn"],
)
def test_a_tower_of_timm_gives_a_grid_of_features(changes: dict[str, Any]) -> None:
    tower = TimmTower(timm_config(**changes)).eval()
    size = tower.config.size
    pixels = torch.rand(2, 3, size, size)
    assert tower(pixels).shape == (2, 4, tower.config.width)
    assert not torch.allclose(tower(pixels), tower(pixels.flip(-1)))


def test_wrong_towers_of_timm_are_refused() -> None:
    with pytest.raises(ZooError, match=r"timm has no model 'test_vti' .*'test_vit"):
        TimmTower(timm_config(name="test_vti"))
    with pytest.raises(ZooError, match="has width 64 and patches of 16 pixels"):
        TimmTower(timm_config(width=65))
    with pytest.raises(ZooError, match=r"stage must lie in -6\.\.-1"):
        TimmTower(timm_config(stage=-7))
    with pytest.raises(ValueError, match="would be fetched"):
        timm_config(name="hf-hub:somebody/model")


def test_a_frozen_tower_of_timm_trains_nothing_but_the_rest(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(4)
    source = timm.create_model("test_vit", img_size=32)  # with its classifier, as timm publishes weights
    save_file(source.state_dict(), str(tmp_path / "vit.safetensors"))
    queries = {"grid": 2, "width": 64, "out_width": 24, "heads": 2, "source": [2, 2], "keys": "position+content"}
    section = {"name": "test_vit", "size": 32, "patch": 16, "width": 64}
    net = model(timm=section, queries=queries)
    load_tower(net, str(tmp_path / "vit.safetensors"))
    held = {key: value.clone() for key, value in net.tower.state_dict().items()}
    torch.testing.assert_close(held["model.blocks.0.attn.qkv.weight"], source.blocks[0].attn.qkv.weight.detach())
    net.train()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    ids, pixels = torch.tensor([[1, -200, 4, 5]]), torch.rand(1, 3, 32, 32)
    losses = []
    for _ in range(8):
        loss = net.loss(ids, pixels, torch.tensor([[-100, -100, 4, 5]]), m=2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, held[key]) for key, value in net.tower.state_dict().items())
    place = artifact.save(net, tmp_path / "art")
    torch.testing.assert_close(artifact.load(place).model(ids, pixels, m=3), net.eval()(ids, pixels, m=3))
    other = timm.create_model("test_vit2", img_size=32)
    save_file(other.state_dict(), str(tmp_path / "other.safetensors"))
    with pytest.raises(ZooError, match="is not of test_vit"):
        load_tower(net, str(tmp_path / "other.safetensors"))
    with pytest.raises(ZooError, match="tower of timm does not give"):
        net.visual_tokens(pixels, 2, "hired")
    assert net.visual_tokens(pixels, 1, "pool").shape == (1, 1, 24)


# --- reducers on a model


@pytest.mark.parametrize("projector", ["queries", "mlp"])
@pytest.mark.parametrize("kind", ["hired", "globalcom2"])
def test_reducers_keep_exactly_m_of_the_models_tokens(projector: str, kind: str) -> None:
    net, pixels = model(projector=projector).eval(), torch.rand(2, 3, 32, 32)
    whole = net.visual_tokens(pixels)
    for m in range(1, 17):
        kept = net.visual_tokens(pixels, m, kind)
        assert kept.shape == (2, m, 24)
        hits = (kept[:, :, None] == whole[:, None]).all(-1)
        assert hits.sum(-1).eq(1).all()
        assert hits.sum(1).le(1).all()
    with pytest.raises(ZooError, match="16 visual tokens to choose from, asked for 17"):
        net.visual_tokens(pixels, 17, kind)


def test_pooling_and_unknown_rules() -> None:
    net, pixels = model(projector="mlp").eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net.visual_tokens(pixels, 4, "pool"), pool_tokens(net.visual_tokens(pixels), 4))
    with pytest.raises(ZooError, match=r"no rule 'hierd'.*'hired'"):
        net.visual_tokens(pixels, 4, "hierd")
    task = VQA(net, VQAConfig())
    batch = {"ids": torch.tensor([[1, -200, 4, 5, 2]] * 2), "valid": torch.ones(2, 5).bool(), "pixels": pixels}
    batch["labels"] = torch.tensor([[-100, -100, -100, 5, 2]] * 2)
    loss, hits = task.answer(batch, 4, "pool")
    assert loss.isfinite()
    assert hits.shape == (2,)


def test_scores_are_the_attention_of_the_class_token() -> None:
    net, pixels = model().eval(), torch.rand(2, 3, 32, 32)
    tower = net.tower
    for logits, at in ((False, 1), (True, 2)):  # layer -2 of three blocks is read: the second one is the last that runs
        features, scores = tower.scored(pixels, logits)
        torch.testing.assert_close(features, tower(pixels))
        x = tower.embeddings(pixels)
        for block in tower.transformer.blocks[:at]:
            x = block(x)
        block = tower.transformer.blocks[at]
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, -1)
        weights = torch.einsum("bhd,blhd->bhl", q[:, 0].unflatten(-1, (2, 8)), k.unflatten(-1, (2, 8))) * 8**-0.5
        wanted = weights.mean(1) if logits else weights.softmax(-1).sum(1)
        torch.testing.assert_close(scores, wanted[:, 1:])
