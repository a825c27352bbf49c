"""The built site in a headless Chromium, without a network: search finds, colours change, formulas and the explorer show."""

import functools
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import Browser
from test_explorer import chromium

WAIT = """
window.until = (ready) => new Promise((done, fail) => {
  const start = performance.now();
  const look = () => ready() ? done(true) : performance.now() - start > 20000 ? fail(ready.toString()) : setTimeout(look, 50);
  look();
});
window.type = (text) => {
  const box = document.querySelector(".md-search__input");
  box.focus();
  box.value = text;
  for (const name of ["input", "keyup"]) box.dispatchEvent(new Event(name, {bubbles: true}));
};
"""
PAGES = (
    "index.html",
    "start/five_minutes.html",
    "guides/decode.html",
    "concepts/tree.html",
    "reference/ops.html",
    "reference/commands.html",
    "kernels.html",
    "results.html",
    "explorer/index.html",
    "changelog.html",
)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, on this machine."""
    chromium()
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(chromium(), tmp_path_factory.mktemp("profile"))
    browser.prefer(color_scheme="light")
    yield browser
    browser.close()


@pytest.fixture
def page(address, browser):
    """Opens a page of the site. The test fails if the console has an error at its end."""

    def load(name: str, width: int = 1300) -> Browser:
        browser.resize(width, 900, phone=width < 500)
        browser.open(f"{address}/{name}")
        browser.run(WAIT)
        return browser

    browser.errors.clear()
    yield load
    assert browser.errors == []


@pytest.mark.parametrize("width", [1300, 400], ids=["desktop", "phone"])
def test_pages_load_without_errors_and_fit(page, width):
    for name in PAGES:
        opened = page(name, width)
        assert opened.run("document.querySelector('h1').textContent.trim().length") > 0, name
        wider = opened.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider == 0, name
        broken = "[...document.images].filter((x) => x.complete && x.naturalWidth === 0).map((x) => x.src)"
        assert opened.run(broken) == [], name


def test_search_finds_a_function(page):
    opened = page("index.html")
    opened.run("type('log_linear_delta_rule')")
    opened.run("until(() => document.querySelector('.md-search-result__link'))")
    links = opened.run("[...document.querySelectorAll('.md-search-result__link')].map((x) => x.href)")
    assert any("reference/ops.html" in link for link in links)


def test_colours_change_and_stay(page):
    opened = page("concepts/tree.html")
    background = "getComputedStyle(document.body).backgroundColor"
    light = opened.run(background)
    opened.run("document.querySelector('label[for^=__palette]:not([hidden])').click()")
    opened.run("until(() => document.body.dataset.mdColorScheme === 'slate')")
    assert opened.run(background) != light
    assert page("guides/layer.html").run("document.body.dataset.mdColorScheme") == "slate"
    opened.run("localStorage.clear()")


def test_formulas_have_a_size(page):
    sizes = page("concepts/tree.html").run(
        "[...document.querySelectorAll('math')].map((x) => x.getBoundingClientRect().height)"
    )
    assert len(sizes) >= 2
    assert min(sizes) > 10


def test_the_explorer_works_inside_the_site(page):
    opened = page("explorer/index.html")
    opened.run("until(() => document.querySelectorAll('.be-bucket:not([hidden])').length > 0)")
    before = opened.run("document.querySelectorAll('.be-bucket:not([hidden])').length")
    opened.run(
        "(() => { const x = document.querySelector('.bucket-explorer input[type=range]');"
        " x.value = 32; x.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    assert opened.run("document.querySelectorAll('.be-bucket:not([hidden])').length") == 2  # 32 and the token itself
    assert before != 2
