"""The only file that touches the network: repositories of the Hugging Face Hub, down and up, and looking for them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.hub import cache, names
from zoo.hub.answers import reason

LIBRARY = "seqzoo"  # the tag that published artifacts carry


def pull(
    repo: str,
    revision: str = "main",
    *,
    what: str | None = None,
    file: str = "",
    allow_pickle: bool = False,
    update: bool = False,
    local: bool = False,
    report: Callable[[str], None] | None = None,
) -> Path:
    """The folder of *repo* at *revision*: from the cache when it is there and whole, else downloaded into it.

    Only data is fetched: text and safetensors, or with *allow_pickle* pickled weights where there are no others (they
    are opened by the restricted loader). Each file is hashed against what the Hub announces before it counts. A pull
    that fails leaves what the cache had.

    Args:
        repo: `user/name`.
        revision: branch, tag or commit.
        what: how error messages call it.
        file: the weights that are wanted, of a repository that holds several models.
        allow_pickle: fetch pickled weights.
        update: ask the Hub where a branch stands, even if it is in the cache.
        local: stay off the network.
        report: called with one line for each file, in place of progress bars.

    Raises:
        ZooError: not in the cache and not to be had: offline, no such repository or revision, no access, a file that
            arrived damaged, weights that are only pickled.
    """
    ref = names.parse_ref(f"{repo}@{revision}")
    named = what or f"'{ref}'"
    found = _in_cache(ref, named, file, local or offline())
    if found is not None and not update:
        return found
    command = f"hf download {repo}" + ("" if revision == "main" else f" --revision {revision}")
    advice = f"where there is a network, run `{command}` and copy the folder, or set HF_HOME to a cache that holds it"
    if local or offline():
        if found is not None:
            raise ZooError(f"{named} cannot be updated offline; the cache holds commit {found.name[:12]}")
        why = "--offline was asked for" if local else "HF_HUB_OFFLINE is set"
        raise ZooError(f"{named} is not in the Hub cache of this machine and {why}: {advice}")
    try:
        return _download(ref, named, file, allow_pickle, report)
    except ZooError:
        raise
    except Exception as error:
        kept = f"; the cache keeps commit {found.name[:12]}" if found is not None else ""
        raise ZooError(f"cannot get {named} from the Hub ({reason(error)}){kept}: {advice}") from error


def push(
    directory: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    tag: str | None = None,
    parent: str | None = None,
    token: str | None = None,
) -> str:
    """Publish the artifact in *directory* as *repo* by one commit and return the commit's address.

    The artifact is verified first. The commit names the one it was made on, so that a change by someone else in
    between is refused rather than overwritten.

    Args:
        directory: the artifact's folder.
        repo: `user/name`; made where it does not exist.
        private: make it private; an existing repository stays as it is.
        message: of the commit.
        tag: name for the commit, to load it by as `user/name@tag`.
        parent: the commit that the repository must stand at; by default wherever it stands when the push begins.
        token: of the Hub; by default that of `hf auth login` or `HF_TOKEN`.

    Raises:
        ZooError: the artifact fails its own parity replay, or the Hub refuses.
    """
    from zoo.hub import artifact, files

    names.parse_ref(repo if tag is None else f"{repo}@{tag}")
    place = Path(directory).expanduser()
    failed = [check.name for check in artifact.verify(place) if not check.passed]
    if failed:
        raise ZooError(f"'{place}' does not reproduce its own outputs ({', '.join(failed)}), so it is not published")
    if offline():
        raise ZooError("HF_HUB_OFFLINE is set, so nothing can be published")
    from huggingface_hub import CommitOperationAdd

    api, listed = _api(token), files.published_files(place)
    done = ""
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        head = parent or api.repo_info(repo).sha
        text = message or f"Publish {place.name}"

        def send() -> Any:
            added = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in listed]
            return api.create_commit(repo, added, commit_message=text, parent_commit=head)

        with _bars(True):
            commit = _with_or_without_xet(send)
        done = str(commit.commit_url)
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=commit.oid)
    except Exception as error:
        if done:
            raise ZooError(f"'{place}' is published ({done}), but not tagged '{tag}' ({reason(error)})") from error
        raise ZooError(f"cannot publish '{place}' as '{repo}' ({reason(error)})") from error
    return done


def pull_dataset(repo: str, patterns: list[str], revision: str = "main") -> Path:
    """Folder with the files of a Hub data set whose paths match *patterns*: from the cache offline, else fetched.

    Raises:
        ZooError: not in the cache and not to be had.
    """
    from huggingface_hub import snapshot_download

    ref = names.parse_ref(f"{repo}@{revision}")
    try:
        with _bars(True):
            folder = snapshot_download(
                ref.repo,
                repo_type="dataset",
                revision=ref.revision,
                allow_patterns=patterns,
                ignore_patterns=["*.py"],  # data only, never loading scripts
                cache_dir=cache.cache_root(),
                endpoint=_endpoint(),
                local_files_only=offline(),
            )
    except Exception as error:
        why = "HF_HUB_OFFLINE is set and the cache does not hold it" if offline() else reason(error)
        raise ZooError(
            f"cannot get the data set '{repo}' from the Hub ({why}): where there is a network, run `hf download {repo} "
            "--repo-type dataset` and name the folder with --root"
        ) from error
    return Path(folder)


def search(query: str = "", *, limit: int = 50) -> list[dict[str, Any]]:
    """Published artifacts of this library whose id holds *query*: `id`, `tags`, `licence`, `downloads`, `updated`.

    Raises:
        ZooError: offline, or the Hub does not answer.
    """
    if offline():
        raise ZooError("HF_HUB_OFFLINE is set, so the Hub cannot be searched; `zoo list` shows the catalogue")
    try:
        found = list(_api(None).list_models(filter=LIBRARY, search=query or None, limit=limit))
    except Exception as error:
        raise ZooError(f"cannot search the Hub ({reason(error)})") from error
    rows = []
    for model in found:
        tags = list(model.tags or ())
        licence = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "")
        when = model.last_modified.date().isoformat() if model.last_modified else ""
        kept = [tag for tag in tags if tag != LIBRARY and not tag.startswith("license:")]
        rows.append({"id": model.id, "licence": licence, "downloads": model.downloads, "updated": when, "tags": kept})
    return rows


def reachable(timeout: float = 5.0) -> str:
    """Empty when the Hub answers, else one line saying why not."""
    import urllib.error
    import urllib.request

    if offline():
        return "HF_HUB_OFFLINE is set"
    address = (_endpoint() or "https://huggingface.co") + "/api/models?limit=1"
    try:
        with urllib.request.urlopen(address, timeout=timeout):
            return ""
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def offline() -> bool:
    """HF_HUB_OFFLINE, as huggingface_hub reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), token=token, library_name=LIBRARY)


