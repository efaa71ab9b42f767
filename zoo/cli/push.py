"""`zoo push`: an artifact becomes a repository of the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.cli.common import Parser, table
from zoo.hub.names import parse_ref


def parser() -> Parser:
    command = Parser(
        "push",
        "Publish the artifact in DIR as user/name: checked, then sent as one commit that takes effect whole or not at\n"
        "all, and only if the repository stands where it stood when the push began. Needs `hf auth login` or HF_TOKEN.",
        [
            "zoo push runs/splice/artifact me/splice --dry-run",
            "zoo push runs/splice/artifact me/splice --tag v1 --private",
            "zoo push runs/splice/artifact me/splice --message 'Trained for longer'",
        ],
    )
    command.add_argument("directory", metavar="DIR", help="folder of the artifact")
    command.add_argument("repo", metavar="USER/NAME")
    command.add_argument("--tag", metavar="NAME", help="name this version: it loads as user/name@NAME")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is made now")
    command.add_argument("--message", metavar="TEXT", help="of the commit")
    command.add_argument("--parent", metavar="COMMIT", help="refuse unless the repository stands at this commit")
    command.add_argument("--dry-run", action="store_true", help="check the artifact and list what would be sent")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.hub import client, files

    parse_ref(args.repo if args.tag is None else f"{args.repo}@{args.tag}")
    place = Path(args.directory).expanduser()
    if args.dry_run:
        described = files.check_files(place)
        listed = files.published_files(place)
        sizes = [path.stat().st_size for path in listed]
        print(
            table([(p.name, f"{size:,}") for p, size in zip(listed, sizes, strict=True)], ("file", "bytes"), right=(1,))
        )
        seen = "private, if it is made" if args.private else "public, if it is made"
        tag = f", tag {args.tag}" if args.tag else ""
        print(
            f"\n{len(listed)} files, {client.megabytes(sum(sizes))}, {described['model']} -> {args.repo}{tag} ({seen})"
        )
        print("nothing was sent (--dry-run)")
        return 0
    url = client.push(place, args.repo, private=args.private, message=args.message, tag=args.tag, parent=args.parent)
    print(url)
    print(f"load it with zoo.load('{args.repo}{'@' + args.tag if args.tag else ''}')")
    return 0
