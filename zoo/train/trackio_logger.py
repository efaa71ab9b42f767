"""Trackio as a logger of Lightning's kind: a local database of runs, shown by `trackio show`."""

from __future__ import annotations

import contextlib
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

PROJECT = "seqzoo"


class TrackioLogger(Logger):
    """Metrics by step into the database of *folder* (`TRACKIO_DIR`, where that is set, goes before it).

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(self, run: str, folder: Path) -> None:
        super().__init__()
        os.environ.setdefault("TRACKIO_DIR", str(folder))  # read when trackio is imported
        import trackio

        self._trackio, self._run, self._open = trackio, run, False

    @property
    def name(self) -> str:
        return PROJECT

    @property
    def version(self) -> str:
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The recipe lies in the run's folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self._open:
            with contextlib.redirect_stdout(io.StringIO()):  # it advertises its dashboard
                self._trackio.init(project=PROJECT, name=self._run, resume="allow", embed=False)
            self._open = True
        self._trackio.log(dict(metrics), step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._open:
            with contextlib.redirect_stdout(io.StringIO()):
                self._trackio.finish()
            self._open = False
