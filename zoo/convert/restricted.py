"""A pickle opened as data: tensors, plain arrays, plain values and `argparse.Namespace`, and nothing that could run.

Official video checkpoints are Lightning files of before 2022: beside the weights they hold the command line of their
training as a `Namespace` and now and then a numpy number. PyTorch's loader of weights refuses those. This one gives
that loader stand-ins: classes of this file that only keep what the pickle says about an array or a Namespace, so that
no code of numpy or argparse reads bytes of the file. The stand-ins become the real things after the file is closed.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import ZooError

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype)
_NUMBER = re.compile(r"[?biufc]\d{0,2}")  # bool, integers, floats, complex numbers; no objects, texts or records
_MANY = 10_000_000  # values; nesting that refers to the same list again and again counts each time
_DEEP = 100


class _Dtype:
    """What a pickle says of a numpy dtype: its code and its byte order."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def real(self) -> np.dtype:
        code = self.code.decode("latin1") if isinstance(self.code, bytes) else self.code
        order = self.order.decode("latin1") if isinstance(self.order, bytes) else self.order
        if not isinstance(code, str) or not _NUMBER.fullmatch(code) or order not in ("<", ">", "|", "="):
            raise _Refused(f"an array of '{code}' values")
        return np.dtype(code if order == "|" else order + code)


class _Array:
    """What a pickle says of a numpy array: shape, dtype, order and bytes."""

    shape: Any = (0,)
    dtype: Any = None
    fortran: Any = False
    data: Any = b""

    def __init__(self, *_: Any) -> None:
        """The arguments of numpy's own function are a class and placeholders."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def real(self) -> np.ndarray:
        shape, data = self.shape, self.data
        if not isinstance(self.dtype, _Dtype) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise _Refused("an array of Python objects")
        dtype = self.dtype.real()
        if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
            raise _Refused("an array whose shape does not fit its bytes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if self.fortran else "C").copy()


class _Scalar:
    """A numpy number: a dtype and its bytes."""

    def __init__(self, dtype: Any = None, data: Any = b"") -> None:
        self.dtype, self.data = dtype, data

    def real(self) -> bool | int | float | complex:
        array = _Array()
        array.shape, array.dtype, array.data = (), self.dtype, self.data
        return array.real().item()


class _Class:
    """The class `numpy.ndarray`, which numpy's pickles name as an argument."""


class _Namespace:
    """`argparse.Namespace`: a mapping of names."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Refused(Exception):
    """What the file holds that is no data."""


_STAND_INS: list[Any] = [
    (_Namespace, "argparse.Namespace"),
    (_Class, "numpy.ndarray"),
    (_Dtype, "numpy.dtype"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_Scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def load_restricted(path: str | Path) -> Any:
    """What a PyTorch file (zip or legacy) holds, on the CPU, without running anything it says.

    Returns:
        Dictionaries, lists, tuples and sets of dense tensors, numpy arrays of numbers, plain values and
        `argparse.Namespace` (nested ones too). Objects that were shared in the file are shared in the result;
        parameters come as plain tensors.

    Raises:
        ZooError: no such file, a damaged one, one that claims more than it holds, or one with anything else in it;
            the sentence names the first such thing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ZooError(f"no such file: {file}")
    if file.stat().st_size == 0:
        raise ZooError(f"{file} is empty")
    _check_archive(file)
    try:
        with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused or read all the same
            content = torch.load(file, map_location="cpu", weights_only=True)
        return _Reader().real(content)
    except _Refused as error:
        raise ZooError(_refusal(file, str(error))) from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise ZooError(f"{file} is damaged or no PyTorch file ({_first_line(error)}): fetch it again") from None
        raise ZooError(_refusal(file, f"'{named.group(1)}'")) from None
    except MemoryError:
        raise ZooError(f"{file} claims more memory than this machine has") from None
    except Exception as error:
        # the loader meets hostile input, so what it raises has no fixed set of types; all of them mean this one thing
        raise ZooError(f"{file} is damaged or no PyTorch file ({_first_line(error)}): fetch it again") from None


