"""The files around the code: they parse, say what is so, and every command in them is a make target."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import steer_utils

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = ("CONTRIBUTING", "CHANGELOG", "CODE_OF_CONDUCT", "SECURITY")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def dry(command: str) -> None:
    """Ask make what it would do; fails if there is no such target."""
    assert command.split()[0] == "make", command
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True
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


# --- workflows --------------------------------------------------------------------------------------------


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_command_of_a_workflow_is_a_make_target_and_every_action_has_a_major_version(path: Path):
    steps = [step for job in jobs(path).values() for step in job["steps"]]
    for command in [step["run"] for step in steps if "run" in step]:
        dry(command)
    assert [step["uses"] for step in steps if not re.search(r"@v\d+$", step.get("uses", "@v1"))] == []
    assert all("run" in step or "uses" in step for step in steps)


def test_a_pull_request_takes_ten_minutes_at_most_and_runs_every_notebook_in_a_job_of_its_own():
    found = jobs(ROOT / ".github" / "workflows" / "pull-request.yml")
    assert max(job["timeout-minutes"] for job in found.values()) <= 10
    notebooks = sorted(path.stem[:2] for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    assert found["notebooks"]["strategy"]["matrix"]["notebook"] == notebooks, "name it in pull-request.yml"
    assert "slow" in found  # the other half of the tests


def test_the_canary_installs_without_constraints_on_every_python_and_on_macos_and_reports():
    found = jobs(ROOT / ".github" / "workflows" / "canary.yml")
    matrix = found["newest"]["strategy"]["matrix"]
    assert matrix["python"] == [f"3.{minor}" for minor in range(11, 15)]
    assert "macos-latest" in {one["os"] for one in matrix["include"]}
    commands = [step["run"] for step in found["newest"]["steps"] if "run" in step]
    assert commands
    assert all(command.split()[2] == "CONSTRAINTS=" for command in commands)
    assert (found["report"]["needs"], found["report"]["if"]) == ("newest", "failure()")


def test_dependabot_knows_where_versions_stand():
    assert {one["package-ecosystem"] for one in read(".github/dependabot.yml")["updates"]} == {
        "github-actions",
        "pip",
    }


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
