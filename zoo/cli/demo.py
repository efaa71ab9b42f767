"""`zoo demo`: try a model on a small local web page."""

from __future__ import annotations

import argparse
import time

from zoo.cli.common import Parser
from zoo.errors import ZooError

LOCAL = ("127.0.0.1", "localhost", "::1")


def parser() -> Parser:
    command = Parser(
        "demo",
        "Serve a page in the browser to try a model on, until Ctrl-C. DNA models: paste DNA or drop FASTA, see\n"
        "predictions, a score for every base, and what each substitution does. Visual tokenizers: drop a picture or\n"
        "clip and see it reconstructed, FlexTok with a slider for the number of tokens. Generators: choose a class or\n"
        "a clip to continue, and look at what comes out. MQT: ask about a picture, with any number of visual tokens.\n"
        "The page is for this machine alone unless --host says otherwise; nothing is uploaded or reported anywhere.\n"
        "It needs Gradio: pip install 'seqzoo[demo]'",
        [
            "zoo demo runs/hyenadna_uci_splice/artifact",
            "zoo demo hyenadna-tiny-1k --port 8080 --no-open",
            "zoo demo runs/nbp_moving_mnist/artifact --data moving_mnist",
            "zoo demo runs/maskgit_digits/artifact --tokenizer runs/titok_digits/artifact",
        ],
    )
    command.add_argument("ref", metavar="REF", help="artifact folder, model of the catalogue, or Hub id")
    command.add_argument("--host", default="127.0.0.1", help="address to serve on (default: 127.0.0.1, loopback)")
    command.add_argument("--port", type=int, default=7860, help="port; 0 for a free one (default: 7860)")
    command.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open the page in the browser"
    )
    command.add_argument("--tokenizer", default="", metavar="REF", help="generators: visual tokenizer of the ids "
                         "(default: the one trained on)")  # fmt: skip
    command.add_argument("--data", default="", metavar="NAME", help="NBP: data set whose clips can be continued")
    command.add_argument("--split", default="test", help="of --data: train, val or test (default: test)")
    command.add_argument("--root", default="", metavar="DIR", help="folder that holds the files of --data")
    return command


def run(args: argparse.Namespace) -> int:
    from zoo.cli.finetune import check_ref
    from zoo.demo.page import build, gradio, open_demo, serve

    check_ref(args.ref)
    if not 0 <= args.port < 65536:
        raise ZooError(f"--port must be 0 to 65535, got {args.port}")
    gradio()  # before the weights are read: what is missing is said at once
    from zoo.hub import artifact
    from zoo.hub.families import FAMILIES

    found = artifact.load(args.ref)
    family = FAMILIES.get(found.info.get("model", ""))
    demo = open_demo(found, args.tokenizer, args.data, args.split, args.root)
    name = str(found.run.get("name") or found.recipe.get("name") or args.ref)
    page = build(demo, name, family.about if family else "")
    address = serve(page, args.host, args.port, args.open)
    if args.host not in LOCAL:
        print(f"note: with --host {args.host} everybody on the network can use this page")
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print()
    finally:
        page.close(verbose=False)
    return 0