class _Reader:
    """Replaces stand-ins by what they stand for and refuses whatever is neither data nor a stand-in."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, int, Any]] = {}  # id -> (result, values in it, the object kept alive)
        self.open: set[int] = set()

    def real(self, value: Any) -> Any:
        return self._convert(value, 0)[0]

    def _convert(self, value: Any, depth: int) -> tuple[Any, int]:
        if type(value) in _PLAIN:
            return value, 1
        key = id(value)
        if key in self.done:
            return self.done[key][:2]
        if key in self.open:
            raise _Refused("a structure that contains itself")
        if depth > _DEEP:
            raise _Refused(f"a structure more than {_DEEP} levels deep")
        self.open.add(key)
        result, count = self._inside(value, depth + 1)
        if count > _MANY:
            raise _Refused(f"more than {_MANY:,} values in one structure")
        self.open.discard(key)
        self.done[key] = (result, count, value)
        return result, count

    def _inside(self, value: Any, depth: int) -> tuple[Any, int]:
        kind = type(value)
        if kind in (Tensor, torch.nn.Parameter):
            return _dense(value), 1
        if kind in (_Array, _Scalar):
            return value.real(), 1
        if kind is bytearray:
            return bytes(value), 1
        if kind is torch.device:
            return str(value), 1
        if kind in (dict, OrderedDict, Counter):
            keys, n_keys = self._all(value.keys(), depth)
            items, n_items = self._all(value.values(), depth)
            made: dict[Any, Any] = OrderedDict() if kind is OrderedDict else {}
            made.update(zip(keys, items, strict=True))
            return made, 1 + n_keys + n_items
        if kind in (list, tuple, set, torch.Size):
            items, count = self._all(value, depth)
            return (tuple if kind is torch.Size else kind)(items), 1 + count
        if kind is _Namespace:
            state, count = self._convert({} if value.state is None else value.state, depth)
            if not isinstance(state, dict) or not all(type(name) is str and name.isidentifier() for name in state):
                raise _Refused("a Namespace that is no mapping of names")
            return argparse.Namespace(**state), count
        raise _Refused(f"a {getattr(value, '__name__', None) or kind.__name__}")

    def _all(self, values: Any, depth: int) -> tuple[list[Any], int]:
        pairs = [self._convert(value, depth) for value in values]
        return [item for item, _ in pairs], sum(count for _, count in pairs)


def _dense(value: Tensor) -> Tensor:
    """The values alone: attributes that a pickle may hang on a tensor, and could hide its methods with, fall away."""
    plain = Tensor.detach(value)
    if plain.layout is not torch.strided or plain.is_quantized or plain.device.type != "cpu":
        raise _Refused("a tensor that is not dense")
    if plain.numel() * plain.element_size() > plain.untyped_storage().nbytes():
        raise _Refused(f"a tensor of shape {tuple(plain.shape)} for which the file has no values")
    return plain


def _check_archive(file: Path) -> None:
    """PyTorch stores records uncompressed, so a zip whose records are larger than the file is a bomb."""
    with file.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ZooError(f"{file} is damaged or no PyTorch file ({_first_line(error)}): fetch it again") from None
    if any(Path(record.filename).name == "constants.pkl" for record in records):
        raise ZooError(f"{file} is a TorchScript program, which is code: take the weights (a state dict) instead")
    if sum(record.file_size for record in records) > file.stat().st_size:
        raise ZooError(f"{file} claims to unpack to more than its own size, which no PyTorch file does")


def _refusal(file: Path, what: str) -> str:
    return (
        f"{file} holds Python objects ({what}) beside its tensors and is not opened, since loading such things could "
        "run any code: save its state dict alone where you trust the file, or take the safetensors version"
    )


def _first_line(error: BaseException) -> str:
    """What is wrong, without the advice that PyTorch wraps around it (which is to load the file unguarded)."""
    inner = re.search(r"WeightsUnpickler error: ([^\n]*)", str(error))
    text = inner.group(1).strip() if inner else (str(error).strip().splitlines() or [""])[0]
    return text[:120] or type(error).__name__
