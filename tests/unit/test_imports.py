"""The import law, and what may stand in the package and in the catalogue folders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# a layer may import itself and what stands in its set; everything may import config, errors, catalogue, _resources
BASE = {"config", "errors", "catalogue", "_resources", "__init__"}
ALLOWED = {
    "nn": {"nn"},
    "models": {"nn", "models"},
    "tokenizers": {"nn", "tokenizers"},
    "datamodules": {"nn", "tokenizers", "datamodules"},
    # a replay may run the decoding engine or an algorithm on data
    "convert": {"nn", "models", "tokenizers", "datamodules", "generate", "convert"},
    "hub": {"nn", "models", "tokenizers", "convert", "hub"},
    "generate": {"nn", "models", "tokenizers", "generate"},
    "tasks": {"nn", "models", "tokenizers", "generate", "tasks"},
    "train": {"nn", "models", "tokenizers", "datamodules", "generate", "tasks", "convert", "hub", "train"},
}
# what people call sees everything below it; the page uses what the commands use
ALLOWED["cli"] = ALLOWED["demo"] = ALLOWED["train"] | {"cli", "demo"}
FOLDERS = ("recipes", "tokenizers", "datamodules", "model_cards")
FORBIDDEN = {
    "instantiate": r"\binstantiate\s*\(",
    "hydra.utils": r"hydra\.utils",
    "eval": r"(?<![\w.])eval\s*\(",
    "remote code": r"trust_remote_code",
    "unsafe pickle": r"weights_only\s*=\s*False",
    "lenient loading": r"load_state_dict\([^\n]*strict\s*=\s*False",
    "pickle.load": r"pickle\.loads?\s*\(",
}


def imports(tree: ast.AST) -> set[str]:
    """Every `zoo...` module that a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "zoo" else {node.module}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("relative import: the law cannot be read off it")
    return {name for name in found if name == "zoo" or name.startswith("zoo.")}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def breaches(layer: str, source: str) -> list[str]:
    return [
        module
        for module in imports(ast.parse(source))
        if layer_of(module) not in ALLOWED[layer] | BASE and not layer_of(module).startswith("__version")
    ]


def test_imports_run_one_way(root: Path) -> None:
    wrong = []
    for file in sorted((root / "zoo").rglob("*.py")):
        parts = file.relative_to(root / "zoo").parts
        if len(parts) == 1 or parts[0] == "_data":
            continue
        assert parts[0] in ALLOWED, f"{file}: a new layer needs a place in the law"
        wrong += [f"{'/'.join(parts)} imports {module}" for module in breaches(parts[0], file.read_text("utf-8"))]
    assert not wrong, "\n".join(wrong)


def test_the_law_sees_a_step_back() -> None:
    assert breaches("nn", "from zoo.models.base import SequenceModel") == ["zoo.models.base"]
    assert breaches("nn", "def f():\n    from zoo import tasks") == ["zoo.tasks"]
    assert breaches("hub", "import zoo.tasks.classify") == ["zoo.tasks.classify"]
    assert breaches("train", "from zoo.demo.page import build") == ["zoo.demo.page"]
    assert breaches("tokenizers", "from zoo import catalogue\nfrom zoo.errors import ZooError") == []


@pytest.mark.parametrize("name", FOLDERS)
def test_no_python_in_the_catalogue(root: Path, name: str) -> None:
    place = root / name
    assert place.is_dir()
    assert (place / "README.md").is_file(), "each catalogue folder says what belongs there"
    assert not [path for path in place.rglob("*") if path.suffix in (".py", ".pyc", ".pyi", ".so")]


def test_nothing_dangerous_is_called(root: Path) -> None:
    found = []
    for file in sorted((root / "zoo").rglob("*.py")):
        text = file.read_text("utf-8")
        code = ast.unparse(_without_strings(ast.parse(text)))
        found += [
            f"{file.relative_to(root)}: {what}" for what, pattern in FORBIDDEN.items() if re.search(pattern, code)
        ]
    assert not found, "\n".join(found)


def _without_strings(tree: ast.Module) -> ast.Module:
    """Docstrings and messages may name what code may not call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = "text"
    return tree


def test_torch_load_is_always_restricted(root: Path) -> None:
    calls = []
    for file in sorted((root / "zoo").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {item.arg: ast.unparse(item.value) for item in node.keywords}
                calls.append((file.name, options.get("weights_only")))
    assert calls, "checkpoints are read somewhere"
    assert all(value == "True" for _, value in calls), calls


@pytest.mark.parametrize(
    "code",
    [
        "import zoo",
        "import zoo.catalogue, zoo.config, zoo.train.recipe, zoo.train.compose",
        "import zoo.cli.main as m; m.main(['--help'])",
        "import zoo.cli.main as m; m.main(['list'])",
        "import zoo.cli.main as m; m.main(['train', '--help']) if 0 else None",
        "import zoo.cli.main as m; m.main(['recipes', 'ls'])",
        "import zoo.cli.main as m; m.main(['validate', 'hyenadna_species5'])",
        "import zoo.cli.main as m; assert m.main(['train', 'hyenadna_species5', 'trainer.max_steps=ten']) == 2",
    ],
)
def test_what_must_stay_light(code: str) -> None:
    heavy = "torch", "pytorch_lightning", "timm", "transformers"
    script = f"{code}\nimport sys\nheavy = [m for m in {heavy} if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
