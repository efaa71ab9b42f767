"""Pushing and pulling over HTTP: what arrives is what was announced, and what goes wrong is one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.hub.conftest import connect
from tests.hub.hub_server import Hub, running
from zoo.errors import ZooError
from zoo.hub import cache, client


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if path.is_file()}


def published(hub: Hub, saved: Path, name: str = "me/first") -> str:
    return hub.put(name, contents(saved))


def test_a_push_is_one_commit_on_its_parent_with_a_tag(hub: Hub, saved: Path) -> None:
    url = client.push(saved, "me/first", tag="v1", private=True)
    repo = hub.repos["me/first"]
    assert url == f"{hub.address}/me/first/commit/{repo.branches['main']}"
    assert (len(repo.commits), repo.private, repo.tags) == (2, True, {"v1": repo.branches["main"]})
    stored = repo.commits[repo.branches["main"]]
    assert {name: item.data for name, item in stored.items() if name != ".gitattributes"} == contents(saved)
    assert stored["model.safetensors"].lfs
    assert not stored["config.json"].lfs


def test_load_by_branch_tag_and_commit(hub: Hub, saved: Path) -> None:
    client.push(saved, "me/first", tag="v1")
    first = hub.repos["me/first"].branches["main"]
    files = contents(saved)
    files["README.md"] = b"---\nlibrary_name: seqzoo\n---\nsecond\n"
    hub.put("me/first", files)
    wanted = zoo.load(saved).model.state_dict()
    for ref, text in (("me/first", "second"), ("me/first@v1", "HyenaDNA"), (f"me/first@{first}", "HyenaDNA")):
        found = zoo.load(ref)
        assert all(torch.equal(found.model.state_dict()[name], value) for name, value in wanted.items())
        assert found.tokenizer.name == "char"
        assert text in (found.path / "README.md").read_text()


def test_the_cache_is_enough(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub, saved)
    zoo.load("me/first")
    count = len(hub.requests)
    zoo.load("me/first")
    zoo.load("me/first", offline=True)
    assert len(hub.requests) == count
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    zoo.load("me/first")
    with pytest.raises(ZooError, match="cannot be updated offline; the cache holds commit"):
        client.pull("me/first", update=True)


def test_update_asks_where_the_branch_stands(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    first = client.pull("me/first")
    hub.put("me/first", {**contents(saved), "README.md": b"second"})
    assert client.pull("me/first") == first
    second = client.pull("me/first", update=True)
    assert (second / "README.md").read_bytes() == b"second"
    assert client.pull("me/first") == second


def test_only_data_is_fetched(hub: Hub, saved: Path) -> None:
    more = {
        "modeling.py": b"raise SystemExit",
        "run.sh": b"exit 1",
        "setup.cfg": b"",
        "x.pkl": b"",
        "a/b.safetensors": b"",
    }
    hub.put("me/first", {**contents(saved), **more, "pytorch_model.bin": b"pickle", "optimizer.pt": b""})
    place = client.pull("me/first", allow_pickle=True)
    assert {path.name for path in place.iterdir()} == set(contents(saved))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_flipped_byte_is_found_and_the_next_pull_is_whole(hub: Hub, saved: Path, name: str) -> None:
    published(hub, saved)
    flip = lambda data: data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    hub.spoil = lambda path, data: flip(data) if path == name else data
    with pytest.raises(ZooError, match=f"{name} of 'me/first' arrived damaged .* pull again"):
        zoo.load("me/first")
    with pytest.raises(ZooError, match="is not in the Hub cache"):
        zoo.load("me/first", offline=True)
    hub.reset()
    assert all(check.passed for check in zoo.verify(zoo.load("me/first").path))


def test_a_damaged_update_leaves_the_older_revision(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    first = client.pull("me/first")
    hub.put("me/first", {**contents(saved), "README.md": b"a longer and newer card"})
    hub.spoil = lambda path, data: data.swapcase() if path == "README.md" else data
    with pytest.raises(ZooError, match=r"README\.md .* arrived damaged"):
        client.pull("me/first", update=True)
    assert client.pull("me/first", local=True) == first
    hub.fault = lambda method, path: 500
    with pytest.raises(ZooError, match=f"out of order .status 500.*the cache keeps commit {first.name[:12]}"):
        client.pull("me/first", update=True)


def test_a_truncated_file(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    hub.cut = 100
    with pytest.raises(ZooError, match=r"cannot get 'me/first' from the Hub \(the connection broke off\)"):
        zoo.load("me/first")
    hub.reset()
    zoo.load("me/first")


def test_a_listed_file_that_is_missing(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    hub.fault = lambda method, path: 404 if path.endswith("parity.safetensors") else None
    with pytest.raises(ZooError, match="cannot get 'me/first'"):
        zoo.load("me/first")
    hub.put("me/other", {name: data for name, data in contents(saved).items() if name != "parity.safetensors"})
    with pytest.raises(ZooError, match=r"incomplete: parity\.safetensors is missing"):
        zoo.load("me/other")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_file_that_changed_in_the_cache_is_fetched_again(hub: Hub, saved: Path, damage: str) -> None:
    published(hub, saved)
    place = client.pull("me/first")
    file = place / "model.safetensors"
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        changed = data[:-1] + bytes([data[-1] ^ 1]) if damage == "flip" else data[:-1]
        file.resolve().write_bytes(changed)
        os.utime(file.resolve(), (1, 1))
    with pytest.raises(ZooError, match=r"in the Hub cache is damaged: model\.safetensors"):
        client.pull("me/first", local=True)
    assert (client.pull("me/first") / "model.safetensors").read_bytes() == data


def test_a_snapshot_of_another_program_is_checked_by_its_blobs(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    place = client.pull("me/first")
    for record in (cache.repo_folder("me/first") / "zoo").iterdir():
        record.unlink()
    assert client.pull("me/first", local=True) == place
    file = (place / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    with pytest.raises(ZooError, match="is damaged"):
        client.pull("me/first", local=True)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "hf auth login"), (403, "no permission"), (404, "no such repository or revision"),
     (429, "too many requests"), (500, "out of order"), (503, "out of order")],
)  # fmt: skip
def test_each_refusal_is_one_sentence(hub: Hub, saved: Path, status: int, said: str) -> None:
    published(hub, saved)
    hub.fault = lambda method, path: status
    for call in (
        lambda: zoo.load("me/first"),
        lambda: client.push(saved, "me/first"),
        lambda: client.search("first"),
    ):
        with pytest.raises(ZooError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    hub.reset()
    zoo.load("me/first")


@pytest.mark.parametrize("status", [401, 403, 429, 500])
def test_a_refused_download_leaves_the_cache_usable(hub: Hub, saved: Path, status: int) -> None:
    published(hub, saved)
    hub.fault = lambda method, path: status if "/resolve/" in path and path.endswith("model.safetensors") else None
    with pytest.raises(ZooError, match="cannot get 'me/first'"):
        zoo.load("me/first")
    hub.reset()
    zoo.load("me/first")


def test_what_does_not_exist(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    for ref in ("me/nothing", "me/first@v9"):
        with pytest.raises(ZooError, match="no such repository or revision"):
            zoo.load(ref)


def test_a_private_repository_needs_a_token(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("me/secret", contents(saved), private=True)
    zoo.load("me/secret")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HUB_CACHE", str(saved.parent / "other"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(saved.parent / "no token"))
    with pytest.raises(ZooError, match="no such repository"):
        zoo.load("me/secret")


def test_no_network(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ZooError, match=r"cannot get 'me/first' from the Hub \(no connection\): where there is"):
        zoo.load("me/first")
    with pytest.raises(ZooError, match=r"cannot publish .*no connection"):
        client.push(saved, "me/first")
    with pytest.raises(ZooError, match=r"cannot search the Hub \(no connection\)"):
        client.search()


def test_a_change_in_between_is_not_overwritten(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    (saved / "README.md").write_text("---\nlibrary_name: seqzoo\n---\nmine\n")
    hub.before_commit = lambda: hub.put("me/first", {"README.md": b"theirs"}) and None
    with pytest.raises(ZooError, match="changed in between"):
        client.push(saved, "me/first")
    repo = hub.repos["me/first"]
    assert repo.commits[repo.branches["main"]]["README.md"].data == b"theirs"
    hub.reset()
    with pytest.raises(ZooError, match="changed in between"):
        client.push(saved, "me/first", parent=next(iter(repo.commits)))
    client.push(saved, "me/first", parent=repo.branches["main"])


def test_a_tag_that_exists_is_said_after_the_commit(hub: Hub, saved: Path) -> None:
    client.push(saved, "me/first", tag="v1")
    (saved / "README.md").write_text("---\nlibrary_name: seqzoo\n---\nmine\n")
    with pytest.raises(ZooError, match=r"is published \(.*/commit/.*but not tagged 'v1' \(it exists already\)"):
        client.push(saved, "me/first", tag="v1")


def test_a_full_disk_is_said_before_the_download(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(hub, saved)
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 10})())
    with pytest.raises(ZooError, match="the disk of the Hub cache has 10 bytes left"):
        client.pull("me/first")
    assert not any("/resolve/" in path for _, path in hub.requests)


def test_search_finds_what_this_library_published(hub: Hub, saved: Path) -> None:
    client.push(saved, "me/first")
    client.push(saved, "me/second")
    hub.put("me/first-of-others", {"README.md": b"---\nlibrary_name: other\n---\n"})
    assert [row["id"] for row in client.search("first")] == ["me/first"]
    assert {row["id"] for row in client.search()} == {"me/first", "me/second"}
    row = client.search("second")[0]
    assert row["updated"] == "2026-01-01"
    assert row["downloads"] == 7


def test_large_files_travel_by_xet(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    with running(xet=tmp_path / "store") as server:
        connect(server, tmp_path, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
        client.push(saved, "me/first")
        repo = server.repos["me/first"]
        assert repo.commits[repo.branches["main"]]["model.safetensors"].xet
        assert not server.uploaded
        place = client.pull("me/first")
        assert contents(place) == contents(saved)
        asked = [path for method, path in server.requests if method == "GET" and path.endswith(".safetensors")]
        assert not asked, "their bytes came from the store"


def test_a_hub_without_xet_is_served_by_lfs(hub: Hub, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hf_xet")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    client.push(saved, "me/first")
    assert any("/xet-write-token/" in path for _, path in hub.requests)
    assert len(hub.uploaded) >= 2
    assert constants.HF_HUB_DISABLE_XET is False
    zoo.load("me/first")


def test_reachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.reachable() == ""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "refused" in client.reachable()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert client.reachable() == "HF_HUB_OFFLINE is set"


def test_lines_for_a_log(hub: Hub, saved: Path) -> None:
    published(hub, saved)
    lines: list[Any] = []
    client.pull("me/first", report=lines.append)
    assert len(lines) == len(contents(saved))
    assert any(line.startswith("model.safetensors  ") and line.endswith(" ok") and "sha256 " in line for line in lines)
