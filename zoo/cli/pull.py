"""`zoo pull`: a repository of the Hub into the local cache, hashed, recognised, and if asked made an artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo.cli.common import Parser
from zoo.errors import ZooError
from zoo.hub.names import find


def parser() -> Parser:
    command = Parser(
        "pull",
        "Fetch REF into the Hub cache: an artifact (user/name, user/name@revision), official weights by their own\n"
        "id (LongSafari/hyenadna-small-32k-seqlen-hf) or by their name in the catalogue. Every file is hashed against\n"
        "what the Hub announces, and each name and shape of official weights must fit. Nothing is executed.",
        [
            "zoo pull me/my-model@v1",
            "zoo pull LongSafari/hyenadna-small-32k-seqlen-hf --out hyenadna-small",
            "zoo pull hyenadna-tiny-1k --allow-pickle",
            "zoo pull me/my-model --offline",
        ],
    )
    command.add_argument("ref", metavar="REF")
    command.add_argument("--allow-pickle", action="store_true", help="weights that exist only as a pickle, too")
    command.add_argument("--file", default="", metavar="NAME", help="the weights, where a repository has several")
    command.add_argument("--update", action="store_true", help="ask the Hub where the branch stands")
    command.add_argument("--offline", action="store_true", help="only what is in the cache")
    command.add_argument("-o", "--out", metavar="DIR", help="write an artifact (official weights are converted)")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.hub import client, files

    if args.offline and args.update:
        raise ZooError("--offline and --update exclude each other")
    out = Path(args.out).expanduser() if args.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ZooError(f"'{out}' exists: choose another folder for --out")
    ref, file, what = find(args.ref, args.file)
    report = None if sys.stderr.isatty() else lambda line: print(line, file=sys.stderr)
    place = client.pull(
        ref.repo, ref.revision, what=what, file=file, allow_pickle=args.allow_pickle, update=args.update,
        local=args.offline, report=report,
    )  # fmt: skip
    print(f"{ref.repo}: {ref.revision}, commit {place.name[:12]}")
    artifact_here = (place / files.FILES).is_file()
    if artifact_here:
        described = files.check_files(place)
        print(f"artifact    {described['model']}, every file is what was saved")
    else:
        _recognise(place, ref.repo, file)
    print(f"folder      {place}")
    if out is not None:
        _write(place, ref.repo, file, out, artifact_here)
        print(f"written     {out}")
    return 0


def _recognise(place: Path, repo: str, file: str) -> None:
    from zoo.hub import official

    found = official.recognise(place, repo, file)
    print(f"recognised  {found.family}, {found.params:,} parameters, all {found.tensors} names and shapes fit")
    if found.entry and not found.difference:
        print(f"catalogue   {found.entry}, the same sizes")
    elif found.entry:
        print(f"catalogue   differs from {found.entry}: {found.difference}")


def _write(place: Path, repo: str, file: str, out: Path, is_artifact: bool) -> None:
    import shutil

    from zoo.hub import artifact, files, official

    if not is_artifact:
        model, tokenizer, _ = official.load(place, repo, file)
        artifact.save(model, out, tokenizer=tokenizer)
        return
    out.mkdir(parents=True, exist_ok=True)
    for path in files.published_files(place):  # the cache holds links
        shutil.copyfile(path, out / path.name)
