"""Transforms behind the long convolution: real signals to half spectra and back, on a ring that holds all lags.

`Plain` is one zero-padded `rfft` of the ring. `Split` serves long signals on the CPU. It evaluates the signal at the
odd half frequencies of a ring of n = rows * columns points (in effect modulo x^n + 1), n >= 2L:

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
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SPLIT_FROM = 1 << 13  # below this length one padded transform of the whole block is as fast
HEAP = 8 << 20  # bytes of a thread's heap in large pages; more would keep memory that the spectra do not fill
_local = threading.local()  # each thread's workspace: using the same memory again keeps it in the cache


class Plain:
    """Half spectra [.., n / 2 + 1] of the cyclic ring of n >= 2L - 1 points; any device.

    Args:
        length: L of the signals.
        dtype: float32 or float64.
    """

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype, self.ring = length, dtype, ring_size(max(2 * length - 1, 2))
        self.shape: tuple[int, ...] = (self.ring // 2 + 1,)

    def spectrum(self, x: Tensor, conj: bool = False) -> Tensor:
        """Spectrum of x [.., L], or its complex conjugate (the spectrum of the signal in reversed time)."""
        spectrum = torch.fft.rfft(x, n=self.ring)
        return spectrum.conj_physical_() if conj else spectrum

    def filter(self, k: Tensor, skip: Tensor | None, conj: bool = False) -> Tensor:
        """Spectrum of the filter k [.., L or 2L - 1] with *skip* [..] added at lag 0."""
        spectrum = self.spectrum(k if k.shape[-1] == self.length else self._wrap(k, 1), conj)
        return spectrum if skip is None else spectrum.add_(skip[:, None])

    def signal(self, spectrum: Tensor, out: Tensor) -> None:
        """Write the signal [.., L] of a spectrum into *out*; the spectrum may be overwritten."""
        out.copy_(torch.fft.irfft(spectrum, n=self.ring)[..., : self.length])

    def taps(self, spectrum: Tensor, out: Tensor) -> None:
        """Write the filter [.., L or 2L - 1] of a spectrum into *out*."""
        if out.shape[-1] == self.length:
            self.signal(spectrum, out)
        else:
            self._unwrap(torch.fft.irfft(spectrum, n=self.ring), 1, out)

    def _wrap(self, k: Tensor, sign: int) -> Tensor:
        ring = k.new_zeros(*k.shape[:-1], self.ring)
        ring[..., : self.length] = k[..., self.length - 1 :]
        torch.mul(k[..., : self.length - 1], sign, out=ring[..., self.ring - self.length + 1 :])
        return ring

    def _unwrap(self, ring: Tensor, sign: int, out: Tensor) -> None:
        out[..., self.length - 1 :] = ring[..., : self.length]
        torch.mul(ring[..., self.ring - self.length + 1 :], sign, out=ring[..., self.ring - self.length + 1 :])
        out[..., : self.length - 1] = ring[..., self.ring - self.length + 1 :]


class Split(Plain):
    """Half spectra [.., rows / 2, columns] by a matrix product and shorter transforms; see the head of this file."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        self.length, self.dtype = length, dtype
        self.rows = 16 if length <= 1 << 17 else 32
        self.columns = ring_size(-(-2 * length // self.rows))
        self.ring, self.half = self.rows * self.columns, self.rows // 2
        self.shape = (self.half, self.columns)
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
        frequency = torch.arange(self.half, dtype=torch.float64) + 0.5
        angle = torch.outer(frequency, torch.arange(self.rows, dtype=torch.float64)) * (2 * math.pi / self.rows)
        self.analysis = torch.cat([angle.cos(), -angle.sin()]).to(dtype)  # [rows, rows]: real parts, imaginary parts
        self.conjugate = torch.cat([angle.cos(), angle.sin()]).to(dtype)
        self.synthesis = (self.analysis.double() * (2 / self.ring)).t().to(dtype).contiguous()
        angle = torch.outer(frequency, torch.arange(self.columns, dtype=torch.float64)) * (-2 * math.pi / self.ring)
        self.twiddle = torch.polar(torch.ones_like(angle), angle).to(complex_dtype)  # [rows / 2, columns]
        self.untwiddle = self.twiddle.conj().resolve_conj().contiguous()

    def spectrum(self, x: Tensor, conj: bool = False, skip: Tensor | None = None) -> Tensor:
        full = self.ring if x.shape[-1] > self.length else self.ring // 2
        if x.shape[-1] < full:
            x = torch.nn.functional.pad(x, (0, full - x.shape[-1]))
        lead, x = x.shape[:-1], x.reshape(-1, full // self.columns, self.columns)
        matrix = (self.conjugate if conj else self.analysis)[:, : x.shape[1]]
        parts, z = self._workspace(len(x))
        torch.bmm(matrix.expand(len(x), -1, -1), x, out=parts)  # [N, rows, columns]
        torch.complex(parts[:, : self.half], parts[:, self.half :], out=z)
        if skip is not None:  # before the twiddle's column 0, which is 1: an impulse at lag 0
            z.view(*lead, self.half, self.columns)[..., 0] += skip[:, None]
        z *= self.untwiddle if conj else self.twiddle
        z = torch.fft.ifft(z, norm="forward") if conj else torch.fft.fft(z)
        return z.view(*lead, self.half, self.columns)

    def filter(self, k: Tensor, skip: Tensor | None, conj: bool = False) -> Tensor:
        return self.spectrum(k if k.shape[-1] == self.length else self._wrap(k, -1), conj, skip)

    def signal(self, spectrum: Tensor, out: Tensor) -> None:
        self._synthesize(spectrum, self.half, out)

    def taps(self, spectrum: Tensor, out: Tensor) -> None:
        if out.shape[-1] == self.length:
            self.signal(spectrum, out)
        else:
            ring = out.new_empty(*out.shape[:-1], self.ring, dtype=self.dtype)
            self._synthesize(spectrum, self.rows, ring)
            self._unwrap(ring, -1, out)

    def _workspace(self, count: int) -> tuple[Tensor, Tensor]:
        """Room of this thread for *count* signals: parts [count, rows, columns] and complex [count, half, columns]."""
        need = count * self.ring
        room = getattr(_local, "room", None)
        if room is None or room.dtype != self.dtype or len(room) < 2 * need:
            with torch.inference_mode(False):  # room made for inference could not be written to afterwards
                _local.room = room = torch.empty(2 * need, dtype=self.dtype)
        parts, z = room[:need], room[need : 2 * need].view(-1, 2)
        return parts.view(count, self.rows, self.columns), torch.view_as_complex(z).view(count, self.half, self.columns)

    def _synthesize(self, spectrum: Tensor, rows: int, out: Tensor) -> None:
        z = torch.fft.ifft(spectrum.view(-1, self.half, self.columns), norm="forward")
        z *= self.untwiddle
        parts, _ = self._workspace(len(z))
        parts[:, : self.half] = z.real
        parts[:, self.half :] = z.imag
        matrix = self.synthesis[:rows].expand(len(parts), -1, -1)
        if out.is_contiguous() and out.dtype == self.dtype and out.shape[-1] == rows * self.columns:
            torch.bmm(matrix, parts, out=out.view(-1, rows, self.columns))
        else:
            out.copy_(torch.bmm(matrix, parts).view(*out.shape[:-1], -1)[..., : out.shape[-1]])


def ring_size(need: int) -> int:
    """The smallest of 2^a, 3 2^b, 5 2^b and 15 2^b (even) that holds *need* points."""
    power = 1 << max(1, (need - 1).bit_length())
    sizes = (power * 5 // 8, power * 3 // 4, power * 15 // 16) if power >= 32 else ()
    return next((size for size in sizes if size >= need), power)


def is_short(length: int) -> bool:
    """Whether `Plain` serves signals of *length* on the CPU."""
    return length < SPLIT_FROM


@lru_cache(maxsize=8)
def spectra_for(length: int, dtype: torch.dtype, cpu: bool) -> Plain:
    """The fastest transforms for signals of *length*; tables are kept for the last few lengths."""
    return Split(length, dtype) if cpu and not is_short(length) else Plain(length, dtype)


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
