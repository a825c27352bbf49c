"""Imports point one way, read off the syntax tree: nothing is imported, so a cycle or a missing package cannot hide."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "loglinear"

# A module may import its own package and packages on lower steps. "" is loglinear/__init__.py, the ops' shop window.
STEP = {
    **{"auto_classes": 0, "extras": 0, "versions": 0, "__main__": 11},
    **{"fenwick": 0, "transition": 0, "state": 1, "decoding_state": 2, "reference": 3, "kernels": 3, "ops": 4, "": 5},
    **{"jax": 5, "distributed": 5, "layers": 6, "models": 7, "tasks": 8, "training": 9, "cli": 10, "integrations": 10},
}
# Third-party packages that a package may import; tasks, training, cli and integrations may import any but triton.
THIRD_PARTY = {
    **{"auto_classes": set(), "extras": set(), "versions": set(), "__main__": set()},
    **{"fenwick": set(), "transition": {"torch"}, "state": {"torch"}, "decoding_state": {"torch"}},
    **{"reference": {"torch"}, "kernels": {"torch", "triton"}},
    **{"ops": {"torch"}, "": set(), "distributed": {"torch"}, "layers": {"torch"}},
    "models": {"torch", "transformers", "safetensors"},
    "jax": {"jax", "flax", "numpy", "safetensors", "torch"},  # torch in foreign.py, when asked
}


@dataclass(frozen=True)
class Import:
    """One imported module: full dotted name, line, and whether importing the file imports it too."""

    target: str
    line: int
    at_import: bool


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, source: Path) -> bool:
    path = source.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports(path: Path, source: Path) -> Iterator[Import]:
    """Every import in a file: absolute, relative, inside functions, and ``import_module("...")`` of a literal."""
    package = module_name(path, source).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name, source) else base for name in names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        yield from (Import(target, node.lineno, at_import) for target in targets(node))
        runs_later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_import)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_import and not runs_later)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def package_of(module: str) -> str:
    """``loglinear.ops.attention`` -> ``ops``, and ``loglinear`` -> ``""``."""
    return f"{module}..".split(".")[1]


def violations(source: Path) -> list[str]:
    """Lines that break the rule of imports, as ``file:line: reason``."""
    found = []
    for path in sorted(source.rglob("*.py")):
        own = package_of(module_name(path, source))
        for item in imports(path, source):
            where = f"{path.relative_to(source)}:{item.line}"
            top = item.target.split(".")[0]
            if own not in STEP:
                found.append(f"{where}: {own!r} has no step")
            elif top == source.name:
                other = package_of(item.target)
                lazy_window = own == "" and not item.at_import  # __getattr__ reaches up to the models
                if other != own and not lazy_window and STEP.get(other, 99) >= STEP[own]:
                    found.append(f"{where}: {own or source.name} imports {item.target}")
            elif top not in sys.stdlib_module_names:
                allowed = top != "triton" if own not in THIRD_PARTY else top in THIRD_PARTY[own]
                if not allowed:
                    found.append(f"{where}: {own or source.name} imports {top}")
    return found


def needed_to_import(module: str, source: Path) -> set[str]:
    """Third-party packages that ``import module`` imports, through whatever it imports of the library."""
    pending, seen, outside = [module], set(), set()
    while pending:
        name = pending.pop()
        parents = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
        for part in parents:  # importing a.b.c runs a, a.b and a.b.c
            if part in seen:
                continue
            seen.add(part)
            path = source.parent.joinpath(*part.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            for item in imports(file, source):
                if item.at_import and item.target.split(".")[0] == source.name:
                    pending.append(item.target)
                elif item.at_import:
                    outside.add(item.target.split(".")[0])
    return outside - set(sys.stdlib_module_names)


def test_imports_point_one_way():
    assert violations(SOURCE) == []


def test_every_package_is_checked():
    packages = {package_of(module_name(path, SOURCE)) for path in SOURCE.rglob("*.py")}
    assert packages == set(STEP)


def test_importing_the_package_needs_nothing_and_jax_needs_no_torch():
    assert needed_to_import("loglinear", SOURCE) == set()
    assert needed_to_import("loglinear.jax", SOURCE) == {"jax", "numpy"}


@pytest.mark.parametrize("module", ["loglinear.ops", "loglinear.layers", "loglinear.reference.masks"])
def test_importing_the_library_needs_torch_alone(module):
    assert needed_to_import(module, SOURCE) == {"torch"}


def test_one_file_touches_vllm():
    """What changes with vLLM is in this file. The models and the pages that it serves are tested without vLLM."""
    named = [path for path in SOURCE.rglob("*.py") if "vllm" in path.read_text(encoding="utf-8")]
    found = [path for path in named if any(one.target.split(".")[0] == "vllm" for one in imports(path, SOURCE))]
    assert [path.relative_to(SOURCE).as_posix() for path in found] == ["integrations/vllm.py"]


def test_fenwick_needs_nothing():
    assert {item.target for item in imports(SOURCE / "fenwick.py", SOURCE)} <= sys.stdlib_module_names | {
        "collections.abc"
    }


# ---------------------------------------------------------------------------------------- the checker itself can fail


@pytest.fixture
def tree(tmp_path):
    """Write a small library with one changed file and list what the checker says about it."""

    def write(file: str, text: str) -> list[str]:
        source = tmp_path / "loglinear"
        files = {"__init__.py": "", "fenwick.py": "", "reference/__init__.py": "", "reference/dense.py": ""}
        files |= {"kernels/__init__.py": "", "ops/__init__.py": "", "models/__init__.py": "", "tasks/__init__.py": ""}
        for name, content in (files | {file: text}).items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return violations(source)

    return write


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/tree/place.py", "from loglinear.reference.dense import dense"),
        ("kernels/tree/place.py", "def test():\n    from loglinear import reference"),
        ("kernels/tree/place.py", "from ...reference import dense"),
        ("kernels/deep/er.py", "from ...reference.dense import dense"),
        ("kernels/tree/place.py", "import importlib\nimportlib.import_module('loglinear.reference.dense')"),
        ("reference/dense.py", "import loglinear.kernels"),
        ("reference/dense.py", "from loglinear import log_linear_attention"),
        ("ops/attention.py", "import triton.language as tl"),
        ("ops/attention.py", "def run():\n    import triton"),
        ("tasks/lm.py", "from triton import jit"),
        ("layers/norm.py", "import transformers"),
        ("fenwick.py", "import torch"),
        ("__init__.py", "from loglinear.models import config"),
        ("models/modeling.py", "if TYPE_CHECKING:\n    from loglinear.tasks import lm"),
        ("fenwick.py", "from . import ops"),
        ("helpers/things.py", "import os"),
    ],
)
def test_checker_finds_a_wrong_import(tree, file, text):
    found = tree(file, text)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ops/attention.py", "def run():\n    from loglinear.kernels.tree import place"),
        (
            "kernels/tree/place.py",
            "import torch\nimport triton\nfrom loglinear.fenwick import lowbit\nfrom . import tuning",
        ),
        ("__init__.py", "def __getattr__(name):\n    from loglinear import models"),
        ("tasks/lm.py", "import numpy\nfrom loglinear.models import config"),
    ],
)
def test_checker_lets_a_right_import_pass(tree, file, text):
    assert tree(file, text) == []


def test_checker_follows_imports_through_packages(tmp_path):
    source = tmp_path / "loglinear"
    (source / "ops").mkdir(parents=True)
    (source / "__init__.py").write_text("from loglinear.ops.run import f\n")
    (source / "ops" / "__init__.py").write_text("import numpy\n")
    (source / "ops" / "run.py").write_text("import torch\ndef f():\n    import triton\n")
    assert needed_to_import("loglinear", source) == {"torch", "numpy"}
