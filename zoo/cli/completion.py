"""`zoo completion`: the shell completes commands, options, models, recipes and keys of recipes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zoo import catalogue
from zoo.cli.common import Parser
from zoo.errors import ZooError, nearest

SHELLS = ("bash", "zsh", "fish")
# the shells ask `zoo completion words -- WORD...` with the words after `zoo`, the last of them unfinished
SCRIPTS = {
    "bash": """_zoo() {
    local IFS=$'\\n'
    COMPREPLY=($(zoo completion words -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/.] ]] && compopt -o nospace
}
complete -o default -o nosort -F _zoo zoo
""",
    "zsh": """#compdef zoo
_zoo() {
    local -a found
    found=("${(@f)$(zoo completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then
        compadd -Q -S '' -a found
    else
        _files
    fi
}
compdef _zoo zoo
""",
    "fish": """function __zoo_words
    set -l words (commandline -opc) (commandline -ct)
    zoo completion words -- $words[2..-1] 2>/dev/null
end
complete -c zoo -a '(__zoo_words)'
""",
}
RECIPE = ("train", "finetune", "validate", "sweep")  # commands whose first word is a recipe
MODEL = ("pull", "info", "export")
# whose first word is a folder
ARTIFACT = ("push", "eval", "predict", "score", "embed", "variants", "verify", "plot", "demo")


def parser() -> Parser:
    command = Parser(
        "completion",
        "Print the completion script of a shell. It completes commands, their options, models, recipes, data sets and\n"
        "the keys of recipes.\n"
        "  bash  add to ~/.bashrc:  source <(zoo completion bash)\n"
        "  zsh   add to ~/.zshrc:   source <(zoo completion zsh)      (after compinit)\n"
        "  fish  zoo completion fish > ~/.config/fish/completions/zoo.fish",
        ["zoo completion bash", "zoo completion zsh", "zoo completion fish"],
    )
    command.add_argument("shell", metavar="bash|zsh|fish")
    command.add_argument("words", nargs="*", metavar="WORD", help=argparse.SUPPRESS)
    return command


def run(args: argparse.Namespace) -> int:
    if args.shell == "words":
        for candidate in candidates(args.words):
            print(candidate)
        return 0
    if args.shell not in SCRIPTS:
        raise ZooError(f"zoo completion does not know '{args.shell}'" + nearest(args.shell, SHELLS))
    print(SCRIPTS[args.shell], end="")
    return 0


def candidates(words: list[str]) -> list[str]:
    """What may stand in place of the last of *words* (those after `zoo`)."""
    from zoo.cli.main import COMMANDS

    *before, last = words or [""]
    if not before:
        return _starting(COMMANDS, last)
    command = before[0]
    if command not in COMMANDS:
        return []
    if last.startswith("-"):
        return _starting(_flags(command), last)
    if before[-1] in ("--from", "--init"):
        return _starting(catalogue.ENTRIES, last)
    if before[-1] == "--format" and command == "export":
        return _starting(("official", "transformers", "torch", "onnx"), last)
    if before[-1] == "--data":
        return _starting(_data(), last)
    plain = [word for word in before[1:] if not word.startswith("-")]
    if command in RECIPE:
        return _starting(_recipes(), last) if not plain else _starting(keys(plain[0], last), last)
    if command in MODEL and not plain:
        known = [*catalogue.ENTRIES, *(catalogue.MODELS if command == "info" else ())]
        return _starting([*known, *(_recipes() + _data() if command == "info" else ())], last)
    if command == "recipes":
        return _starting(("ls", "cat", "cp", "validate"), last) if not plain else _starting(_recipes(), last)
    if command == "completion" and not plain:
        return _starting(SHELLS, last)
    if command == "list" and not plain:
        return _starting(sorted({entry.model for entry in catalogue.ENTRIES.values()}), last)
    return []


def keys(recipe: str, last: str) -> list[str]:
    """`section.field=` for everything that an override of *recipe* can set, one level at a time."""
    from zoo.config import schema

    found = _fields(schema("zoo.train.recipe:RecipeConfig"), "")
    found = [f"{key}." if key in ("model", "data", "task", "trainer", "tokenizer") else f"{key}=" for key in found]
    section = last.partition(".")[0]
    if "." not in last:
        return [*found, "data=", "tokenizer="]
    if section == "trainer":
        return [f"{key}=" for key in _fields(schema("zoo.train.recipe:TrainerConfig"), "trainer.")]
    tables = {"model": catalogue.MODELS, "task": catalogue.TASKS, "data": catalogue.DATAMODULES,
              "tokenizer": catalogue.TOKENIZERS}  # fmt: skip
    name = _section(recipe, section)
    if section not in tables or name not in tables[section]:
        return []
    cls: Any = schema(catalogue.schema_target(tables[section][name]))
    return _nested(cls, f"{section}.", last)


def _nested(cls: Any, prefix: str, last: str) -> list[str]:
    """Fields below *prefix*; of those that are configs themselves the inner ones, once *last* has entered them."""
    import dataclasses
    import typing

    kinds = typing.get_type_hints(cls)
    found: list[str] = []
    for item in dataclasses.fields(cls):
        options = typing.get_args(kinds[item.name]) or (kinds[item.name],)
        inner = next((kind for kind in options if dataclasses.is_dataclass(kind)), None)
        if inner is None:
            found.append(f"{prefix}{item.name}=")
        elif last.startswith(f"{prefix}{item.name}."):
            found += _nested(inner, f"{prefix}{item.name}.", last)
        else:
            found.append(f"{prefix}{item.name}.")
    return found


def _fields(cls: Any, prefix: str) -> list[str]:
    import dataclasses

    return [prefix + item.name for item in dataclasses.fields(cls)]


def _section(recipe: str, section: str) -> str:
    """The name in a section of the recipe, read off its YAML without composing it."""
    import yaml

    from zoo._resources import folder

    own = Path(recipe).expanduser()
    file = own if own.suffix == ".yaml" and own.is_file() else folder("recipes") / f"{recipe}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        named = (content.get(section) or {}).get("name")
        for default in content.get("defaults", ()):
            for key, value in default.items() if named is None and isinstance(default, dict) else ():
                group, _, target = str(key).lstrip("/").partition("@")
                if target == section:
                    text = (folder(group) / f"{value}.yaml").read_text(encoding="utf-8")
                    named = yaml.safe_load(text).get("name")
        return str(named or "")
    except (OSError, yaml.YAMLError, AttributeError, ValueError):
        return ""  # a recipe that cannot be read has no keys to offer


def _flags(command: str) -> list[str]:
    import importlib

    from zoo.cli.main import COMMANDS

    parser = importlib.import_module(COMMANDS[command][0]).parser()
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _recipes() -> list[str]:
    from zoo.train.compose import recipe_names

    return list(recipe_names())


def _data() -> list[str]:
    from zoo._resources import folder

    return sorted(path.stem for path in folder("datamodules").glob("*.yaml"))


def _starting(choices: Any, last: str) -> list[str]:
    return [choice for choice in choices if choice.startswith(last)]
