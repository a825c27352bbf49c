"""What a user installs: a wheel that holds everything, needs torch alone, and carries no trace of where it was made."""

import datetime
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INIT = (ROOT / "src/loglinear/__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.M).group(1)

# Run in an environment of the wheel and PyTorch alone. Builds of PyTorch for GPUs bring Triton, which is hidden.
USE_THE_WHEEL = r"""
import re
import sys
import traceback
from contextlib import redirect_stderr
from io import StringIO

sys.modules["triton"] = None
import torch
import loglinear

assert loglinear.__file__.startswith(sys.prefix), loglinear.__file__
q, k, v = torch.randn(1, 70, 1, 8), torch.randn(1, 70, 1, 8), torch.randn(1, 70, 2, 8)
ones = torch.ones(1, 70, 2, 8)
o, state = loglinear.log_linear_attention(q, k, v, None, ones, output_final_state=True)
expected = torch.tril(q[0, :, 0] @ k[0, :, 0].T) @ v[0].transpose(0, 1)
torch.testing.assert_close(o[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-4)
assert state.position.tolist() == [70]
assert "transformers" not in sys.modules
for name in loglinear._MODELS:
    try:
        getattr(loglinear, name)
    except ModuleNotFoundError as error:
        assert error.name == "transformers", error
        needs = f"loglinear.{name} needs transformers, which is not installed: pip install 'loglinear[models]'"
        assert str(error) == needs, error
        shown = traceback.format_exception(error)
        assert len("".join(shown).splitlines()) < 8, shown
    else:
        raise AssertionError("the models need transformers")
from loglinear.cli import COMMANDS, PROGRAMS, main
for name in COMMANDS:
    with redirect_stderr(StringIO()) as printed:
        assert main([name, "--help"]) == 1
    extra = PROGRAMS.get(name, "cli")
    line = rf"loglinear {name}: the command needs \w+, which is not installed: pip install 'loglinear\[{extra}\]'\n"
    assert re.fullmatch(line, printed.getvalue()), printed.getvalue()
print(loglinear.__version__)
"""


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=250, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(distributions) -> Path:
    return distributions["wheel"]


def test_wheel_holds_every_module_the_marker_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    package = {name for name in names if name.startswith("loglinear/")}
    assert package == modules | {"loglinear/py.typed"}
    info = f"loglinear-{VERSION}.dist-info"
    assert names - package == {
        f"{info}/{file}"
        for file in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
    }


def test_wheel_works_in_an_empty_environment_without_triton(environment, tmp_path):
    script = tmp_path / "use.py"
    script.write_text(USE_THE_WHEEL)
    version = run(environment("") / "python", "-I", "-W", "error::FutureWarning", script, cwd=tmp_path)
    assert version.strip() == VERSION


def test_sdist_holds_what_builds_the_wheel_and_nothing_else(distributions):
    """Tests, docs, benchmarks and experiments need each other: the repository has them, and the sdist has none of them."""
    top = f"loglinear-{VERSION}"
    with tarfile.open(distributions["sdist"]) as archive:
        names = {member.name.removeprefix(f"{top}/") for member in archive.getmembers() if member.isfile()}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "src").rglob("*.py")}
    made = {name for name in names if name.startswith("src/loglinear.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    files = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    assert names == modules | made | files | {"src/loglinear/py.typed"}


def test_twine_takes_both_files(distributions):
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.values())


def test_one_place_states_the_version(distributions):
    """``__version__``. The newest section of the changelog has it too, and a date."""
    assert [path.name.split("-")[1].removesuffix(".tar.gz") for path in distributions.values()] == [VERSION] * 2
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## \[(.+)\] - (\S+)$", changelog, re.M).groups()
    assert version == VERSION
    assert datetime.date.fromisoformat(date) >= datetime.date(2026, 11, 30)
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        stated = re.search(rf"version\W+{re.escape(VERSION)}", (ROOT / name).read_text(encoding="utf-8"), re.I)
        assert stated is None, (name, stated)


@pytest.fixture(scope="module")
def requirements(wheel) -> dict[str, str]:
    """What the wheel asks for: lower-case name to the rest of the line."""
    metadata = zipfile.ZipFile(wheel).read(f"loglinear-{VERSION}.dist-info/METADATA").decode()
    asked = {name.lower(): rest for name, rest in re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", metadata, re.M)}
    return {name: rest for name, rest in asked.items() if name != "loglinear"}


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    found = re.findall(r"^([\w-]+)==(\S+)$", text, re.M)
    versions = {package.lower().replace("_", "-"): version for package, version in found}
    assert len(versions) == len(found)
    return versions


def without_zeros(version: str) -> str:
    return re.sub(r"(\.0)+$", "", version)


@pytest.mark.parametrize("name", ["default", "newest", "oldest"])
def test_constraints_pin_what_the_wheel_asks_for(requirements, name):
    """Every requirement but the build backend has exactly one pin, so that a fresh machine gets what was tested."""
    assert {"torch", "triton", "transformers", "pytest"} < set(requirements)
    assert set(requirements) - set(pins(name)) - {"setuptools"} == set()


def test_the_oldest_pins_are_the_floors(requirements):
    """Of everything but the tools of developers and of the site, and Triton, which must be the one that PyTorch asks for."""
    floors = {
        name: without_zeros(re.search(r">=([\d.]+)", rest)[1])
        for name, rest in requirements.items()
        if not re.search(r'extra == "(dev|docs)"', rest)
    }
    assert {"torch", "transformers", "accelerate", "tyro", "lm-eval"} < set(floors)
    oldest = pins("oldest")
    assert {name: without_zeros(oldest[name]) for name in floors} == floors


def test_the_core_needs_torch_alone(requirements):
    """PyTorch's builds for GPUs bring Triton; on a CPU it would be a gigabyte that nothing imports."""
    assert {name for name, rest in requirements.items() if "extra ==" not in rest} == {"torch"}


def committed_files() -> list[Path]:
    """What git would commit; without git, everything outside hidden and generated folders."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        skip = {".venv", ".venv-newest", ".venv-oldest", ".venv-vllm", ".git", "out", "build", "dist", "__pycache__"}
        return [path for path in ROOT.rglob("*") if path.is_file() and not skip & set(path.relative_to(ROOT).parts)]


# An absolute path below a folder that differs from machine to machine; the look-behind spares URLs and relative paths.
MACHINE_PATH = re.compile(
    r"(?<![\w.~$}])/(?:home|Users|root|work|workspace|mnt|scratch|gpfs|nfs|tmp|private|opt|usr/local)/[\w.-]|[A-Z]:\\\\?Users"
)


def test_no_file_holds_a_path_of_a_machine():
    files = committed_files()
    assert ROOT / "README.md" in files
    found = []
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        hits = [match.group() for match in MACHINE_PATH.finditer(text)]
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in hits]
        if str(ROOT) in text:
            found.append(f"{path.relative_to(ROOT)}: the checkout's own path")
    assert found == []


@pytest.mark.parametrize("folder", ["home", "Users", "work", "tmp", "usr/local"])
def test_machine_paths_are_recognised(folder):
    path = "/" + folder + "/someone/model.pt"
    for text in (f'open("{path}")', f"cd {path}", path, f"PATH={path}"):
        assert MACHINE_PATH.search(text)
    for text in (f"https://host{path}", f"docs{path}", "a / b", "#!/usr/bin/env bash"):
        assert not MACHINE_PATH.search(text)
