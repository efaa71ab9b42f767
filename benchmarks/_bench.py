"""What the benchmark scripts share: timing, peak memory in a process of its own, result files, tables."""

from __future__ import annotations

import csv
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def timed(
    fn: Callable[[], Any], *, budget: float = 2.0, least: int = 3, most: int = 50, warm: bool = False
) -> tuple[float, float]:
    """Milliseconds of wall clock and of processor time of one call: the least of each over repeats after a warm-up.

    Args:
        fn: the work; its result is dropped.
        budget: seconds to go on repeating, unless *least* or *most* repeats decide.
        warm: the work has run before in this process.
    """
    if not warm:
        fn()
    wall, cpu, began, count = float("inf"), float("inf"), time.perf_counter(), 0
    while count < least or (count < most and time.perf_counter() - began < budget):
        t, c = time.perf_counter(), time.process_time()
        fn()
        wall, cpu = min(wall, time.perf_counter() - t), min(cpu, time.process_time() - c)
        count += 1
    return wall * 1e3, cpu * 1e3


def interleaved(fns: dict[str, Callable[[], Any]], **kwargs: Any) -> dict[str, tuple[float, float]]:
    """`timed` of several rivals in two rounds, so that a passing load on the machine hits all of them."""
    rounds = [{name: timed(fn, **kwargs) for name, fn in fns.items()} for _ in range(2)]
    return {name: tuple(min(r[name][i] for r in rounds) for i in range(2)) for name in fns}


def resident() -> int:
    """Bytes of physical memory this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """`with Peak() as peak: ...` then `peak.extra`: bytes above the start, sampled every half millisecond."""

    def __enter__(self) -> Peak:
        self.start = self.top = resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(5e-4):
            self.top = max(self.top, resident())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.top = max(self.top, resident())

    @property
    def extra(self) -> int:
        return self.top - self.start


def child(script: str, *args: object, threads: int) -> dict[str, Any]:
    """Run `script args` as a process of its own with that many threads; its last line of output is the JSON answer."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, script, *map(str, args)], env=env, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where and under what load a result was taken."""
    import torch

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peak_rss() -> int:
    """Bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]], columns: list[str] | None = None) -> str:
    """Rows as an aligned text table; floats with three significant digits."""
    columns = columns or list(rows[0])

    def show(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    cells = [columns, *([show(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Write `results/NAME.json` (rows and the machine) and `results/NAME.csv` (rows)."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **about, "rows": rows}, indent=1) + "\n")
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path
