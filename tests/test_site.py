"""The website that `make site` has built: whole, without other hosts, and no wider than a phone."""

import html
import re
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

import steer_utils

sys.path.append(str(Path(__file__).parents[1] / "docs"))
import links

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
built = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="no build/site: make site")
in_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: make chromium")
PAGES = ["index", "notebooks/00_start_here", "notebooks/05_lm_steer_training", "docs/api", "docs/gallery"]


# --- links ------------------------------------------------------------------------------------------------


def test_a_link_without_a_target_and_a_part_from_another_host_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<p id="here">b</p><a href="a.html">a</a>')
    (tmp_path / "c.png").write_bytes(b"")
    good = '<a href="b.html#here">b</a><a href="https://x.org">x</a><a href="#own" id="own">o</a>'
    good += '<img src="c.png">'
    (tmp_path / "a.html").write_text(good)
    assert links.wrong(tmp_path) == []
    bad = '<a href="d.html">d</a><a href="b.html#there">t</a><a href="#not">n</a><img src="e.png">'
    bad += '<script src="https://cdn.org/x.js"></script><link href="//fonts.org/f.css" rel="stylesheet">'
    (tmp_path / "a.html").write_text(bad + "<style>p {background: url('http://x.org/y.png')}</style>")
    assert links.wrong(tmp_path) == [
        "a.html links to #not",
        "a.html links to b.html#there",
        "a.html links to d.html",
        "a.html links to e.png",
        "a.html loads //fonts.org/f.css",
        "a.html loads http://x.org/y.png",
        "a.html loads https://cdn.org/x.js",
    ]


# --- what is built ----------------------------------------------------------------------------------------


@built
def test_every_notebook_is_a_page_with_its_pictures_described_and_its_formulas_drawn():
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        text = (SITE / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        pictures = re.findall(r"<img[^>]+_images/[^>]+>", text)
        described = [re.search(r'alt="([^"]*)"', picture)[1] for picture in pictures]
        assert pictures
        assert min(len(one.split()) for one in described) >= 8, path.stem
        assert "<math" in text or "$" not in path.read_text(encoding="utf-8")
        assert f"colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{path.name}" in text


@built
def test_the_api_has_every_public_name_with_its_text_and_its_source():
    text = (SITE / "docs" / "api.html").read_text(encoding="utf-8")
    for name in steer_utils._WHERE:
        assert f'id="steer_utils.{name}"' in text
        first = re.split(r"[`'\"\n]", getattr(steer_utils, name).__doc__)[0]
        assert html.escape(first, quote=False) in text, name
    assert text.count("[source]") >= len(steer_utils._WHERE)
    assert "system-message" not in text


@built
def test_the_gallery_has_every_figure_of_the_notebooks_and_says_what_it_shows():
    text = (SITE / "docs" / "gallery.html").read_text(encoding="utf-8")
    described = {html.unescape(one) for one in re.findall(r'alt="([^"]*)"', text)}
    for path in (ROOT / "figures").glob("*.png"):
        with Image.open(path) as picture:
            assert " ".join(picture.text["Description"].split()) in described, path.name


# --- in a browser -----------------------------------------------------------------------------------------


@built
@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_no_other_host_and_fits_the_screen(browser, name: str, width: int):
    page, asked = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{SITE}/{name}.html")
    page.wait_for_timeout(500)  # for what scripts ask for once the page is there
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@built
@in_browser
@pytest.mark.slow
def test_a_search_finds_the_lesson_on_padding(browser):
    page = browser.new_page()
    page.goto(f"file://{SITE}/search.html?q=padding")
    expect(page.locator("#search-results a", has_text="X-vectors and padding").first).to_be_visible()
    page.close()
