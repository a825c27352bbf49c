"""The style of figures: readable on light and dark pages, labels that do not overlap, the same bytes twice."""

import itertools
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from loglinear.tasks import style
from loglinear.tasks.lm.figure import draw_losses
from loglinear.tasks.lm.levels import draw_levels
from loglinear.tasks.lm.retrieval import draw_retrieval
from loglinear.tasks.mqar.config import FIRST_FIVE
from loglinear.tasks.niah.figure import draw_heatmaps

PAGES = {"white": "#ffffff", "dark": "#0d1117"}
# Machado, Oliveira and Fernandes (2009), full loss of one kind of cones, on linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05 for color in (one, other))
    return high / low


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", PAGES)
def test_text_and_lines_can_be_read_on_both_pages(page):
    assert contrast(style.INK, PAGES[page]) > 4
    assert min(contrast(color, PAGES[page]) for color in [*style.COLORS.values(), style.FAINT]) > 2.9


@pytest.mark.parametrize("kind", BLINDNESS)
def test_models_have_different_colours_for_every_eye(kind):
    assert set(style.COLORS) == set(FIRST_FIVE)
    seen = [lab(np.array(BLINDNESS[kind]) @ linear(color)) for color in style.COLORS.values()]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 12


def test_names_and_numbers_are_those_that_people_write():
    assert style.name_of("log_linear_gated_deltanet") == "Log-Linear Gated DeltaNet"
    assert style.name_of("out/my-run") == "out/my-run"
    assert [style.tokens(n) for n in (0, 1000, 16384, 65536, 1 << 20)] == ["0", "1000", "16K", "64K", "1M"]
    assert [style.plain(x) for x in (0.5, 20, 8e4, 1.5e6, 2e9)] == ["0.5", "20", "80K", "1.5M", "2B"]
    assert [style.in_bytes(n) for n in (512, 8 << 30, 92496936, 3 << 29)] == ["512 B", "8 GiB", "88 MiB", "1.5 GiB"]


def test_a_model_keeps_its_colour_and_none_is_given_twice():
    known = style.colors_of(["Mamba-2", "Transformer"])
    assert known == {name: style.COLORS[name] for name in known}
    mixed = style.colors_of(["a-run", "Mamba-2, K 8", "Mamba-2, K 56", "Log-Linear Mamba-2, K 8"])
    assert mixed["Mamba-2, K 8"] == style.COLORS["Mamba-2"]
    assert len({*mixed.values()}) == 4


def test_labels_move_apart_and_no_further_than_they_must():
    assert style.apart([0.1, 0.5, 0.9], 0.2) == [0.1, 0.5, 0.9]
    assert style.apart([0.5, 0.52], 0.1) == pytest.approx([0.46, 0.56])
    crowded = style.apart([0.0, 0.0, 0.01, 0.95, 1.0, 1.0], 0.1)
    assert np.diff(crowded).min() >= 0.1 - 1e-9
    assert crowded[0] >= 0
    assert crowded[-1] <= 1


def test_an_end_outside_of_the_panel_has_an_arrow():
    _, panels = style.canvas("A title", right=2.0)
    panel = panels[0, 0]
    panel.set_ylim(0, 1)
    style.label_ends(panel, [(0.5, "inside", "C0"), (7.0, "above", "C1")])
    assert [text.get_text() for text in panel.texts] == ["inside", "above ↑"]


def test_a_long_title_is_broken_but_no_name():
    figure, _ = style.canvas("A sentence that is far too long for one line " * 2 + "Log-Linear Gated DeltaNet")
    lines = figure.texts[0].get_text().replace("\u00a0", " ").splitlines()
    assert len(lines) > 1
    assert any("Log-Linear Gated DeltaNet" in line for line in lines)


def title_of(draw, monkeypatch, *arguments, **more):
    """The title that a function gives to its figure, which is not written."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    draw(*arguments, **more)
    return figures[0].texts[0].get_text().replace("\u00a0", " ").replace("\n", " ")


def test_titles_say_what_the_numbers_are(monkeypatch):
    path = Path("nowhere")
    losses = np.repeat([2.75, 2.25], 32).astype(np.float32) + np.zeros((4, 1), np.float32)
    assert title_of(draw_losses, monkeypatch, {"run": losses}, path, 2) == (
        "Loss of run: 2.75 nats at the start of a sequence and 2.25 at its end"
    )
    assert title_of(draw_losses, monkeypatch, {"Mamba-2": losses, "Log-Linear Mamba-2": losses - 0.5}, path) == (
        "Mean loss beside Mamba-2, in nats per token: Log-Linear Mamba-2 −0.500"
    )
    cells = [{"kind": "word", "context": n, "depth": 0.5, "exact": share} for n, share in ((1024, 1.0), (4096, 0.5))]
    assert title_of(draw_heatmaps, monkeypatch, {"run": cells}, path, 1024) == (
        "run: 100% of needles are found up to 1K, the longest length of the fine-tune, 50% beyond it"
    )
    layers = [{"layer": "model.layers.0", "heads": [[0.5, 1.0, 2.0, None]]}]
    assert title_of(draw_levels, monkeypatch, layers, path) == (
        "λ is largest at level 2 (2.00) and smallest at level 0 (0.50), mean over layers"
    )
    rows = [{"distance": d, "exact": x, "without": 0, "exact_standard_error": 0, "without_standard_error": 0}
            for d, x in ((512, 0.9), (2048, 0.25))]  # fmt: skip
    assert title_of(draw_retrieval, monkeypatch, {"run": rows}, path) == (
        "run gives back 90% of values at 512 tokens and 25% of values at 2,048 tokens"
    )


@style.styled
def drawn(path):
    figure, panels = style.canvas("One title", note="a note")
    panels[0, 0].plot([1024, 2048, 4096], [3, 2, 1], color=style.COLORS["Mamba-2"])
    style.token_axis(panels[0, 0], [1024, 2048, 4096])
    return style.save(figure, path)


def test_png_and_svg_are_transparent_and_the_same_twice(tmp_path):
    first, second = drawn(tmp_path / "one" / "a.png"), drawn(tmp_path / "two" / "a")
    assert [path.name for path in first] == ["a.png", "a.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    pixels = matplotlib.image.imread(first[0])
    assert pixels[0, 0, 3] == 0
    assert pixels[..., 3].max() == 1
    assert "<dc:date>" not in first[1].read_text()
