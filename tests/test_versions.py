"""Packages outside of the tested range warn once; those of the pins do not."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from loglinear import versions

ROOT = Path(__file__).parents[1]
GPU_MACHINE = {"torch": "2.11.0+cu128", "triton": "3.6.0", "transformers": "5.17.0"}


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    return {package: re.search(rf"^{package}==(\S+)$", text, re.M)[1] for package in versions.TESTED}


@pytest.fixture
def installed(monkeypatch):
    """The messages that the check gives where these versions are installed."""

    def check(found: dict[str, str]) -> list[str]:
        def version(package: str) -> str:
            if package not in found:
                raise PackageNotFoundError(package)
            return found[package]

        monkeypatch.setattr(versions, "version", version)
        versions.warn_untested.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            versions.warn_untested()
            versions.warn_untested()
        return [str(warning.message) for warning in caught]

    yield check
    versions.warn_untested.cache_clear()


@pytest.mark.parametrize("name", ["default", "newest", "oldest"])
def test_pins_do_not_warn(installed, name):
    assert installed(pins(name)) == []


def test_ends_are_those_of_the_pins():
    ends = [
        {package: version.rsplit(".", 1)[0] for package, version in pins(name).items()} for name in ("oldest", "newest")
    ]
    for package, tested in versions.TESTED.items():
        assert [end[package] for end in ends] == [".".join(map(str, end)) for end in tested]


@pytest.mark.parametrize(
    "found",
    [
        GPU_MACHINE,
        GPU_MACHINE | {"torch": "2.99.0.dev20270101+cu130"},
        GPU_MACHINE | {"torch": "2.99.0a0+git1234567"},
        GPU_MACHINE | {"transformers": "5.24.7"},
        {"torch": "2.13.0+cpu"},
    ],
    ids=str,
)
def test_what_is_tested_or_a_development_build_does_not_warn(installed, found):
    assert installed(found) == []


def test_other_releases_warn_once_and_together(installed):
    (message,) = installed({"torch": "2.99.1+cpu", "triton": "3.6.0", "transformers": "5.16.0"})
    assert "torch 2.99.1+cpu is installed, and 2.8 to 2.15 are tested" in message
    assert "transformers 5.16.0 is installed, and 5.17 to 5.24 are tested" in message
    assert "triton" not in message


@pytest.mark.parametrize("module", ["loglinear.models", "loglinear.kernels.installation"])
def test_the_check_runs_where_models_or_kernels_are_first_used(module, tmp_path, python):
    """A package is what its metadata says: here, first in the path, a transformers of the future."""
    (tmp_path / "transformers-5.99.0.dist-info").mkdir()
    (tmp_path / "transformers-5.99.0.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 5.99.0\n")
    code = "import sys, warnings; warnings.simplefilter('default'); sys.path.insert(0, sys.argv[1]); import loglinear\n"
    before, after = python(f"{code}print('light', flush=True); import {module}", tmp_path).split("light")
    assert "5.99.0" not in before
    assert after.count("transformers 5.99.0 is installed, and 5.17 to 5.24 are tested") == 1
