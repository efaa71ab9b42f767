"""The results in the tutorial on pictures are those of the result file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_tutorial_says_what_was_measured(root: Path) -> None:
    done = subprocess.run([sys.executable, str(root / "benchmarks" / "image_page.py"), "--check"])
    assert done.returncode == 0, "run python benchmarks/image_page.py"
