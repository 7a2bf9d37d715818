"""README and docs/: their Python runs as it stands, their commands are there, their links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)


@pytest.mark.slow
def test_the_python_in_them_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a model
    monkeypatch.setenv("TQDM_DISABLE", "1")
    blocks, names = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE), {}
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "a page", "exec"), names)
    assert names["table"]["completion"].str.len().min() > 0
    assert names["own"].names
    assert (tmp_path / "happy-model" / "model.safetensors").is_file()


def test_their_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {a or b for a, b in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", TEXT, re.MULTILINE)}
    assert {"notebooks", "test", "lab"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path: Path):
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", path.read_text(encoding="utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_the_readme_names_every_notebook():
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert f"(notebooks/{notebook.name})" in README


def test_a_page_says_what_every_file_of_the_package_is_for():
    package = ROOT / "steer_utils"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", (ROOT / "docs" / "code.md").read_text(encoding="utf-8")))
    files = {file.removeprefix("course/") if "exercises" in file else file for file in files}
    assert named == {file for file in files if not file.endswith("__init__.py")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "row"),
    [
        ("steer_utils", "steer_utils"),
        ("hook", "a hook written by hand"),
        ("transformer_lens", "[TransformerLens]"),
    ],
)
def test_a_batch_is_as_much_alike_as_the_readme_says(program: str, row: str):
    said = re.search(rf"^\| {re.escape(row)}.* (\d of 6) \|$", README, re.MULTILINE)[1]
    command = [sys.executable, "tests/peers/batched.py", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{program}: {said} alike, 6 of them steered"
