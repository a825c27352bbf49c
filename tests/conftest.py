"""Every test starts from the same seed, on one thread, and hypothesis draws the same examples each time."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

torch.set_num_threads(1)  # tests run side by side; one core each

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()


def pytest_collection_modifyitems(items):
    """Long tests first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """``torch.compile`` into one graph, or an error; nothing is kept for the next test."""
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="inductor" if torch.cuda.is_available() else "aot_eager")
    torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption("--pins", default="default", help="the set of constraints/ that a fresh environment gets")


# Forks a process for each code. What loglinear and transformers import takes seconds, and no code asks about it.
FORKS = """
import json, os, sys, warnings
import accelerate, scipy.optimize, sympy, tokenizers, torch, torch._dynamo, torch.onnx
import torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor

assert not {"loglinear", "transformers"} & set(sys.modules)
warnings.simplefilter("error", UserWarning)
for line in sys.stdin:
    code, sys.argv, out = json.loads(line)
    if not (child := os.fork()):
        for stream in (1, 2):
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        exec(code, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forks():
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def python(forks, tmp_path) -> Callable[..., str]:
    """``python(code, *arguments)``: what ``code`` prints in a process of its own, where warnings of ours are errors."""

    def run(code: str, *arguments: object) -> str:
        out = tmp_path / "out"
        print(json.dumps([code, ["-c", *map(str, arguments)], str(out)]), file=forks.stdin, flush=True)
        status = forks.stdout.readline()
        printed = out.read_text(encoding="utf-8")
        assert status == "0\n", printed
        return printed.strip()

    return run


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: a folder that ``make`` fills; workers of one run share the folder, and the first one fills it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / f"{name}.made").exists():
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


def finish(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def distributions(once) -> dict[str, Path]:
    """``sdist`` and ``wheel`` of a copy of the sources: a build folder left in the tree could hide a missing file.

    The wheel is built from the sdist.
    """

    def build(copy: Path) -> None:
        copy.mkdir()
        for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
            shutil.copy(ROOT / name, copy)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        finish(sys.executable, "-m", "build", "--no-isolation", "--outdir", copy / "dist", copy)

    folder = once("sources", build) / "dist"
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


@pytest.fixture(scope="session")
def environment(distributions, once, pytestconfig) -> Callable[[str], Path]:
    """``environment(extras)``: the folder of programs of an empty environment that got the wheel and what it asks for.

    uv takes the versions of ``--pins`` from its cache, or from the registry. Without a registry the tests skip; with CI=true
    they fail.
    """
    uv, pins = [sys.executable, "-m", "uv"], ROOT / "constraints" / f"{pytestconfig.getoption('pins')}.txt"
    links = [word for folder in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", folder)]

    def make(extras: str) -> Path:
        def install(home: Path) -> None:
            finish(*uv, "venv", "--no-project", "--python", sys.executable, home)
            to = ["--link-mode", "symlink", "--python", home]  # no copies where the cache lies on another disk
            command = [*uv, "pip", "install", *to, *links, "-c", pins, f"{distributions['wheel']}{extras}"]
            try:
                finish(*command, "--offline")
            except AssertionError:
                finish(*command)

        try:
            home = once(f"installed{extras}", install)
        except AssertionError as reason:
            if "Failed to fetch" not in str(reason) or os.environ.get("CI") == "true":
                raise
            pytest.skip(f"no package registry can be reached: {reason}")
        return home / sysconfig.get_path("scripts", "venv", {"base": "."})

    return make


@pytest.fixture(scope="session")
def installed(environment) -> Path:
    """The folder of programs of such an environment, with what the commands and the server ask for."""
    return environment("[cli,serve]")
