"""The bucket explorer in a headless Chromium: what the page draws is what ``loglinear`` computes."""

import itertools
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from browser import INSTALL, Browser, executable

from loglinear import DecodingState, fenwick
from loglinear.layers.state import KVState

FOLDER = Path(__file__).parents[2] / "docs" / "explorer"
LARGEST = 2**20 - 1
ROOMS = (64, 1024, 32768, LARGEST + 1)
MAMBA2 = {"H": 48, "G": 1, "K": 128, "V": 64, "heads": 16, "width": 96}

# Short names for the scripts below.
HELPERS = """
window.part = (name) => document.querySelector(`[data-part="${name}"]`);
window.set = (element, value, event) => { element.value = value; element.dispatchEvent(new Event(event, {bubbles: true})); };
window.shown = () => [...document.querySelectorAll(".be-bucket:not([hidden])")];
window.buckets = () => shown().map(({dataset: d}) =>
  [d.level, d.entry, d.start, d.stop].map((x) => x === "" ? null : Number(x)));
window.texts = (selector) => [...document.querySelectorAll(selector)].map((x) => x.textContent.trim());
window.spot = (element) => { element.scrollIntoView({block: "center"}); const r = element.getBoundingClientRect();
  return [r.x + r.width / 2, r.y + r.height - 4]; };
window.outside = (width) => [...document.querySelectorAll("body *")].map((x) => [x.getBoundingClientRect(), x])
  .filter(([{left, right}]) => left < -0.5 || right > width + 0.5).map(([, x]) => x.outerHTML.slice(0, 80));
window.figures = () => [...document.querySelectorAll("[data-bytes]")].map((x) => [x.dataset.bytes, x.cells[1].textContent]);
"""


def chromium() -> str:
    """Its path. Without it tests are skipped; CI must have it."""
    path = executable()
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(INSTALL)
    return path


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    browser = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(started):
    """The page as just opened, on a desktop, in light mode. The test fails if the console has an error at its end."""
    started.resize(1100, 900)
    started.prefer(color_scheme="light", reduced_motion="no-preference")
    started.errors.clear()
    started.open((FOLDER / "standalone.html").as_uri())
    started.run(HELPERS)
    yield started
    assert started.errors == []


def seen_by(t: int, C: int) -> list[list[int | None]]:
    """[level, entry, first token, last token + 1] of every bucket, far to near, by ``loglinear.fenwick``."""
    n = t // C
    entries = [(e, [C * fenwick.bucket(e).start, C * e]) for e in fenwick.query_path(n)]
    inside = [(None, [n * C + x for x in (e - fenwick.lowbit(e), e)]) for e in fenwick.query_path(t % C)]
    return [[fenwick.level(t, a), e, a, b] for e, (a, b) in [*entries[::-1], *inside[::-1], (None, [t, t + 1])]]


