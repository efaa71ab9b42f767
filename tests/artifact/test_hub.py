"""Publishing and fetching over HTTP, against a Hub server on the loopback interface."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import zoo
from zoo import tokenizers
from zoo.errors import ZooError
from zoo.models.hyenadna import HyenaDNA, HyenaDNAConfig

Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def endpoint(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a running server."""
    script = shared / "tools" / "hub_server.py"
    if not script.is_file():
        pytest.skip("no Hub server to test against")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # the threshold sends model.safetensors down the large-file path
    environment = {**os.environ, "HUB_ROOT": str(tmp_path_factory.mktemp("hub")), "HUB_LFS_MIN": "4096"}
    process = subprocess.Popen([sys.executable, str(script), str(port)], env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/api/whoami-v2", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def python(endpoint: str, tmp_path: Path) -> Python:
    """Run code in a process of its own, since huggingface_hub reads its environment once."""

    def run(code: str, home: str = "home", **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / home), "HF_TOKEN": "hf_test"}
        environment |= {
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **changes,
        }
        environment.pop("HF_HUB_CACHE", None)
        whole = f"import zoo\nfrom zoo.errors import ZooError\n{code}"
        return subprocess.run(
            [sys.executable, "-c", whole], env=environment, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = HyenaDNA(HyenaDNAConfig(d_model=16, n_layer=1, max_len=40))
    return zoo.save(model, tmp_path / "art", tokenizer=tokenizers.from_catalogue("dna-char"), task_kind="lm")


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a process printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def caught(*calls: str) -> str:
    """Code that prints the complaint of each call."""
    return "\n".join(f"try:\n    {call}\nexcept ZooError as error:\n    print(error)" for call in calls)


FETCH = """
a = zoo.load('me/first')
print(a.model.config.d_model, a.tokenizer.name, all(c.passed for c in zoo.verify(a.path)))
"""


def test_push_and_load_by_id(python: Python, saved: Path) -> None:
    count = "print(len(HfApi().list_repo_commits('me/first')))"
    card = f"open({str(saved / 'README.md')!r}, 'w').write('---\\nlibrary_name: seqzoo\\n---\\nanother card\\n')"
    push = f"print(zoo.push({str(saved)!r}, 'me/first'))"
    code = "\n".join(["from huggingface_hub import HfApi", push, count, card, push, count, FETCH])
    url, first, _, second, *fetched = lines(python(code))
    assert "me/first/commit/" in url
    assert int(second) == int(first) + 1, "a push is one commit"
    assert fetched == ["16 char True"]
    assert lines(python(FETCH, HF_HUB_OFFLINE="1")) == ["16 char True"], "the cache is enough"


def test_what_the_hub_refuses_is_one_sentence(python: Python, saved: Path) -> None:
    make = (
        "from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('me/other')\n"
        "api.upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id='me/other')\n"
    )
    damaged = saved.with_name("damaged")
    shutil.copytree(saved, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    calls = ["zoo.load('me/nothing')", "zoo.load('me/other')", f"zoo.push({str(damaged)!r}, 'me/third')"]
    nothing, other, third = lines(python(make + caught(*calls)))
    assert "no such repository or revision" in nothing
    assert "is no artifact: it has no files.json" in other
    assert "is not what was saved" in third


def test_no_network_is_one_sentence(python: Python, saved: Path) -> None:
    calls = ["zoo.load('me/nothing')", f"zoo.push({str(saved)!r}, 'me/third')"]
    load, push = lines(python(caught(*calls), HF_ENDPOINT="http://127.0.0.1:9"))
    assert "cannot get 'me/nothing' from the Hub" in load
    assert "hf download me/nothing" in load
    assert "cannot publish" in push


def test_offline_nothing_is_tried(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ZooError, match="HF_HUB_OFFLINE is set"):
        zoo.load("me/nothing")
    with pytest.raises(ZooError, match="nothing can be published"):
        zoo.push(saved, "me/third")