def _in_cache(ref: names.Ref, named: str, file: str, must: bool) -> Path | None:
    """The snapshot, if it is whole and holds *file*; a damaged file is removed, so that it is fetched again."""
    commit = cache.cached_commit(ref.repo, ref.revision)
    if commit is None:
        return None
    snapshot = cache.repo_folder(ref.repo) / "snapshots" / commit
    record = cache.read_record(ref.repo, commit)
    bad = cache.spoiled(ref.repo, commit)
    if bad is not None:
        cache.discard(snapshot / bad)
        if must:
            raise ZooError(f"{named} in the Hub cache is damaged: {bad} is missing or not what the Hub announced")
        return None
    if file:
        return snapshot if (snapshot / file).is_file() else None
    return snapshot if record or names.has_weights(snapshot) else None


def _download(ref: names.Ref, named: str, file: str, allow_pickle: bool, report: Callable[[str], None] | None) -> Path:
    api = _api(None)
    commit = api.model_info(ref.repo, revision=ref.revision).sha
    listed = {
        item.path: item for item in api.list_repo_tree(ref.repo, revision=commit, recursive=True) if _is_file(item)
    }
    for path in listed:
        names.check_path(path, f"the repository {named}")
    if file and file not in listed:
        raise ZooError(f"the repository {named} has no file '{file}' at this revision")
    pickles = names.pickled(listed, file)
    if pickles and not allow_pickle:
        raise ZooError(
            f"{named} has its weights only as a pickle ({pickles[0]}): ask for it with `zoo pull {ref} "
            "--allow-pickle`; it is opened by a loader that builds tensors and plain values and runs nothing"
        )
    wanted = names.choose(listed, file, allow_pickle)
    if not wanted:
        raise ZooError(f"the repository {named} holds no weights and no config")
    _check_space(sum(listed[path].size for path in wanted), named)
    hashes = {}
    snapshot = cache.repo_folder(ref.repo) / "snapshots" / commit
    for path in wanted:
        item = listed[path]
        announced = str(item.lfs.sha256 if item.lfs else item.blob_id)
        local = snapshot / path
        if not local.is_file():
            local = Path(_with_or_without_xet(lambda path=path: _fetch(ref.repo, path, commit, report)))
        if local.stat().st_size != item.size or not cache.holds(local, announced):
            cache.discard(local)
            raise ZooError(
                f"{path} of {named} arrived damaged (it is not what the Hub announced) and was removed: pull again"
            )
        hashes[path] = announced
        if report is not None:
            report(f"{path}  {megabytes(item.size)}  {'sha256' if item.lfs else 'sha1'} {announced[:12]} ok")
    cache.write_record(ref.repo, commit, ref.revision, hashes)
    return snapshot


def _fetch(repo: str, path: str, commit: str, report: Callable[[str], None] | None) -> str:
    from huggingface_hub import hf_hub_download

    with _bars(report is None):
        return hf_hub_download(repo, path, revision=commit, cache_dir=cache.cache_root(), endpoint=_endpoint())


def _with_or_without_xet(call: Callable[[], Any]) -> Any:
    """Large files travel by xet where both sides can; a Hub without it answers 404 to the client's first question."""
    from huggingface_hub import constants

    try:
        return call()
    except Exception as error:
        if constants.HF_HUB_DISABLE_XET or not _is_about_xet(error):
            raise
    constants.HF_HUB_DISABLE_XET = True
    try:
        return call()
    finally:
        constants.HF_HUB_DISABLE_XET = False


def _is_about_xet(error: BaseException | None) -> bool:
    """Whether the Hub refused the token for xet; the xet library tells of it as a broken connection."""
    while error is not None:
        request = getattr(getattr(error, "response", None), "request", None)
        if any(f"/xet-{kind}-token/" in f"{getattr(request, 'url', '')} {error}" for kind in ("write", "read")):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The client's progress bars, in a terminal only."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    change = not are_progress_bars_disabled() and not (shown and sys.stderr.isatty())
    if change:
        disable_progress_bars()
    try:
        yield
    finally:
        if change:
            enable_progress_bars()


def _is_file(item: Any) -> bool:
    return hasattr(item, "blob_id")


def _check_space(need: int, named: str) -> None:
    root = cache.cache_root()
    while not root.is_dir():
        root = root.parent
    free = shutil.disk_usage(root).free
    if need > free:
        raise ZooError(f"{named} is {megabytes(need)} and the disk of the Hub cache has {megabytes(free)} left")


def megabytes(size: int) -> str:
    """1234567 -> '1.2 MB'."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"