def positions(C: int, room: int) -> list[int]:
    """13 tokens below ``room``: the first, the last, around a chunk and around powers of two, and some between."""
    draw = random.Random(C * room)
    edges = {t for t in (0, 1, C - 1, C, C + 1, room // 2 - 1, room // 2, room - 2, room - 1) if t < room}
    while len(edges) < 13:
        edges.add(draw.randrange(room))
    return sorted(edges)


def test_the_expected_buckets_are_the_levels_of_all_tokens():
    for C, t in itertools.product((1, 4, 16), (0, 1, 15, 16, 37, 63)):
        by_level = {}
        for s in range(t + 1):
            by_level.setdefault(fenwick.level(t, s), []).append(s)
        assert [(level, a, b - 1) for level, _, a, b in seen_by(t, C)] == [
            (level, tokens[0], tokens[-1]) for level, tokens in by_level.items()
        ]


def test_the_slider_draws_what_fenwick_says_at_208_positions(page):
    moved = 0
    move = '(t) => (set(part("slider"), t, "input"), [buckets(), part("heading").textContent])'
    for C, room in itertools.product((1, 4, 16, 64), ROOMS):
        page.run(f'set(part("slider"), 0, "input"); set(part("C"), {C}, "change"); set(part("room"), {room}, "change")')
        tokens = positions(C, room)
        for t, (drawn, heading) in zip(tokens, page.run(f"{tokens}.map({move})"), strict=True):
            assert drawn == seen_by(t, C), (t, C)
            assert heading.startswith(f"Token {t:,} sees {len(drawn)} bucket")
            moved += 1
    assert moved == 208


@pytest.mark.parametrize("scale", ["position", "distance"])
def test_buckets_stand_side_by_side_and_touch_the_whole_line(page, scale):
    page.run(f'set(part("scale"), "{scale}", "change")')
    for t, room in ((13, 64), (1000, 1024), (1023, 1024), (999_999, LARGEST + 1)):
        page.run(f'set(part("room"), {room}, "change"); set(part("exact"), {t}, "input")')
        boxes = page.run(
            "[...shown(), part('future')].map((x) => x.getBoundingClientRect()).map((r) => [r.left, r.right])"
        )
        left, right = page.run("(({left, right}) => [left, right])(part('line').getBoundingClientRect())")
        assert boxes[0][0] == pytest.approx(left, abs=0.5)
        assert boxes[-1][1] == pytest.approx(right, abs=0.5)
        for (_, end), (start, _) in itertools.pairwise(boxes):
            assert start == pytest.approx(end + 1, abs=0.1)  # a gap of a pixel
        assert all(b - a >= 2.9 for a, b in boxes[:-1])


def test_the_number_takes_a_million_and_says_what_it_does_not_take(page):
    page.run('part("exact").focus(); set(part("exact"), 1000000, "input")')
    assert page.run("buckets()") == seen_by(1_000_000, 1)
    assert page.run('[part("room").value, part("error").hidden]') == ["1048576", True]
    for wrong, shown in (("-1", "-1"), (str(LARGEST + 1), str(LARGEST + 1)), ("1.5", "1.5"), ("", "none")):
        page.run(f'set(part("exact"), "{wrong}", "input")')
        assert page.run('part("error").textContent') == f"t must be a whole number from 0 to {LARGEST:,}: got {shown}."
        assert page.run("buckets()") == seen_by(1_000_000, 1)
    page.run('part("exact").blur()')
    assert page.run('[part("exact").value, part("error").hidden]') == ["1000000", True]


def details(page) -> list[str]:
    return page.run('texts("[data-part=details] dd")')


def test_a_bucket_shows_level_entry_tokens_size_and_lambda_when_pointed_at_focused_and_tapped(page):
    page.run('set(part("C"), 4, "change")')  # 47 = 101111: levels 6 4 | 3 2 1 and itself
    at = "spot(shown()[{}])"
    x, y = page.run(at.format(0))
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert details(page) == ["6", "8", "0–31", "32 tokens", "0.60"]
    page.run("shown()[1].focus()")
    assert details(page) == ["4", "10", "32–39", "8 tokens", "1.04"]
    assert "holds chunks 8–9." in page.run('part("details").textContent')
    page.resize(360, 740, phone=True)
    page.tap(*page.run(at.format(2)))
    assert details(page) == ["3", "11", "40–43", "4 tokens", "0.51"]
    page.tap(*page.run("spot(part('rows').querySelectorAll(':not([hidden]) > b')[3])"))
    assert details(page) == ["2", "none", "44–45", "2 tokens", "1.24"]


def test_lambda_is_softplus_of_its_slider(page):
    for x in (-4, -0.5, 0, 1.25, 4):
        page.run(f'set(document.querySelector(".be-rows > :not([hidden]) input"), {x}, "input")')
        (first, *_) = page.run('texts(".be-rows > :not([hidden]) output")')
        assert first == f"{math.log1p(math.exp(x)):.2f}"
    page.run('part("flat").click()')
    assert set(page.run('texts(".be-rows output")')) <= {"1.00", "0.60", "0.80", ""}
    assert set(page.run('texts(".be-rows > :not([hidden]) output")')) == {"1.00"}


def counter(page) -> tuple[dict[int, int], str, str]:
    """Entry by live slot, the entry on its way, and the caption."""
    slots = page.run(
        '[...document.querySelectorAll("[data-slot][data-entry]")].map((x) => [x.dataset.slot, x.dataset.entry])'
    )
    carried, caption = page.run('[part("carried").innerText, part("caption").textContent]')
    return {int(m): int(e) for m, e in slots}, " ".join(carried.split()), caption


def live_slots(n: int) -> dict[int, int]:
    """Slot m holds the entry of 2**m chunks (``LogLinearState``)."""
    return {fenwick.lowbit(e).bit_length() - 1: e for e in fenwick.query_path(n)}


@pytest.mark.parametrize(("t", "C"), [(0, 1), (13, 1), (47, 1), (63, 1), (11, 4), (700, 64), (1023, 64)])
def test_a_carry_step_by_step_and_back(page, t, C):
    page.run(f'set(part("C"), {C}, "change"); set(part("exact"), {t}, "input")')
    n, e, history = t // C, t // C + 1, [counter(page)]
    assert history[0][0] == live_slots(n)
    page.run('part("next").click()')
    history.append(counter(page))
    assert history[-1][:2] == (live_slots(n), f"Carry entry {e:,} chunk {n}")
    held = live_slots(n)
    for k, merged in enumerate(fenwick.merges(e)):
        page.run('part("next").click()')
        assert held.pop(k) == merged
        history.append(counter(page))
        assert history[-1][:2] == (held, f"Carry entry {e:,} chunks {e - 2 ** (k + 1)}–{n}")
        assert history[-1][2].startswith(
            f"Slot {k} was full. Its entry {merged} is merged into entry {e}, which now holds"
        )
    page.run('part("next").click()')
    assert counter(page)[:2] == (live_slots(e), "Carry nothing")
    assert page.run('part("exact").value') == str(e * C)
    assert page.run('part("status").textContent') == counter(page)[2]  # what a screen reader says
    for before in reversed(history[1:]):
        page.run('part("back").click()')
        assert counter(page)[:2] == before[:2]
    page.run('part("back").click()')
    assert (counter(page)[0], page.run('part("exact").value')) == (live_slots(n), str(n * C))


SIZES = [
    ("scalar", "bfloat16", "float32", MAMBA2),
    ("scalar", "float32", "bfloat16", {"H": 4, "G": 2, "K": 32, "V": 48, "heads": 2, "width": 24}),
    ("delta", "bfloat16", "bfloat16", {"H": 6, "G": 6, "K": 192, "V": 384, "heads": 8, "width": 64}),
]


@pytest.mark.parametrize(("rule", "dtype", "entries", "sizes"), SIZES)
def test_bytes_are_those_of_the_library(page, rule, dtype, entries, sizes):
    for name, value in {"rule": rule, "dtype": dtype, "entries": entries, **sizes}.items():
        page.run(f"""set(document.querySelector('[data-size="{name}"]'), "{value}", "input")""")
    kind, entry_kind = getattr(torch, dtype), getattr(torch, entries)
    for t, C in ((0, 64), (1, 1), (47, 1), (63, 64), (64, 64), (4095, 16), (131_072, 64), (1_000_000, 64)):
        page.run(f'set(part("C"), {C}, "change"); set(part("exact"), {t}, "input")')
        shown = {name: int(text.replace(",", "")) for name, text in page.run("figures()")}
        heads = [sizes[name] for name in "HGKV"]
        state = DecodingState.empty(1, *heads, max(t, 1), kind, entry_kind, rule == "delta", "meta", C)
        pair = torch.empty(1, 0, sizes["heads"], sizes["width"], dtype=kind, device="meta")
        cache = KVState(torch.zeros(1, dtype=torch.int64, device="meta"), pair, pair).for_decoding(t)
        assert shown["state"] == state.nbytes, (t, C)
        assert shown["cache"] == cache.nbytes, (t, C)
        assert shown["entries"] == state.entries.numel() * state.entries.element_size()
        assert sum(shown.values()) == 2 * state.nbytes + cache.nbytes
        live = page.run('part("bytes").rows[0].cells[0].textContent')
        slots = state.entries.shape[2]
        assert live == f"Entries, {(t // C).bit_count()} of {slots} slot{'s' * (slots > 1)} live"


def test_sizes_that_do_not_fit_are_named_as_the_library_names_them(page):
    page.run("""set(document.querySelector('[data-size="G"]'), 5, "input")""")
    assert page.run('[part("wrong").textContent, part("memory").hidden, part("model").value]') == [
        "H must be a multiple of G: got H = 48, G = 5.", True, "own"
    ]  # fmt: skip
    page.run("""set(document.querySelector('[data-size="K"]'), 0, "input")""")
    assert page.run('part("wrong").textContent') == "K must be a whole number from 1 to 65,536: got 0."
    page.run('set(part("model"), "deltanet", "change")')
    assert page.run('[part("wrong").hidden, part("memory").hidden]') == [True, False]


def test_the_keyboard_reaches_and_moves_everything(page):
    page.run('part("slider").focus()')
    for key, t in (("ArrowRight", 48), ("ArrowLeft", 47), ("Home", 0), ("End", 63), ("ArrowLeft", 62)):
        page.press(key)
        assert page.run("buckets()") == seen_by(t, 1)
    assert page.run('part("slider").getAttribute("aria-valuetext")') == "Token 62, 6 buckets"
    reached = []
    for _ in range(60):
        page.press("Tab")
        name = "const {dataset: d, className: c, tagName: n} = document.activeElement;"
        reached.append(page.run(f"(() => {{ {name} return d.part ?? d.try ?? d.size ?? (c || n); }})()"))
        if reached[-1] == "BODY":
            break
    wanted = {
        "less",
        "exact",
        "more",
        "room",
        "C",
        "scale",
        "flat",
        "example",
        "back",
        "next",
        "model",
        "rule",
        "width",
    }
    assert wanted <= set(reached)
    assert sum("be-bucket" in name for name in reached) == 1  # one stop; arrow keys move on from there
    assert reached.count("INPUT") == 6  # the λ of each bucket
    page.run('part("line").querySelector("[tabindex=\\"0\\"]").focus()')
    for key, level in (
        ("Home", 6),
        ("ArrowLeft", 6),
        ("ArrowRight", 5),
        ("End", 0),
        ("ArrowRight", 0),
        ("ArrowLeft", 2),
    ):
        page.press(key)
        assert page.run("Number(document.activeElement.dataset.level)") == level
        assert details(page)[0] == str(level)
    label = page.run('document.activeElement.getAttribute("aria-label")')
    assert label == "Level 2, entry 62, 2 tokens, 60–61, λ 1.24"
    page.run('part("next").focus()')
    page.press("Enter")
    assert page.run('part("status").textContent').startswith("Token 62 arrives and chunk 62 is complete.")


def test_a_phone_shows_everything_without_scrolling_sideways(page):
    page.resize(360, 740, phone=True)
    for index, C in itertools.product(range(3), (1, 64)):
        page.run(f'document.querySelectorAll("[data-try]")[{index}].click(); set(part("C"), {C}, "change")')
        page.run('part("next").click()')
        assert page.run("document.documentElement.scrollWidth") <= 360
        assert page.run("outside(360)") == []
    heights = page.run('[...document.querySelectorAll("button, select")].map((x) => x.getBoundingClientRect().height)')
    assert len(heights) > 20
    assert all(height == 0 or height >= 32 for height in heights)  # large enough for a finger; 0 is hidden
    page.tap(*page.run('spot(part("more"))'))
    assert page.run('part("exact").value') == "1000001"


def test_light_and_dark_follow_the_system_and_the_site(page):
    colours = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(part('details')))"
    light = page.run(colours)
    page.prefer(color_scheme="dark")
    dark = page.run(colours)
    assert set(light).isdisjoint(dark)
    page.run('document.body.dataset.mdColorScheme = "default"')
    assert page.run(colours) == light
    page.prefer(color_scheme="light")
    page.run('document.body.dataset.mdColorScheme = "slate"')
    assert page.run(colours) == dark


def test_nothing_moves_for_those_who_ask_for_it(page):
    animation = "getComputedStyle(shown()[0]).animationName"
    assert page.run(animation) == "be-appear"
    page.prefer(reduced_motion="reduce")
    assert page.run(animation) == "none"


def test_both_pages_load_the_same_files_and_nothing_else():
    site, alone = ((FOLDER / name).read_text(encoding="utf-8") for name in ("index.md", "standalone.html"))
    files = re.compile(r'(?:src|href)="(?!data:)([^"]+)"')
    assert files.findall(site) == files.findall(alone) == ["explorer.css", "model.js", "explorer.js"]
    for path in FOLDER.iterdir():
        assert not re.search(r"https?://|\bfetch\(|import\(", path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_ci_fails_without_chromium_and_says_how_to_install_it(monkeypatch, ci, outcome):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium"):
        chromium()
