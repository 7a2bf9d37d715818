"""What readers click on, in a real browser: a slider in JupyterLab, the playground, a stored page."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))
from pages import page as rendered

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SECONDS = 1000  # of playwright, in its milliseconds
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: apt-get install chromium"),
]


@contextmanager
def served(folder: Path, *command: str, ready: str) -> Iterator[str]:
    """A server of `python -m …` in a folder, with the address that stands for {port} in its command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [part.format(port=port) for part in command]
    reader = {name: value for name, value in os.environ.items() if name != "STEER_UTILS_STATIC"}
    with (folder / "server.log").open("w") as log:
        started = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=folder, env=reader, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            address = f"http://127.0.0.1:{port}"
            await_answer(f"{address}{ready}")
            yield address
        finally:
            started.terminate()
            started.wait(30)


def await_answer(url: str, tries: int = 300) -> None:
    for _ in range(tries):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except urllib.error.HTTPError:
            return  # it is there
        except OSError:
            time.sleep(0.3)
    raise TimeoutError(f"nothing answers at {url}")


def in_one_cell(number: str, folder: Path, last: str) -> Path:
    """A notebook's code up to the cell that holds `last`, as one cell of a notebook of its own."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    end = next(i for i, source in enumerate(code) if last in source)
    notebook.cells = [nbformat.v4.new_code_cell("\n".join(code[: end + 1]))]
    nbformat.write(notebook, folder / "one.ipynb")
    return folder


@contextmanager
def in_lab(browser: Browser, folder: Path, seen: str) -> Iterator[Page]:
    """JupyterLab with the notebook of the folder, run; `seen` selects something that its output holds."""
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port={port}"]
    options += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={folder}"]
    with served(folder, "jupyterlab", *options, ready="/api/status?token=t") as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{address}/lab/tree/one.ipynb?token=t&reset")
        cell, output = page.locator(".jp-Cell .cm-content").first, page.locator(seen).first
        cell.wait_for(timeout=90 * SECONDS)
        started = page.locator(".jp-InputPrompt", has_text=re.compile(r"\*|\d"))
        for _ in range(40):  # JupyterLab ignores keys until its kernel is connected
            cell.click()
            page.keyboard.press("Control+Enter")
            with suppress(AssertionError):
                expect(started.first).to_be_visible(timeout=3 * SECONDS)
                break
        output.wait_for(timeout=120 * SECONDS)
        yield page
        page.close()


def moved(page: Page, handle: Locator, picture: Locator) -> tuple[str, str]:
    """The picture's data before and after a press of the right arrow key on a slider's handle."""
    before = picture.get_attribute("src")
    handle.focus()
    handle.press("ArrowRight")
    for _ in range(200):
        if (after := picture.get_attribute("src", timeout=60 * SECONDS)) != before:
            return before, after
        page.wait_for_timeout(100)
    return before, before


def test_a_slider_in_jupyterlab_moves_by_keyboard_and_draws_another_figure_and_text(browser, tmp_path):
    with in_lab(browser, in_one_cell("00", tmp_path, "sliders.show("), ".widget-slider") as page:
        picture = page.locator(".jp-OutputArea img[src^='data:image/png']").last
        picture.wait_for(timeout=60 * SECONDS)
        text = page.locator(".jp-OutputArea td").last.inner_text()
        before, after = moved(page, page.locator(".widget-slider .noUi-handle").first, picture)
        assert before != after
        assert page.locator(".jp-OutputArea td").last.inner_text() != text


def test_the_playground_writes_with_voila(browser, tmp_path):
    shutil.copy(NOTEBOOKS / "10_playground.ipynb", tmp_path)
    options = ["10_playground.ipynb", "--no-browser", "--port={port}", "--Voila.ip=127.0.0.1"]
    with served(tmp_path, "voila", *options, ready="/voila/static/main.js") as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(address, timeout=180 * SECONDS)  # the notebook runs first
        button = page.get_by_role("button", name="Write")
        button.wait_for(timeout=120 * SECONDS)
        page.get_by_label("prompt").fill("My first week at the new school")
        button.click()
        table = page.locator("td", has_text="My first week at the new school")
        expect(table).to_have_count(3, timeout=90 * SECONDS)
        assert len({cell.inner_text() for cell in table.all()}) == 3
        expect(page.get_by_text("The steer moves the model by")).to_be_visible(timeout=60 * SECONDS)
        page.close()


@pytest.mark.parametrize("number", ["00", "01", "04", "05", "07"])
def test_the_twin_on_a_stored_page_moves_without_a_kernel_and_without_a_network(browser, number, tmp_path):
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    (tmp_path / "page.html").write_text(rendered(nbformat.read(path, as_version=4)), encoding="utf-8")
    page, asked = browser.new_page(viewport={"width": 390, "height": 844}), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{tmp_path}/page.html")
    twin = page.locator("[id^=slider-]").first
    frame, places = twin.locator("[aria-live]"), twin.locator("input")
    before = frame.inner_html()
    places.last.focus()
    places.last.press("ArrowRight" if int(places.last.input_value()) == 0 else "ArrowLeft")
    assert frame.inner_html() != before
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
