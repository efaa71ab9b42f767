"""`zoo generate`: DNA from causal models."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import zoo.cli.generate as command
import zoo.hub.artifact as artifact
from zoo.datamodules.fasta import read_fasta
from zoo.generate.dna import DnaGenerator, DnaOptions
from zoo.generate.engine import GenerateConfig
from zoo.models.generator import GENERator, GENERatorConfig
from zoo.tokenizers import build
from zoo.tokenizers.bpe import train as train_bpe

Zoo = Callable[..., tuple[int, str, str]]


def records(text: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for block in text.split(">")[1:]:
        header, *lines = block.splitlines()
        out[header.split()[0]] = "".join(lines)
    return out


@pytest.mark.parametrize("name", ["letters", "kmers"])
def test_greedy_is_the_likeliest_base_each_time(zoo: Zoo, models: dict[str, Path], name: str) -> None:
    """Against the whole sequence read anew for every token, with the tokens that are no bases struck out."""
    status, out, err = zoo("generate", models[name], "--prompt", "ACGTTGCAA", "--bases", "20", "--temperature", "0")
    assert (status, err) == (0, "")
    found = artifact.load(str(models[name]))
    allowed = [i for i, token in enumerate(found.tokenizer.vocab) if token and not set(token) - set("ACGT")]
    ids = found.tokenizer.encode("ACGTTGCAA", add_special=False).tolist()
    ids, text = [*found.tokenizer.prefix, *ids], ""
    while len(text) < 20:
        logits = found.model.eval()(torch.tensor([ids]))[0, -1].detach()
        ids.append(max(allowed, key=lambda i: float(logits[i])))
        text += found.tokenizer.vocab[ids[-1]]
    assert records(out) == {"prompt_1_1": text[:20]}


@pytest.mark.parametrize("name", ["letters", "kmers"])
def test_batches_do_not_matter(zoo: Zoo, models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """The same seed gives the same sequences in any batch, from prompts of unlike lengths; another one others."""
    (tmp_path / "p.fa").write_text(">long one\nACGTTGCAACGTACG\n>short\nGGA\n")
    base = ("generate", models[name], "--fasta", tmp_path / "p.fa", "--num", "3", "--bases", "31", "--seed", "5")
    options = ("--top-k", "3", "--top-p", "0.95", "--min-p", "0.01", "--repetition", "1.1", "--temperature", "0.9")
    one, two = zoo(*base, *options), zoo(*base, *options, "--batch-size", "1")
    assert one[0] == 0
    assert one[1] == two[1]
    found = records(one[1])
    assert list(found) == ["long_1", "long_2", "long_3", "short_1", "short_2", "short_3"]
    assert len(set(found.values())) == 6
    assert all(len(text) == 31 and not set(text) - set("ACGT") for text in found.values())
    assert records(zoo(*base[:-1], "6", *options)[1]) != found
    assert "seed=5" in one[1].splitlines()[0]


def test_output_files_and_streams(zoo: Zoo, models: dict[str, Path], tmp_path: Path) -> None:
    base = ("generate", models["letters"], "--prompt", "acgtt", "--bases", "100")
    plain = records(zoo(*base)[1])["prompt_1_1"]
    out = tmp_path / "s.fa.gz"
    assert zoo(*base, "--with-prompt", "-o", out) == (0, "", "")
    assert [text for _, text in read_fasta(out)] == [b"acgtt" + plain.encode()]
    assert max(map(len, gzip.decompress(out.read_bytes()).decode().splitlines()[1:])) == 80
    assert zoo(*base, "--stream")[1] == plain + "\n"
    # a start token is a prompt
    assert len(records(zoo("generate", models["kmers"], "--bases", "10")[1])["sample_1"]) == 10


def test_other_letters_and_the_end_token_on_request(models: dict[str, Path]) -> None:
    found = artifact.load(str(models["letters"]))
    # a model that likes [SEP] best, then N, then G
    order = {"[SEP]": 3.0, "N": 2.0, "G": 1.0}

    class Favourites(type(found.model.head)):  # type: ignore[misc]
        def forward(self, hidden: torch.Tensor, *_: object) -> torch.Tensor:
            row = torch.zeros(16)
            for token, value in order.items():
                row[found.tokenizer.vocab.index(token)] = value
            return row.expand(*hidden.shape[:2], 16)

    found.model.head.__class__ = Favourites
    generator, greedy = DnaGenerator(found.model, found.tokenizer), GenerateConfig()

    def text(**options: bool) -> tuple[str, bool]:
        sample = next(generator([("p", b"ACG")], DnaOptions(bases=5, **options), greedy))
        return sample.text, sample.ended

    assert text() == ("GGGGG", False)
    assert text(any_letter=True) == ("NNNNN", False)
    assert text(end=True) == ("", True)


def test_byte_pairs_stop_at_the_base(tmp_path: Path) -> None:
    draw = random.Random(0)
    train_bpe(["".join(draw.choices("ACGT", k=200)) for _ in range(20)], 64, tmp_path / "tokenizer.json")
    tokenizer = build({"name": "bpe"}, tmp_path)
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "d_inner": 32, "max_len": 60}
    model = GENERator(GENERatorConfig(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    generator = DnaGenerator(model, tokenizer)
    shown: list[str] = []
    samples = list(
        generator([("a", b"ACGTACG"), ("b", b"TT")], DnaOptions(41, 2), GenerateConfig(temperature=1), shown.append)
    )
    assert [len(sample.text) for sample in samples] == [41] * 4
    assert [(sample.prompt, sample.copy) for sample in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "".join(shown) == samples[0].text
    # 200 bases may or may not fit into 60 tokens: what does not is said to have ended early
    sample = next(generator([("a", b"ACGTACG")], DnaOptions(500), GenerateConfig(temperature=1)))
    assert sample.ended
    assert 60 < len(sample.text) < 500


def test_families_of_pictures_have_their_own(
    zoo: Zoo, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family in the table is answered by the function it names."""
    monkeypatch.setitem(command.FAMILIES, "dnabert2", "zoo.cli.generate:_check_numbers")
    with pytest.raises(TypeError):  # called with the artifact and the arguments
        zoo("generate", models["masked"])


