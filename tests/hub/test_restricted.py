"""The pickle loader for old official checkpoints: what it admits comes back exactly, what could run is refused."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.convert.restricted import load_restricted
from zoo.errors import ZooError

WITNESS = "ZOO_TEST_WITNESS"


class Evil:
    """Unpickled by an unguarded loader, sets an environment variable."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(autouse=True)
def witness(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(WITNESS, raising=False)
    yield
    assert WITNESS not in os.environ


def saved(tmp_path: Path, value: Any, zipped: bool = True) -> Path:
    file = tmp_path / "file.ckpt"
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file


@pytest.mark.parametrize("zipped", [True, False])
def test_an_old_lightning_checkpoint_comes_back_exactly(tmp_path: Path, zipped: bool) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    inner = argparse.Namespace(betas=(0.9, 0.99), name="inner")
    content = {
        "epoch": 3,
        "state_dict": OrderedDict(a=shared, b=shared, c=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))),
        "hyper_parameters": argparse.Namespace(lr=1e-3, layers=[1, 2], inner=inner, none=None, flags={"x"}),
        "array": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "big_endian": np.arange(3, dtype=">i4"),
        "flags": np.array([True, False]),
        "complex": np.array([1 + 2j], dtype=np.complex64),
        "score": np.float32(0.25),
        "raw": b"\x00\xff",
        "dtype": torch.float16,
        "shape": torch.Size([2, 3]),
    }
    found = load_restricted(saved(tmp_path, content, zipped))
    assert list(found) == list(content)
    assert found["epoch"] == 3
    assert isinstance(found["state_dict"], OrderedDict)
    assert torch.equal(found["state_dict"]["a"], shared)
    assert found["state_dict"]["a"] is found["state_dict"]["b"]
    assert type(found["state_dict"]["c"]) is torch.Tensor
    assert found["state_dict"]["c"].dtype is torch.bfloat16
    assert found["hyper_parameters"] == content["hyper_parameters"]
    for name in ("array", "big_endian", "flags", "complex"):
        np.testing.assert_array_equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype
    assert found["score"] == 0.25
    assert (found["raw"], found["dtype"], found["shape"]) == (b"\x00\xff", torch.float16, (2, 3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (os.putenv, (WITNESS, "1"), "putenv"),
        (os.system, ("exit 0",), "system"),
        (exec, (f"import os; os.environ['{WITNESS}'] = '1'",), "exec"),
        (eval, ("1 + 1",), "eval"),
        (getattr, ("x", "upper"), "getattr"),
        (np.load, ("x.npy",), "numpy"),
        (np.frombuffer, (b"1234",), "frombuffer"),
        (argparse.FileType, ("w",), "argparse.FileType"),
        (argparse.ArgumentParser, (), "argparse.ArgumentParser"),
        (torch.load, ("x",), "torch.serialization.load"),
        (torch.hub.load, ("a/b", "c"), "torch.hub.load"),
    ],
)
def test_a_pickle_that_calls_something_is_refused(
    tmp_path: Path, function: Any, args: tuple, named: str, zipped: bool
) -> None:
    content = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": argparse.Namespace(x=Evil(function, *args))}
    with pytest.raises(ZooError, match=named):
        load_restricted(saved(tmp_path, content, zipped))


class Custom:
    """A class of somebody's code."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Custom(), "Custom"),
        (np.array([Custom()], dtype=object), "Custom"),
        (np.array([1, 2], dtype=object), "Python objects"),
        (np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), "'V12'"),
        (np.array(["text"]), "'U4'"),
        (np.dtype("f4"), "_Dtype"),
        (torch.nn.Linear, "Linear"),
        (torch.ones(3).to_sparse(), "not dense"),
        (torch.ones(1).expand(10**9), "no values"),
        (torch.empty(2, device="meta"), "not dense"),
        (torch.ones(2).untyped_storage(), "Storage"),
    ],
)
def test_what_is_no_plain_data_is_refused_by_name(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        load_restricted(saved(tmp_path, {"w": torch.ones(2), "x": value}))


def handmade(tmp_path: Path, stream: bytes) -> Path:
    """A PyTorch zip whose pickle is *stream*."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    file = tmp_path / "file.pt"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(file, "w") as target:
        for record in source.infolist():
            data = stream if record.filename.endswith("data.pkl") else source.read(record)
            target.writestr(record.filename, data)
    return file


