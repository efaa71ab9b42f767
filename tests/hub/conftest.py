"""A Hub on the loopback interface, an empty cache, and a client that waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zoo
from tests.hub.hub_server import Hub, running
from zoo import tokenizers
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig


@pytest.fixture(scope="session")
def server() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The running Hub, without faults and empty, which this process' client talks to."""
    server.reset()
    server.repos.clear()
    connect(server, tmp_path, monkeypatch)
    return server


def connect(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An artifact."""
    torch.manual_seed(0)
    model = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=40))
    return zoo.save(model, tmp_path / "art", tokenizer=tokenizers.from_catalogue("dna-char"), task_kind="lm")
