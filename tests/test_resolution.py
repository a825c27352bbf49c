"""What a fresh machine installs: every extra resolves from the public registry alone, without local wheels and settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]
SETS = {"default": PYTHONS, "newest": PYTHONS, "oldest": ["3.11", "3.12"]}  # matplotlib 3.8 has no wheel for 3.13
SYSTEMS = ["x86_64-unknown-linux-gnu", "aarch64-apple-darwin", "x86_64-pc-windows-msvc"]
# Packages without wheels, of lm-eval and its RULER tasks: their sources are pure Python.
BUILT = ["sqlitedict", "rouge-score", "word2number"]

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """Ours without the settings of pip and uv, but for certificates."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    certificates = {name: value for name, value in os.environ.items() if name in ("PIP_CERT", "UV_CACHE_DIR")}
    return kept | certificates | {"PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0"}


def resolve(*options: str, python: str = "3.12", system: str = SYSTEMS[0], text: str | None = None) -> str:
    """The packages that uv would install, ``name==version`` a line. Raises AssertionError with uv's reason.

    uv's cache is asked first for pinned versions, which do not change: 0.6 s. The registry's 700 pages take 6 s of work.
    """
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--python-platform", system, *options]
    for words in (["--offline"], []) if "-c" in options else ([],):
        done = subprocess.run(
            command + words, input=text, capture_output=True, text=True, timeout=250, env=environment(), cwd=ROOT
        )
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    return done.stdout


def extras(*options: str, **target: str) -> str:
    """Every extra but vllm at once, from wheels: what resolves together resolves alone. vLLM chooses its own PyTorch."""
    names = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = [word for name in names if name != "vllm" for word in ("--extra", name)]
    sources = [word for name in BUILT for word in ("--no-binary", name)]
    return resolve("pyproject.toml", *wanted, "--only-binary", ":all:", *sources, *options, **target)


@pytest.fixture(autouse=True, scope="module")
def registry():
    """Skips everything here if the registry cannot be reached at all."""
    try:
        resolve("-", text="pip")
    except AssertionError as reason:
        if "Failed to fetch" not in str(reason):
            raise
        pytest.skip(f"no package registry can be reached: {reason}")


@pytest.mark.parametrize(("name", "python"), [(name, python) for name in SETS for python in SETS[name]])
def test_every_extra_resolves_with_each_set_of_pins(name, python):
    pins = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    versions = dict(re.findall(r"^(torch|triton|transformers)==(\S+)$", pins, re.M))
    found = dict(line.split("==") for line in extras("-c", f"constraints/{name}.txt", python=python).splitlines())
    assert {package: found[package] for package in versions} == versions
    assert len(versions) == 3


@pytest.mark.parametrize("python", [PYTHONS[0], PYTHONS[-1]])
def test_every_extra_resolves_without_pins(python):
    """On the first and the last Python: each takes 20 s of the registry's newest pages."""
    assert "torch==" in extras(python=python)


@pytest.mark.parametrize("system", SYSTEMS[1:])
def test_every_extra_resolves_on_other_systems(system):
    found = extras("-c", "constraints/default.txt", system=system)
    assert "transformers==" in found
    assert "triton==" not in found


def test_the_extra_for_vllm_resolves():
    found = resolve("pyproject.toml", "--extra", "vllm", "--only-binary", ":all:", system="x86_64-manylinux_2_31")
    assert "vllm==0.32" in found


@pytest.mark.parametrize("python", PYTHONS)
def test_torchtitan_resolves(python):
    """The second line of the Makefile, which takes nothing else along."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    packages = re.search(r"--no-deps (torchtitan [\w ]+)", makefile)[1].split()
    options = ["--no-deps", "-c", "constraints/default.txt", "--only-binary", ":all:", "-"]
    found = resolve(*options, python=python, text="\n".join(packages))
    assert {line.split("==")[0].replace("-", "_") for line in found.splitlines()} == set(packages)


def test_pip_agrees_with_what_make_installs():
    """pip's own resolver, without a registry: what is installed meets every requirement and every pin."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--no-build-isolation"]
    command += ["-c", "constraints/default.txt", "-e", ".[dev]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_pin_that_cannot_be_installed_is_found(tmp_path):
    """As triton 3.9.0 beside torch 2.13.0, whose public build asks for another."""
    pins = (ROOT / "constraints/default.txt").read_text(encoding="utf-8")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(re.sub(r"^triton==\S+$", "triton==3.9.0", pins, flags=re.M), encoding="utf-8")
    with pytest.raises(AssertionError, match="No solution found"):
        extras("-c", str(wrong))


def test_the_citation_is_valid():
    """By cffconvert, in an environment of its own: it asks for a jsonschema of 2018."""
    command = [
        sys.executable,
        "-m",
        "uv",
        "tool",
        "run",
        "--no-config",
        "--from",
        "cffconvert==2.0.0",
        "cffconvert",
        "--validate",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Citation metadata are valid according to schema version 1.2.0." in done.stdout