def test_sentences(zoo: Zoo, models: dict[str, Path], tmp_path: Path) -> None:
    prompt = ["--prompt", "ACGT"]
    for name, arguments, words in [
        ("masked", prompt, "is a masked language model"),
        ("classes", prompt, "no language-model head"),
        ("letters", [], "no start token"),
        ("letters", ["--prompt", "ACXGT"], "has 'X', which the char tokenizer does not know"),
        ("kmers", ["--prompt", "ACGNTA"], "has 'NTA', which"),
        ("letters", [*prompt, "--bases", "500"], "at most 130"),
        ("letters", [*prompt, "--bases", "0"], "--bases must be at least 1"),
        ("letters", [*prompt, "--num", "0"], "--num must be at least 1"),
        ("letters", [*prompt, "--top-p", "0"], "--top-p must be above 0"),
        ("letters", [*prompt, "--top-k", "-1"], "--top-k must be at least 0"),
        ("letters", [*prompt, "--min-p", "1"], "--min-p"),
        ("letters", [*prompt, "--repetition", "0"], "--repetition"),
        ("letters", [*prompt, "--temperature", "-1"], "--temperature"),
        ("letters", [*prompt, "--num", "2", "--stream"], "--stream shows one sequence, but 2"),
        ("letters", ["--fasta", tmp_path / "no.fa"], "does not exist"),
        ("letters", [*prompt, "-o", tmp_path / "no" / "s.fa"], "does not exist"),
    ]:
        target = [] if "-o" in arguments else ["-o", tmp_path / "s.fa"]
        status, out, err = zoo("generate", models[name], *arguments, *target)
        assert (status, out) == (2, ""), err
        assert words in err
        assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
