"""The site builds strictly, loads nothing from elsewhere, and its reference names every public function and class."""

import importlib
import re
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]
MODULES = ("loglinear", "loglinear.ops", "loglinear.layers", "loglinear.models", "loglinear.distributed")


def pages(site: Path) -> list[Path]:
    found = sorted(site.rglob("*.html"))
    assert len(found) > 30
    return found


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="?(https?:[^">\s]+)|<link[^>]*\shref="?(https?:[^">\s]+)')
    assert {page.name: found for page in pages(site) if (found := loads.findall(page.read_text("utf-8")))} == {}


def test_links_to_elsewhere_are_well_formed(site):
    links = {link for page in pages(site) for link in re.findall(r'href="?(https?:[^">\s]+)', page.read_text("utf-8"))}
    assert len(links) > 3
    for link in links:
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", urlsplit(link).hostname or ""), link


def test_reference_names_everything_public(site):
    described = set()
    for page in (site / "reference").glob("*.html"):
        described |= {name.split(".")[-1] for name in re.findall(r'id="?(loglinear\.[\w.]+)', page.read_text("utf-8"))}
    public = {name for module in MODULES for name in importlib.import_module(module).__all__}
    public |= set(importlib.import_module("loglinear")._MODELS)
    constants = {"MIXERS", "MixerState"}  # a table, and a union of the states that are described
    assert public - constants - described == set()


def test_every_command_has_its_options(site):
    from loglinear.cli import COMMANDS

    text = (site / "reference/commands.html").read_text("utf-8")
    assert {name for name in COMMANDS if f'id="{name}"' not in text} == set()
    assert "options:" not in text
    assert "--learning-rate FLOAT" in text


def test_formulas_are_drawn_without_scripts(site):
    """Nothing of LaTeX is left: neither a formula as text nor a command that the converter does not know."""
    formulas = [x for page in pages(site) for x in re.findall("<math.*?</math>", page.read_text("utf-8"), re.S)]
    assert len(formulas) > 15
    assert [x for x in formulas if "\\" in x or "<mi>&<" in x] == []
    assert not any("arithmatex" in page.read_text("utf-8") for page in pages(site))


def test_the_changelog_is_the_repository_s(site):
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1]
    assert newest in (site / "changelog.html").read_text("utf-8")
