"""The command `zoo`: one module per command, imported only when it is called, so that help costs nothing."""

from __future__ import annotations

import errno
import importlib
import os
import sys

from zoo import __version__
from zoo.errors import ZooError, nearest

# command -> (module, one line of help)
COMMANDS = {
    "list": ("zoo.cli.list", "models of the catalogue: size, context, licence, whether on this machine"),
    "info": ("zoo.cli.info", "everything about one model, recipe, data set, tokenizer or artifact"),
    "recipes": ("zoo.cli.recipes", "list, print, copy or check the recipes"),
    "validate": ("zoo.cli.validate", "check a recipe and its overrides without training"),
    "train": ("zoo.cli.train", "train what a recipe describes"),
    "finetune": ("zoo.cli.finetune", "train a recipe from the weights of an artifact or a published model"),
    "eval": ("zoo.cli.evaluate", "measure an artifact on a data set"),
    "bench-data": ("zoo.cli.bench_data", "a benchmark suite: recipes, floors and published numbers in one table"),
    "bench": ("zoo.cli.bench", "accuracy and cost of a vision-language model against its visual tokens"),
    "predict": ("zoo.cli.predict", "classify or score the sequences of a FASTA or CSV file"),
    "score": ("zoo.cli.score", "log-likelihood of the sequences of a FASTA or CSV file"),
    "embed": ("zoo.cli.embed", "vectors of the sequences of a FASTA or CSV file"),
    "mutagenesis": ("zoo.cli.mutagenesis", "every substitution of a sequence: table, sequence logo, heat map"),
    "generate": ("zoo.cli.generate", "continue DNA with a causal language model"),
    "variants": ("zoo.cli.variants", "score the alleles of a VCF file"),
    "tokenize": ("zoo.cli.tokenize", "pictures to ids"),
    "detokenize": ("zoo.cli.detokenize", "ids to pictures"),
    "reconstruct": ("zoo.cli.reconstruct", "a sheet of pictures beside what a visual tokenizer makes of them"),
    "demo": ("zoo.cli.demo", "try a model on a small local web page"),
    "verify": ("zoo.cli.verify", "replay parity cases or an artifact's own and compare number for number"),
    "convert": ("zoo.cli.convert", "turn a file of official weights into an artifact"),
    "push": ("zoo.cli.push", "publish an artifact on the Hub"),
    "pull": ("zoo.cli.pull", "fetch an artifact or official weights from the Hub, hashed and recognised"),
    "search": ("zoo.cli.search", "what others published with this library"),
    "export": ("zoo.cli.export", "an artifact in the official layout, for transformers, torch.export or ONNX"),
    "plot": ("zoo.cli.plot", "curves of one or several runs in one picture"),
    "sweep": ("zoo.cli.sweep", "train a recipe over a grid of values, or let Optuna choose them"),
    "doctor": ("zoo.cli.doctor", "versions, devices, cache, whether the Hub answers"),
    "completion": ("zoo.cli.completion", "completion of commands, models, recipes and keys for your shell"),
    "quickstart": (
        "zoo.cli.quickstart",
        "the whole line on real DNA: pretrain, fine-tune, measure, verify, predict",
    ),
}

# what the machine refuses, which is no bug of ours: full or read-only disks, missing permissions
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}

USAGE = """usage: zoo COMMAND [options]

a zoo of sequence models: train, fine-tune, measure, predict, verify

commands:
{commands}

examples:
  zoo list hyenadna
  zoo train hyenadna_uci_splice trainer.max_steps=200 --out runs/splice
  zoo eval runs/splice/artifact --data uci_splice
  zoo predict runs/splice/artifact --fasta my.fa

`zoo COMMAND --help` shows a command's options and examples; `zoo --version` the version ({version}).
"""


def usage() -> str:
    """The text of `zoo --help`."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    return USAGE.format(commands=commands, version=__version__)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted.

    A `ZooError` is one sentence on stderr. Any other exception is a bug of ours and shows its traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
        return status
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning shuts down on Ctrl-C and exits by itself
            print("interrupted", file=sys.stderr)
            return 130
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (`head`, `less`) has gone; keep the interpreter from flushing into it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}", file=sys.stderr)
        return 2


def dispatch(arguments: list[str]) -> int:
    """Call the command that *arguments* name.

    Raises:
        ZooError: unknown command, wrong options, or the command's own complaint.
    """
    if not arguments or (arguments[0] in ("-h", "--help", "help") and len(arguments) == 1):
        print(usage(), end="")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(__version__)
        return 0
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in COMMANDS:
        raise ZooError(f"unknown command '{name}'" + nearest(name, COMMANDS))
    command = importlib.import_module(COMMANDS[name][0])
    return int(command.run(command.parser().parse(rest)) or 0)


if __name__ == "__main__":
    sys.exit(main())
