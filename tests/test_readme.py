"""The README: its Python runs as it stands, its commands are there, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_python_in_it_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a model
    monkeypatch.setenv("TQDM_DISABLE", "1")
    blocks, names = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE), {}
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["table"]["completion"].str.len().min() > 0
    assert names["own"].names
    assert (tmp_path / "happy-model" / "model.safetensors").is_file()


def test_its_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {a or b for a, b in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", README, re.MULTILINE)}
    assert {"notebooks", "test", "lab"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_it_names_every_notebook_and_its_links_resolve():
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert f"(notebooks/{notebook.name})" in README
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_it_says_what_every_file_of_the_package_is_for():
    package = ROOT / "steer_utils"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", README))
    files = {file.removeprefix("course/") if "exercises" in file else file for file in files}
    assert named == {file for file in files if not file.endswith("__init__.py")}
