"""The files around the code: they parse, say what is so, and every command in them is a make target."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import steer_utils

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = ("CONTRIBUTING", "CHANGELOG", "CODE_OF_CONDUCT", "SECURITY")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def dry(command: str) -> None:
    """Ask make what it would do; fails if there is no such target."""
    assert command.split()[0] == "make", command
    done = subprocess.run(
        ["make", "--dry-run", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# --- pages ------------------------------------------------------------------------------------------------


def test_the_worked_example_of_a_mechanism_runs_and_passes_its_tests():
    blocks, names = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING, re.DOTALL | re.MULTILINE), {}
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    tests = [one for name, one in names.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()
    with pytest.raises(ValueError, match="factor must be above 0, not 0"):
        names["Sharpen"](0)


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_resolve_and_its_commands_are_targets(name: str):
    text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    for command in re.findall(r"`(make [^`]+)`", text):
        dry(command)


def test_the_version_is_the_same_everywhere_and_has_an_entry_in_the_changes():
    citation = read("CITATION.cff")
    assert citation["version"] == steer_utils.__version__
    assert f"\n## {steer_utils.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["repository-code"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [len(paper["authors"]) for paper in citation["references"]] == [8, 7, 8]


# --- where one starts -------------------------------------------------------------------------------------


def test_the_container_binder_and_the_hook_before_a_commit_run_make_targets():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    dry(container["onCreateCommand"])
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    dry(repo["hooks"][0]["entry"])
    script = (
        (ROOT / "binder" / "postBuild").read_text(encoding="utf-8").replace("\nmake ", "\nmake --dry-run ")
    )
    env = os.environ | {"NB_PYTHON_PREFIX": "/of/binder"}
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "/of/binder/bin/python -m pip install" in done.stdout
    assert (ROOT / "binder" / "postBuild").stat().st_mode & 0o111


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_asks_for(path: Path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    assert all({"type", "id"} <= part.keys() and part["attributes"]["label"] for part in form["body"])
    assert len({part["id"] for part in form["body"]}) == len(form["body"])
