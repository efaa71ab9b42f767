"""Tokenizers: options beyond the official ids, against slow definitions written letter by letter."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo.tokenizers as tokenizers
from zoo.errors import ConfigError, ZooError
from zoo.tokenizers.base import Tokenizer
from zoo.tokenizers.bpe import BpeTokenizer, BpeTokenizerConfig, train
from zoo.tokenizers.char import CharTokenizer, CharTokenizerConfig
from zoo.tokenizers.kmer import SPECIALS, KmerTokenizer, KmerTokenizerConfig


def random_texts(seed: int, count: int = 60, letters: str = "ACGTACGTACGTACGTNacgt -<s>[MASK]<mask>U") -> list[str]:
    rng = np.random.default_rng(seed)
    pieces = re.findall(r"<\w+>|\[\w+\]|.", letters)
    return ["".join(rng.choice(pieces, rng.integers(0, 50))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train(["".join(rng.choice(list("ACGT"), 4000, p=[0.4, 0.1, 0.2, 0.3]))], 64, path)
    return BpeTokenizer(BpeTokenizerConfig(file=str(path), cls="[CLS]", sep="[SEP]"))


@pytest.fixture(params=["char", "char-cls", "char-literals", "kmer", "kmer-left", "kmer-right-pad", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: BpeTokenizer) -> Tokenizer:
    return {
        "char": CharTokenizer(),
        "char-cls": CharTokenizer(CharTokenizerConfig(template="cls_sep", pad_side="right")),
        "char-literals": CharTokenizer(CharTokenizerConfig(literals=True)),
        "kmer": KmerTokenizer(KmerTokenizerConfig(k=3, end="eos")),
        "kmer-left": KmerTokenizer(KmerTokenizerConfig(k=4, align="left")),
        "kmer-right-pad": KmerTokenizer(KmerTokenizerConfig(k=5, align="right", tail="pad", bos=False, end="bos")),
        "bpe": bpe,
    }[request.param]


@pytest.mark.filterwarnings("ignore:a tail")
def test_batch_rows_are_the_single_encodings(tokenizer: Tokenizer) -> None:
    texts = random_texts(1)
    for side, add in itertools.product(("left", "right"), (True, False)):
        ids, valid = tokenizer.encode_batch(texts, pad_side=side, add_special=add)
        assert ids.dtype == np.int64
        assert valid.dtype == np.bool_
        for text, row, mask in zip(texts, ids, valid, strict=True):
            assert row[mask].tolist() == tokenizer.encode(text, add).tolist()
            assert (row[~mask] == tokenizer.special["pad"]).all()
            edge = mask if side == "right" else mask[::-1]
            assert not (np.diff(edge.astype(int)) > 0).any()
    assert tokenizer.counts(texts).tolist() == [len(tokenizer.encode(text)) for text in texts]


@pytest.mark.filterwarnings("ignore:a tail")
def test_bytes_and_text_agree(tokenizer: Tokenizer) -> None:
    for text in random_texts(2, 20):
        assert tokenizer.encode(text).tolist() == tokenizer.encode(text.encode()).tolist()


@pytest.mark.filterwarnings("ignore:a tail")
def test_offsets_say_where_each_token_came_from(tokenizer: Tokenizer) -> None:
    for text in random_texts(3):
        ids, spans = tokenizer.encode(text), tokenizer.offsets(text)
        assert len(ids) == len(spans)
        inner = spans[len(tokenizer.prefix) : len(spans) - len(tokenizer.suffix)]
        assert (inner[:, 0] < inner[:, 1]).all()
        assert (inner[1:, 0] >= inner[:-1, 1]).all()
        body = ids[len(tokenizer.prefix) : len(ids) - len(tokenizer.suffix)]
        for token, i, (start, end) in zip(tokenizer.tokens(body), body, inner, strict=True):
            if i != tokenizer.special["unk"]:
                assert token.endswith(text[start:end])  # a completed k-mer begins with letters that are not there
        covered = np.zeros(len(text), bool)
        for start, end in inner:
            covered[start:end] = True
        if tokenizer.name == "char":
            assert covered.all()


@pytest.mark.filterwarnings("ignore:a tail")
def test_windows_equal_texts(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(4)
    for letters, width in itertools.product((b"ACGT", b"ACGTNacgt"), (60, 61)):
        windows = rng.choice(np.frombuffer(letters, np.uint8), (5, width))
        texts = [row.tobytes() for row in windows]
        ids, valid = tokenizer.encode_windows(windows)
        want, mask = tokenizer.encode_batch(texts, add_special=False)
        assert (ids == want).all()
        assert (valid == mask).all()


@pytest.mark.filterwarnings("ignore:a tail")
def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    again = tokenizers.load(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.vocab == tokenizer.vocab
    for text in random_texts(5, 20):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert type(tokenizer).load(tmp_path).special == tokenizer.special


def test_longer_than_allowed(tokenizer: Tokenizer) -> None:
    texts = ["ACGT" * 30, "ACGT" * 15]
    longest = len(tokenizer.encode(texts[0]))
    with pytest.raises(ZooError, match=rf"{longest} tokens, more than max_len={longest - 1}"):
        tokenizer.encode_batch(texts, longest - 1)
    ids, _ = tokenizer.encode_batch(texts, 7, truncate="right")
    assert ids.shape == (2, 7)
    assert ids[0].tolist() == [
        *tokenizer.encode(texts[0])[: 7 - len(tokenizer.suffix)],
        *tokenizer.suffix,
    ]
    left, _ = tokenizer.encode_batch(texts, 7, truncate="left")
    assert (
        left[0].tolist()[len(tokenizer.prefix) :]
        == tokenizer.encode(texts[0])[longest - 7 + len(tokenizer.prefix) :].tolist()
    )


def test_sequence_drops_everything_that_is_no_base(tokenizer: Tokenizer) -> None:
    text = "ACGTTGCA" * 15
    assert tokenizer.sequence(tokenizer.encode(text)) == text
    with pytest.raises(ZooError, match="outside"):
        tokenizer.tokens([tokenizer.vocab_size])
    with pytest.raises(ZooError, match="outside"):
        tokenizer.tokens([-1])


def test_char_options() -> None:
    def ids(text: str, **options: Any) -> list[int]:
        return CharTokenizer(CharTokenizerConfig(template="none", **options)).encode(text).tolist()

    assert ids("acgtn") == [6] * 5
    assert ids("acgtn", lower="upper") == [7, 8, 9, 10, 11]
    assert ids("RYSWKMBDHV-", iupac="n") == [11] * 10 + [6]
    assert ids("ry", iupac="n", lower="upper") == [11, 11]
    assert ids("UuT", u="t") == [10, 6, 10]
    assert ids("Uu", u="t", lower="upper") == [10, 10]
    assert ids("TGCA", letters="TGCA") == [7, 8, 9, 10]
    assert ids("Aβ") == [7, 6]
    with pytest.raises(ConfigError, match="N in letters"):
        tokenizers.build({"name": "char", "letters": "ACGT", "iupac": "n"})


def slow_kmers(text: str, k: int, alphabet: str, align: str, tail: str) -> list[str]:
    """Token strings by the rule as the reference states it."""
    literals = "|".join(re.escape(name) for name in SPECIALS.split())
    vocabulary = set(map("".join, itertools.product(alphabet, repeat=k))) | set(SPECIALS.split())
    out: list[str] = []
    for part in re.findall(rf"{literals}|[A-Z]+|.", text, re.DOTALL):
        if not re.fullmatch("[A-Z]+", part):
            out.append(part)
            continue
        over = len(part) % k
        if over and align == "left":
            part = part[: len(part) - over] if tail == "trim" else part + alphabet[0] * (k - over)
        elif over and align == "right":
            part = part[over:] if tail == "trim" else alphabet[0] * (k - over) + part
        out += [part[i : i + k] for i in range(0, len(part), k)]
    return [token if token in vocabulary else "<oov>" for token in out]


@pytest.mark.parametrize("align", ["warn", "left", "right"])
@pytest.mark.parametrize("tail", ["trim", "pad"])
@pytest.mark.parametrize(("k", "alphabet"), [(1, "ACGT"), (3, "TGCA"), (6, "ATCG"), (4, "ACGTN")])
@pytest.mark.filterwarnings("ignore:a tail")
def test_kmer_against_the_rule(k: int, alphabet: str, align: str, tail: str) -> None:
    tokenizer = KmerTokenizer(KmerTokenizerConfig(k=k, alphabet=alphabet, align=align, tail=tail))
    texts = random_texts(6, 100) + random_texts(7, 50, "ACGT") + ["", "A", "AC" * 13, "N" * 20]
    for text in texts:
        got = tokenizer.tokens(tokenizer.encode(text, add_special=False))
        assert got == slow_kmers(text, k, alphabet, align, tail), text
    _, valid = tokenizer.encode_batch(texts, add_special=False)
    assert valid.sum(1).tolist() == [len(slow_kmers(text, k, alphabet, align, tail)) for text in texts]


def test_kmer_tail_is_never_silent() -> None:
    with pytest.warns(UserWarning, match="tail of 2 letters"):
        assert KmerTokenizer().encode("ACGTACGT").tolist() == [1, 754, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert KmerTokenizer().encode("ACGTAC").tolist() == [1, 754]
        assert 0 not in KmerTokenizer(KmerTokenizerConfig(align="left")).encode("ACGTACGT")
    with pytest.raises(ZooError, match=r"run of 8 letters.*k=6"):
        KmerTokenizer(KmerTokenizerConfig(align="error")).encode("ACGTACGT")


def test_kmer_options() -> None:
    def ids(text: str, **options: Any) -> list[int]:
        return KmerTokenizer(KmerTokenizerConfig(bos=False, **options)).encode(text).tolist()

    assert ids("acgtac", lower="upper") == [754]
    assert ids("ACGUAC", u="t") == [754]
    assert ids("ACGTACAC", align="right", tail="pad")[0] == KmerTokenizer().vocab.index("AAAAAC")
    assert KmerTokenizer(KmerTokenizerConfig(k=2)).vocab_size == 32 + 16
    with pytest.raises(ConfigError, match="k must be"):
        tokenizers.build({"name": "kmer", "k": 20})
    with pytest.raises(ConfigError, match="alphabet"):
        tokenizers.build({"name": "kmer", "alphabet": "acgt"})


def test_bpe_options(bpe: BpeTokenizer) -> None:
    lower = BpeTokenizer(BpeTokenizerConfig(file=str(bpe.path), lower="upper", u="t"))
    assert lower.encode("acguacgu").tolist() == bpe.encode("ACGTACGT").tolist()
    assert bpe.encode("acgt", add_special=False).tolist() == [0] * 4
    assert bpe.vocab_size == 64
    ids, kinds = bpe.encode_pair("ACGT", "GGGG")
    assert ids[0] == bpe.special["cls"]
    assert ids.tolist().count(bpe.special["sep"]) == 2
    assert kinds[-1] == 1


def test_bpe_file_errors(tmp_path: Path, bpe: BpeTokenizer) -> None:
    section: dict[str, Any] = {"name": "bpe", "hub": "someone/nothing-there", "file": "no.json"}
    with pytest.raises(ZooError, match=r"no\.json.*huggingface\.co/someone/nothing-there"):
        tokenizers.build(section, tmp_path)
    with pytest.raises(ZooError, match=r"no tokenizer\.json; get"):
        tokenizers.build({"name": "bpe", "hub": "someone/nothing-there"}, tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ZooError, match=r"is not a tokenizer\.json"):
        tokenizers.build({"name": "bpe", "file": "broken.json"}, tmp_path)
    with pytest.raises(ZooError, match="sha256"):
        tokenizers.build({"name": "bpe", "file": str(bpe.path), "sha256": "0" * 64})
    with pytest.raises(ZooError, match=r"no token '\[BOS\]'"):
        tokenizers.build({"name": "bpe", "file": str(bpe.path), "bos": "[BOS]"})


def test_catalogue() -> None:
    names = tokenizers.names()
    assert {"dna-char", "generator-kmer6", "dnabert2-bpe", "metagene-bpe", "dna-bpe1024"} <= set(names)
    assert tokenizers.from_catalogue("dna-char").section() == CharTokenizer().section()
    assert tokenizers.from_catalogue("generator-kmer6").section() == KmerTokenizer().section()
    own = tokenizers.from_catalogue("dna-bpe1024")
    assert own.vocab_size == 1024
    assert own.sequence(own.encode("ACGTTGCAAT")) == "ACGTTGCAAT"
    with pytest.raises(ZooError, match="did you mean 'dna-char'"):
        tokenizers.from_catalogue("dna-cahr")
    with pytest.raises(ConfigError, match="did you mean 'kmer'"):
        tokenizers.build({"name": "kmr"})
    with pytest.raises(ConfigError, match="needs a 'name'"):
        tokenizers.build({})


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no tokenizer_config\.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ZooError, match="not valid JSON"):
        tokenizers.load(tmp_path)
    CharTokenizer().save(tmp_path)
    with pytest.raises(ZooError, match="holds a char tokenizer, not a kmer one"):
        KmerTokenizer.load(tmp_path)


def test_a_length_without_room_for_the_special_tokens_is_refused() -> None:
    tokenizer = tokenizers.build({"name": "char", "template": "cls_sep"})
    assert tokenizer.encode_batch(["ACGTA"], max_len=2, truncate="left")[0].tolist() == [[0, 1]]
    with pytest.raises(ZooError, match=r"max_len=1 leaves no room for the 2 special tokens"):
        tokenizer.encode_batch(["ACGTA"], max_len=1, truncate="left")
