"""A kernel has at most 20 parameters, another function of the kernels and ops 12, or it says why where it stands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.default_packages

SOURCE = Path(__file__).parents[2] / "src" / "loglinear"
ROOMS = [*(SOURCE / "kernels").rglob("*.py"), *(SOURCE / "ops").rglob("*.py"), SOURCE / "decoding_state.py"]
MOST_OF_A_KERNEL, MOST = 20, 12


def too_many(text: str) -> Iterator[str]:
    """``line name: parameters`` of each function with more than it may have, and without ``# 13 parameters: why``."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        count -= bool(node.args.args) and node.args.args[0].arg == "self"
        kernel = node.name.endswith("_kernel")
        signature = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
        reason = not kernel and re.search(rf"# {count} parameters: \w+", signature)
        if count > (MOST_OF_A_KERNEL if kernel else MOST) and not reason:
            yield f"{node.lineno} {node.name}: {count}"


@pytest.mark.parametrize(
    ("count", "name", "reason", "found"),
    [
        (12, "f", "", 0),
        (13, "f", "", 1),
        (13, "f", "  # 13 parameters: two of each", 0),
        (13, "f", "  # 14 parameters: one was more", 1),
        (20, "f_kernel", "", 0),
        (21, "f_kernel", "  # 21 parameters: no reason counts", 1),
    ],
)
def test_counter(count, name, reason, found):
    names = ", ".join(f"x{i}" for i in range(count))
    assert len(list(too_many(f"def {name}({reason}\n    self, {names}\n):\n    pass\n"))) == found


def test_no_function_has_too_many_parameters():
    found = {str(path.relative_to(SOURCE)): list(too_many(path.read_text(encoding="utf-8"))) for path in ROOMS}
    assert {path: functions for path, functions in found.items() if functions} == {}