BYTES = b"c_codecs\nencode\nX\x04\x00\x00\x00abcdX\x06\x00\x00\x00latin1\x86R"
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"


def array(shape: bytes, data: bytes) -> bytes:
    dtype = b"cnumpy\ndtype\nU\x02f4\x85R"
    return b"\x80\x02" + RECONSTRUCT + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", BYTES), "does not fit its bytes"),
        (array(b"J\xff\xff\xff\xff\x85", BYTES), "does not fit its bytes"),
        (array(b"K\x01\x85", b"]"), "Python objects"),
        (array(b"K\x01", b"U\x04abcd"), "Python objects"),
        (b"\x80\x02]q\x00h\x00a.", "contains itself"),
        (b"\x80\x02" + b"]" * 300 + b"a" * 299 + b".", "levels deep"),
        (b"\x80\x02](]q\x00" + b"h\x00" * 99 + b"e.", None),
        (b"\x80\x02cargparse\nNamespace\n)\x81K\x07b.", "no mapping of names"),
        (b"\x80\x02cargparse\nNamespace\n)\x81}X\x03\x00\x00\x00a.bK\x01sb.", "no mapping of names"),
        (b"\x80\x02cargparse\nNamespace\n.", "_Namespace"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n.", "_rebuild_tensor_v2"),
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R.", "damaged|os.system"),
        (b"\x80\x02c__main__\nThing\n)R.", "__main__.Thing"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "damaged"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "damaged|PyTorch"),
        (b"\x80\x02", "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_handmade_pickle_is_refused_in_one_sentence(tmp_path: Path, stream: bytes, message: str | None) -> None:
    file = handmade(tmp_path, stream)
    if message is None:  # a list referred to a hundred times is no bomb yet
        assert len(load_restricted(file)) == 100
        return
    with pytest.raises(ZooError, match=message) as caught:
        load_restricted(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_nested_references_cannot_grow_without_bound(tmp_path: Path) -> None:
    value: list = [0]
    for _ in range(40):
        value = [value, value]  # 2**40 values when walked without a memo
    with pytest.raises(ZooError, match="more than 10,000,000 values"):
        load_restricted(saved(tmp_path, {"x": value}))


def test_attributes_of_a_tensor_do_not_survive(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.to = "hidden"  # type: ignore[method-assign, assignment]
    found = load_restricted(saved(tmp_path, {"w": tensor}))
    assert found["w"].to(torch.float64).dtype is torch.float64


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "bomb.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("archive/data.pkl", b"\0" * 50_000_000)
        target.writestr("archive/version", b"3\n")
    assert file.stat().st_size < 100_000
    with pytest.raises(ZooError, match="more than its own size"):
        load_restricted(file)


def test_a_legacy_file_that_claims_ten_gigabytes(tmp_path: Path) -> None:
    small = saved(tmp_path, {"w": torch.zeros(7)}, zipped=False)
    data = small.read_bytes()
    at = data.index(b"K\x07", data.index(b"storage"))  # the number of elements in the storage's persistent id
    small.write_bytes(data[:at] + b"J" + struct.pack("<i", 2_000_000_000) + data[at + 2 :])
    with pytest.raises(ZooError, match=r"damaged|claims"):
        load_restricted(small)


def test_torchscript_is_code(tmp_path: Path) -> None:
    file = tmp_path / "script.pt"
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("m/constants.pkl", pickle.dumps((), protocol=2))
        target.writestr("m/data.pkl", b"\x80\x02}.")
    with pytest.raises(ZooError, match="TorchScript program"):
        load_restricted(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"not a checkpoint", b"\x80\x02}"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(ZooError, match=r"empty|damaged"):
        load_restricted(file)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.zeros(1000)})
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ZooError, match="damaged"):
        load_restricted(file)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no such file"):
        load_restricted(tmp_path / "none.pt")
