"""Transforms behind the long convolution: real signals to half spectra and back, on a ring that holds all lags.

`Plain` is one zero-padded `rfft` of the ring. On the CPU `Twisted` serves short signals by one complex transform of
half the ring, and `Split` the long ones. It evaluates the signal at the odd half frequencies of a ring of
n = rows * columns points (in effect modulo x^n + 1), n >= 2L:

    X[f + rows g] = sum_s w(g s / columns) w((f + 1/2) s / n) sum_r w((f + 1/2) r / rows) x[r columns + s]

with w(a) = e^{-2 pi i a}. A small real matrix product does the sum over r and skips the zero half of the ring;
rows / 2 contiguous complex transforms of length `columns` do the sum over s. Half frequencies make every row complex,
so that f < rows / 2 suffices and no row is redundant. Passing the ring's end changes sign: that is harmless, because
lags lie within -L .. L - 1.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SPLIT_FROM = 1 << 13  # below this length one padded transform of the whole block is as fast
SLICE = 1 << 18  # points of a spectrum above which it is made in slices: with its workspace, 6 MB
HEAP = 8 << 20  # bytes of a thread's heap in large pages; more would keep memory that the spectra do not fill
_local = threading.local()  # each thread's workspace: using the same memory again keeps it in the cache


class Plain:
    """Half spectra [.., n / 2 + 1] of the cyclic ring of n >= 2L - 1 points; any device.

    Args:
        length: L of the signals.
        dtype: float32 or float64.
    """

    parts = 1  # slices of frequencies that are transformed one after the other

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype, self.ring = length, dtype, ring_size(max(2 * length - 1, 2))
        self.shape: tuple[int, ...] = (self.ring // 2 + 1,)

    def ready(self, x: Tensor) -> Tensor:
        """A signal [.., L] or filter [.., L or 2L - 1] as `spectrum` takes it."""
        return x.to(self.dtype) if x.shape[-1] == self.length else self._wrap(x.to(self.dtype), 1)

    def slice(self, spectra: Tensor, part: int) -> Tensor:
        """The view of whole spectra that holds one slice of frequencies."""
        return spectra

    def spectrum(self, x: Tensor, skip: Tensor | None = None, *, conj: bool = False, part: int = 0) -> Tensor:
        """Spectrum of x, or its conjugate (that of the signal in reversed time); *skip* [..] is added at lag 0."""
        spectrum = torch.fft.rfft(x, n=self.ring)
        spectrum = spectrum.conj_physical_() if conj else spectrum
        return spectrum if skip is None else spectrum.add_(skip[:, None])

    def signal(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        """Write the signal [.., L] of a spectrum (or conjugate spectrum) into *out*, add it there if *part* > 0.

        The spectrum may be overwritten.
        """
        out.copy_(self._inverse(spectrum, conj)[..., : self.length])

    def taps(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        """The same for a filter [.., L or 2L - 1]."""
        if out.shape[-1] == self.length:
            self.signal(spectrum, out, conj=conj)
        else:
            self._unwrap(self._inverse(spectrum, conj), 1, out)

    def _inverse(self, spectrum: Tensor, conj: bool) -> Tensor:
        return torch.fft.irfft(spectrum.conj_physical_() if conj else spectrum, n=self.ring)

    def _wrap(self, k: Tensor, sign: int) -> Tensor:
        ring = k.new_zeros(*k.shape[:-1], self.ring)
        ring[..., : self.length] = k[..., self.length - 1 :]
        torch.mul(k[..., : self.length - 1], sign, out=ring[..., self.ring - self.length + 1 :])
        return ring

    def _unwrap(self, ring: Tensor, sign: int, out: Tensor, add: bool = False) -> None:
        back = ring[..., self.ring - self.length + 1 :].mul_(sign)
        _put(out[..., self.length - 1 :], ring[..., : self.length], add)
        _put(out[..., : self.length - 1], back, add)


def _put(out: Tensor, value: Tensor, add: bool) -> None:
    out.add_(value) if add else out.copy_(value)


class Twisted(Plain):
    """Spectra [.., n / 2] of a ring of n >= 2L points at the odd half frequencies, for short signals on the CPU.

    There a real signal is one complex transform of half the ring, without zeros: modulo x^(n/2) + i, where the ring's
    second half is the negative imaginary part. It is a fifth faster than `rfft` of the ring, and
    a conjugate costs nothing.
    """

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype, self.half = length, dtype, ring_size(length)
        self.ring, self.shape = 2 * self.half, (self.half,)

    @cached_property  # made by the first transform: a compiler only asks for shapes, and its tensors hold no values
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The twist and its conjugate, the same with the scale of the way back: each [n / 2]."""
        angle = torch.arange(self.half, dtype=torch.float64) * (-math.pi / self.ring)
        dtype = torch.complex128 if self.dtype == torch.float64 else torch.complex64
        with torch.inference_mode(False):
            twist = torch.polar(torch.ones_like(angle), angle)
            back = twist.conj().resolve_conj()
            return twist.to(dtype), back.to(dtype), (twist / self.half).to(dtype), (back / self.half).to(dtype)

    def ready(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if x.shape[-1] != self.length:
            ring = self._wrap(x, -1)
            return torch.complex(ring[..., : self.half], -ring[..., self.half :])
        return x if self.half == self.length else torch.nn.functional.pad(x, (0, self.half - self.length))

    def spectrum(self, x: Tensor, skip: Tensor | None = None, *, conj: bool = False, part: int = 0) -> Tensor:
        if conj:
            spectrum = torch.fft.ifft((x.conj() if x.is_complex() else x) * self.tables[1], norm="forward")
        else:
            spectrum = torch.fft.fft(x * self.tables[0])
        return spectrum if skip is None else spectrum.add_(skip[:, None])

    def signal(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        out.copy_(self._inverse(spectrum, conj).real[..., : self.length])

    def taps(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        if out.shape[-1] == self.length:
            self.signal(spectrum, out, conj=conj)
        else:
            z = self._inverse(spectrum, conj)
            self._unwrap(torch.cat([z.real, z.imag if conj else -z.imag], -1), -1, out)

    def _inverse(self, spectrum: Tensor, conj: bool) -> Tensor:
        if conj:
            return torch.fft.fft(spectrum).mul_(self.tables[2])
        return torch.fft.ifft(spectrum, norm="forward").mul_(self.tables[3])


class Split(Plain):
    """Half spectra [.., rows / 2, columns] by a matrix product and shorter transforms; see the head of this file.

    Of very long signals only a slice of the rows is transformed at a time, so that a thread's work stays in the cache.
    """

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype = length, dtype
        self.rows = 16 if length <= 1 << 17 else 32
        self.columns = ring_size(-(-2 * length // self.rows))
        self.ring, self.half = self.rows * self.columns, self.rows // 2
        self.parts = min(self.half, max(1, self.half * self.columns // SLICE))
        self.parts = 1 << (self.parts.bit_length() - 1)  # a divisor of the rows
        self.count = self.half // self.parts  # rows of one slice
        self.shape = (self.half, self.columns)

    @cached_property  # as above
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Matrices of each slice: there [2 count, rows], for the conjugate, and back; twiddles [rows / 2, columns]."""
        frequency = torch.arange(self.half, dtype=torch.float64) + 0.5
        with torch.inference_mode(False):
            angle = torch.outer(frequency, torch.arange(self.rows, dtype=torch.float64)) * (2 * math.pi / self.rows)
            angle = angle.view(self.parts, self.count, self.rows)
            analysis = torch.cat([angle.cos(), -angle.sin()], 1).to(self.dtype)  # real parts, imaginary parts
            conjugate = torch.cat([angle.cos(), angle.sin()], 1).to(self.dtype)
            synthesis = (analysis.double() * (2 / self.ring)).transpose(1, 2).to(self.dtype).contiguous()
            angle = torch.outer(frequency, torch.arange(self.columns, dtype=torch.float64)) * (-2 * math.pi / self.ring)
            twiddle = torch.polar(torch.ones_like(angle), angle)
            twiddle = twiddle.to(torch.complex128 if self.dtype == torch.float64 else torch.complex64)
            return analysis, conjugate, synthesis, twiddle, twiddle.conj().resolve_conj().contiguous()

    def ready(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if x.shape[-1] != self.length:
            return self._wrap(x, -1)
        return x if 2 * x.shape[-1] == self.ring else torch.nn.functional.pad(x, (0, self.ring // 2 - x.shape[-1]))

    def slice(self, spectra: Tensor, part: int) -> Tensor:
        return spectra if self.parts == 1 else spectra.narrow(-2, part * self.count, self.count)

    def spectrum(self, x: Tensor, skip: Tensor | None = None, *, conj: bool = False, part: int = 0) -> Tensor:
        lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1] // self.columns, self.columns)
        matrix, twiddle = (self.tables[1], self.tables[4]) if conj else (self.tables[0], self.tables[3])
        matrix = matrix[part, :, : x.shape[1]]
        parts, z = self._workspace(len(x))
        torch.bmm(matrix.expand(len(x), -1, -1), x, out=parts)  # [N, 2 count, columns]
        torch.complex(parts[:, : self.count], parts[:, self.count :], out=z)
        if skip is not None:  # before the twiddle's column 0, which is 1: an impulse at lag 0
            z.view(*lead, self.count, self.columns)[..., 0] += skip[:, None]
        z *= self.slice(twiddle, part)
        z = torch.fft.ifft(z, norm="forward") if conj else torch.fft.fft(z)
        return z.view(*lead, self.count, self.columns)

    def signal(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        spectrum = spectrum.conj_physical_() if conj else spectrum
        self._synthesize(spectrum, self.half, out, part)

    def taps(self, spectrum: Tensor, out: Tensor, *, conj: bool = False, part: int = 0) -> None:
        if out.shape[-1] == self.length:
            self.signal(spectrum, out, conj=conj, part=part)
        else:
            ring = out.new_empty(*out.shape[:-1], self.ring, dtype=self.dtype)
            self._synthesize(spectrum.conj_physical_() if conj else spectrum, self.rows, ring, part, add=False)
            self._unwrap(ring, -1, out, part > 0)

    def _workspace(self, count: int) -> tuple[Tensor, Tensor]:
        """Room of this thread for *count* signals: parts [N, 2 count, columns] and complex [N, count, columns]."""
        need = count * 2 * self.count * self.columns
        room = getattr(_local, "room", None)
        if room is None or room.dtype != self.dtype or len(room) < 2 * need:
            with torch.inference_mode(False):  # room made for inference could not be written to afterwards
                _local.room = room = torch.empty(2 * need, dtype=self.dtype)
        parts, z = room[:need], room[need : 2 * need].view(-1, 2)
        shape = (count, self.count, self.columns)
        return parts.view(count, 2 * self.count, self.columns), torch.view_as_complex(z).view(shape)

    def _synthesize(self, spectrum: Tensor, rows: int, out: Tensor, part: int, add: bool = True) -> None:
        z = torch.fft.ifft(spectrum.reshape(-1, self.count, self.columns), norm="forward")
        z *= self.slice(self.tables[4], part)
        parts, _ = self._workspace(len(z))
        parts[:, : self.count] = z.real
        parts[:, self.count :] = z.imag
        matrix, add = self.tables[2][part, :rows].expand(len(parts), -1, -1), add and part > 0
        if out.is_contiguous() and out.dtype == self.dtype and out.shape[-1] == rows * self.columns:
            whole = out.view(-1, rows, self.columns)
            whole.baddbmm_(matrix, parts) if add else torch.bmm(matrix, parts, out=whole)
        else:
            _put(out, torch.bmm(matrix, parts).view(*out.shape[:-1], -1)[..., : out.shape[-1]], add)


def ring_size(need: int) -> int:
    """The smallest of 2^a, 3 2^b, 5 2^b and 15 2^b (even) that holds *need* points."""
    power = 1 << max(1, (need - 1).bit_length())
    sizes = (power * 5 // 8, power * 3 // 4, power * 15 // 16) if power >= 32 else ()
    return next((size for size in sizes if size >= need), power)


def is_short(length: int) -> bool:
    """Whether `Twisted` serves signals of *length* on the CPU."""
    return length < SPLIT_FROM


@lru_cache(maxsize=8)
def spectra_for(length: int, dtype: torch.dtype, cpu: bool) -> Plain:
    """The fastest transforms for signals of *length*; tables are kept for the last few lengths."""
    if not cpu:
        return Plain(length, dtype)
    return Twisted(length, dtype) if is_short(length) else Split(length, dtype)


def in_large_pages(x: Tensor) -> Tensor:
    """*x*, fresh from the allocator, in pages of 2 MB where Linux has them: one page fault in place of 512."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None and x.device.type == "cpu" and x.nbytes >= 1 << 21:
        start = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (x.data_ptr() + x.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        # Mere advice: where it is refused, small pages serve.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
    return x


@lru_cache(maxsize=1)
def _keep_heaps() -> None:
    """Teach glibc to keep what it has: otherwise every spectrum of a long signal arrives in fresh pages."""
    # One freed block of this size makes it serve smaller ones from its heaps and not hand the heaps' ends back.
    torch.empty(31 << 20, dtype=torch.uint8)
    in_large_pages(torch.empty(HEAP, dtype=torch.uint8))


def _one_thread() -> None:
    torch.get_num_threads()  # a thread's first query copies the process-wide count over whatever was set before
    torch.set_num_threads(1)
    in_large_pages(torch.empty(HEAP, dtype=torch.uint8))  # every thread has a heap of its own


class _Pool:
    """Threads that each run PyTorch single-threaded, so that whole tasks run side by side without barriers."""

    def __init__(self) -> None:
        self.lock, self.size, self.process = threading.Lock(), 0, 0
        self.executor: ThreadPoolExecutor | None = None

    def get(self, size: int) -> ThreadPoolExecutor:
        with self.lock:
            # A forked child has none of its parent's threads.
            if self.executor is None or self.size != size or self.process != os.getpid():
                self.executor = ThreadPoolExecutor(size, "zoo-longconv", initializer=_one_thread)
                self.size, self.process = size, os.getpid()
                started = threading.Barrier(size)
                list(self.executor.map(lambda _: started.wait(), range(size)))
                # The count is per thread once set, but threads born later take the last one set anywhere.
                torch.set_num_threads(size)
            return self.executor


_pool = _Pool()


def run_tasks(task: Callable[[T], None], items: Iterable[T]) -> None:
    """Run *task* on every item, side by side on as many threads as PyTorch may use. No autograd inside."""
    items, threads = list(items), torch.get_num_threads()
    _keep_heaps()
    if threads < 2 or len(items) < 2:
        for item in items:
            task(item)
        return

    inference = torch.is_inference_mode_enabled()

    def bare(item: T) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both modes belong to the thread
            task(item)

    for done in [_pool.get(threads).submit(bare, item) for item in items]:
        done.result()
