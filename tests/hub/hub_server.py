"""A Hub on the loopback interface, for tests: what huggingface_hub 2.4 asks of one, with switches for faults.

Files lie in memory by content. Large files travel by LFS, and by xet where `xet` names a folder: the client's xet
library has a local store of its own, and a `local://` address sends it there. The code is under this project's licence.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".ckpt", ".pt")


@dataclass(frozen=True)
class Stored:
    """One file of a commit."""

    data: bytes
    lfs: bool
    xet: str | None = None
    claimed: str = ""  # sha256 of a file whose bytes only the xet store has

    @property
    def sha256(self) -> str:
        return self.claimed or hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """git's name of what the repository holds: the file, or its LFS pointer."""
        data = self.data
        if self.lfs:
            head = b"version https://git-lfs.github.com/spec/v1"
            data = head + b"\noid sha256:%s\nsize %d\n" % (self.sha256.encode(), len(self.data))
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits, the branches and tags that point to them, and whether strangers see it."""

    private: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Stored], branch: str = "main") -> str:
        parent = self.branches.get(branch)
        listed = sorted((name, stored.oid) for name, stored in files.items())
        sha = hashlib.sha1(json.dumps([listed, parent, len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.parents[sha], self.branches[branch] = files, parent, sha
        return sha

    def find(self, revision: str) -> str | None:
        known = revision if revision in self.commits else None
        return self.branches.get(revision) or self.tags.get(revision) or known


class Hub:
    """The state of the server, and its faults.

    Attributes:
        fault: called with the request's method and path; a status code it returns is answered instead.
        spoil: called with a file's path and bytes; what it returns is sent in their place.
        cut: bytes of an LFS file after which the connection breaks.
        requests: (method, path) of every request.
    """

    def __init__(self, xet: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.uploaded: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.xet = xet
        self.address = ""
        self.reset()

    def reset(self) -> None:
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.spoil: Callable[[str, bytes], bytes] = lambda path, data: data
        self.cut: int | None = None
        self.before_commit: Callable[[], None] = lambda: None
        self.requests.clear()

    def put(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """A commit of exactly *files* on `main`; makes the repository where there is none."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.commit({path: Stored(data, path.endswith(LARGE)) for path, data in files.items()})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        raw = value if isinstance(value, bytes) else json.dumps({} if value is None else value).encode()
        self.send_response(status)
        given = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
        for key, text in given.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def payload(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        out = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            out += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return out

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        body = self.payload() if self.command in ("POST", "PUT", "DELETE") else b""
        self.hub.requests.append((self.command, url.path))
        status = self.hub.fault(self.command, url.path)
        if status is not None:
            return self.answer(status, {"error": f"status {status} asked for"})
        return self.route(url.path, parse_qs(url.query), body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        hub = self.hub
        if path == "/api/whoami-v2":
            token = {"type": "access_token", "accessToken": {"role": "write"}}
            return self.answer(200, {"type": "user", "name": "me", "fullname": "me", "orgs": [], "auth": token})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            address = {"url": f"{hub.address}/{name}", "name": name, "id": "0"}
            if name in hub.repos:
                return self.answer(409, {"error": "You already created this model repo", **address})
            hub.put(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private")
            return self.answer(200, address)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/models":
            return self.answer(200, self.search(query))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if path == "/lfs/verify":
            return self.answer(200 if json.loads(body)["oid"] in hub.uploaded else 404)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.answer(422, {"error": "sha256 mismatch"})
            hub.uploaded[match[1]] = body
            return self.answer(200, headers={"ETag": match[1]})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*(unquote(part) for part in match.groups()))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path)
        if not match:
            return self.answer(404, {"error": f"no route {path}"})
        repo = hub.repos.get(unquote(match[1]))
        if repo is None or (repo.private and not self.headers.get("Authorization")):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        words = [unquote(word) for word in (match[2] or "revision/main").split("/")]
        action = getattr(self, "do_" + words[0].replace("-", "_"), None)
        if action is None:
            return self.answer(404, {"error": f"no route {path}"})
        return action(unquote(match[1]), repo, words[1:], body)

    def search(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        found = [self.info(name, repo, repo.branches["main"]) for name, repo in self.hub.repos.items()]
        found = [
            info
            for info in found
            if all(tag in info["tags"] for tag in query.get("filter", []))
            and all(text.lower() in info["id"].lower() for text in query.get("search", []))
            and all(info["author"] == author for author in query.get("author", []))
            and not info["private"]
        ]
        return found[: int(query.get("limit", ["1000"])[0])]

    def info(self, name: str, repo: Repo, sha: str) -> dict[str, Any]:
        files = repo.commits[sha]
        header = re.match(rb"---\n(.*?)\n---", files["README.md"].data, re.S) if "README.md" in files else None
        card = (yaml.safe_load(header[1]) if header else None) or {}
        tags = [*(card.get("tags") or []), *(card[key] for key in ("library_name", "pipeline_tag") if key in card)]
        tags += [f"license:{card['license']}"] if "license" in card else []
        when = "2026-01-01T00:00:00.000Z"
        return {
            "_id": "0", "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha, "private": repo.private,
            "gated": False, "disabled": False, "downloads": 7, "likes": 0, "tags": tags, "createdAt": when,
            "lastModified": when, "cardData": json.loads(json.dumps(card, default=str)),
            "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"),
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }  # fmt: skip

    def lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            entry = {"oid": item["oid"], "size": item["size"], "authenticated": True}
            if item["oid"] not in self.hub.uploaded:
                places = {"upload": f"{self.hub.address}/lfs/{item['oid']}", "verify": f"{self.hub.address}/lfs/verify"}
                entry["actions"] = {name: {"href": href, "header": {}} for name, href in places.items()}
            objects.append(entry)
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer(200, {"transfer": "basic", "objects": objects}, kind)

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        sha = repo.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        stored = repo.commits[sha].get(path)
        if stored is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        size = len(stored.data)
        head = {
            "X-Repo-Commit": sha, "ETag": f'"{stored.sha256 if stored.lfs else stored.oid}"',
            "Accept-Ranges": "bytes", "Content-Length": str(size), "Content-Type": "application/octet-stream",
        }  # fmt: skip
        if stored.lfs:
            head |= {"X-Linked-Size": str(size), "X-Linked-Etag": f'"{stored.sha256}"'}
        if stored.xet:
            route = f"{self.hub.address}/api/models/{name}/xet-read-token/{sha}"
            head |= {"X-Xet-Hash": stored.xet, "X-Xet-Refresh-Route": route}
        if self.command == "HEAD":
            return self.answer(200, b"", head)
        data = self.hub.spoil(path, stored.data)
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), int(asked[2] or size - 1)
            data, status = data[start : end + 1], 206
            head |= {"Content-Range": f"bytes {start}-{end}/{size}", "Content-Length": str(len(data))}
        if self.hub.cut is not None and stored.lfs:
            data, self.close_connection = data[: self.hub.cut], True
        return self.answer(status, data, head)

    def do_xet_write_token(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        if self.hub.xet is None:
            return self.refuse(404, "", "xet is not enabled here")
        place, until = f"local://{self.hub.xet}", int(time.time()) + 3600
        head = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(until)}
        return self.answer(200, {"casUrl": place, "accessToken": "t", "exp": until}, head)

    do_xet_read_token = do_xet_write_token

    def do_revision(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        sha = repo.find("/".join(words))
        if sha is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {words[0]}")
        return self.answer(200, self.info(name, repo, sha))

    def do_preupload(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        files = repo.commits[repo.find(words[0]) or ""]
        answers = []
        for item in json.loads(body)["files"]:
            old = files.get(item["path"])
            mode = "lfs" if item["path"].endswith(LARGE) else "regular"
            oid = (old.sha256 if old.lfs else old.oid) if old else None
            answers.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer(200, {"files": answers})

    def do_commit(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        self.hub.before_commit()
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        head, files = repo.branches[words[0]], dict(repo.commits[repo.branches[words[0]]])
        if lines[0]["value"].get("parentCommit") not in (None, head):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                stored = self.uploaded_file(value["oid"])
                if stored is None:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = stored
            else:
                files.pop(value["path"], None)
        sha = repo.commit(files, words[0])
        address = f"{self.hub.address}/{name}/commit/{sha}"
        return self.answer(200, {"success": True, "commitOid": sha, "commitUrl": address, "hookOutput": ""})

    def uploaded_file(self, oid: str) -> Stored | None:
        """An uploaded object, by LFS or into the xet store."""
        if oid in self.hub.uploaded:
            return Stored(self.hub.uploaded[oid], True)
        for known, size, xet in xet_files(self.hub.xet) if self.hub.xet else ():
            if known == oid:
                return Stored(bytes(size), True, xet, oid)
        return None

    def do_tree(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        sha = repo.find(words[0])
        if sha is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        entries = []
        for path, stored in sorted(repo.commits[sha].items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(stored.data), "oid": stored.oid}
            if stored.lfs:
                entry["lfs"] = {"oid": stored.sha256, "size": len(stored.data), "pointerSize": 130}
            if stored.xet:
                entry["xetHash"] = stored.xet
            entries.append(entry)
        return self.answer(200, entries)

    def do_commits(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        sha, found = repo.find(words[0]), []
        while sha:
            when = "2026-01-01T00:00:00.000Z"
            found.append({"id": sha, "title": "commit", "message": "", "authors": [{"user": "me"}], "date": when})
            sha = repo.parents[sha]
        return self.answer(200, found)

    def do_refs(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        listed = {
            kind: [{"name": key, "ref": f"refs/{place}/{key}", "targetCommit": sha} for key, sha in known.items()]
            for kind, (place, known) in kinds.items()
        }
        return self.answer(200, {**listed, "converts": []})

    def do_tag(self, name: str, repo: Repo, words: list[str], body: bytes) -> None:
        tag, sha = json.loads(body)["tag"], repo.find("/".join(words))
        if tag in repo.tags:
            return self.answer(409, {"error": "Tag already exists"})
        if sha is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        repo.tags[tag] = sha
        return self.answer(200)


def xet_files(store: Path) -> Iterator[tuple[str, int, str]]:
    """(sha256, size, xet hash) of each file in a local xet store, read from its shard files."""
    words = lambda data: "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
    for shard in store.glob("xet/xorbs/shards/*.mdb"):
        data, at = shard.read_bytes(), 48
        while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
            xet = words(data[at : at + 32])
            flags, count = struct.unpack("<II", data[at + 32 : at + 40])
            at += 48
            size = sum(struct.unpack("<I", data[at + 48 * i + 36 : at + 48 * i + 40])[0] for i in range(count))
            at += 48 * count * (2 if flags & (1 << 31) else 1)
            if flags & (1 << 30):
                yield words(data[at : at + 32]), size, xet
                at += 48


@contextmanager
def running(xet: Path | None = None) -> Iterator[Hub]:
    """A Hub that answers at `hub.address` until the block ends."""
    hub = Hub(xet)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
