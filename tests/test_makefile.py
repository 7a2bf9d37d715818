"""Make's variables: what is typed as NAME=value reaches a command as one text and is never run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for Python and ruff: writes down what it was given.
NOTE = """#!/bin/sh
[ "$1" = -c ] || for one in "$(basename "$0")" "$@" ""; do printf '%s\\0' "$one"; done >>called
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Makefile in a folder where everything seems installed."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "ruff"):
        (tmp_path / ".venv" / "bin" / name).write_text(NOTE)
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    return tmp_path


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    how = {"cwd": folder, "capture_output": True, "text": True, "env": os.environ | environment}
    return subprocess.run(["make", *words], **how)


def calls(folder: Path) -> list[list[str]]:
    """The words of each call of a stand-in, which end with an empty one."""
    words = (folder / "called").read_text().split("\0\0")[:-1]
    (folder / "called").unlink()
    return [one.split("\0") for one in words]


VALUES = [
    "x; touch owned",
    "x' ; touch owned; '",
    'x" ; touch owned; "',
    "$(touch owned)",
    "$(shell touch owned)",
    "`touch owned`",
    "two words",
    "x && touch owned",
    "x\\",
    "*",
    "#x",
]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("target", "name", "wanted"),
    [
        ("notebooks", "MODEL", ["python", "notebooks/run.py", "-p", "MODEL", "{}"]),
        ("notebooks", "PROFILE", ["python", "notebooks/run.py", "-p", "PROFILE", "{}"]),
        ("notebooks", "SCALE", ["python", "notebooks/run.py", "-p", "SCALE", "{}"]),
        ("notebooks", "SEED", ["python", "notebooks/run.py", "-p", "SEED", "{}"]),
        ("grade", "FILE", ["python", "notebooks/classroom.py", "grade", "{}"]),
        (
            "test",
            "ONLY",
            [
                "python",
                "-m",
                "pytest",
                "-n",
                "logical",
                "--maxprocesses",
                "4",
                "--maxschedchunk",
                "1",
                "-k",
                "{}",
            ],
        ),
        (
            "install",
            "CONSTRAINTS",
            ["python", "-m", "pip", "install", "--quiet", "--constraint", "{}", "--editable"],
        ),
    ],
)
def test_a_value_is_one_word_of_the_command_and_nothing_of_it_is_run(folder, target, name, wanted, value):
    shown = make(folder, "-n", target, f"{name}={value}")
    assert shown.returncode == 0, shown.stderr
    assert "owned" not in shown.stdout  # where a shell would read it
    for words, environment in (((target, f"{name}={value}"), {}), ((target,), {name: value})):
        assert make(folder, *words, **environment).returncode == 0
        assert [word.format(value) for word in wanted] in [one[: len(wanted)] for one in calls(folder)]
    assert not list(folder.rglob("owned"))


@pytest.mark.parametrize("value", VALUES)
def test_names_of_notebooks_and_a_repository_are_not_run_either(folder, value):
    assert make(folder, "notebooks", f"NB={value}").returncode == 0
    assert make(folder, "full", f"NB={value}").returncode == 0
    before = (folder / "pyproject.toml").read_text()
    refused = make(folder, "badges", f"REPO={value}")
    assert refused.returncode != 0
    assert "Which repository? Type: make badges REPO=owner/name" in refused.stderr
    assert (folder / "pyproject.toml").read_text() == before
    assert not list(folder.rglob("owned"))


def test_several_notebooks_are_several_words_and_no_value_is_no_word(folder):
    assert make(folder, "notebooks", "NB=00 03").returncode == 0
    assert calls(folder) == [["python", "notebooks/run.py", "00", "03"]]
    assert make(folder, "install", "CONSTRAINTS=").returncode == 0
    assert calls(folder)[0][:6] == ["python", "-m", "pip", "install", "--quiet", "--editable"]
    assert make(folder, "install").returncode == 0
    assert calls(folder)[0][4:7] == ["--quiet", "--constraint", "constraints.txt"]


def test_a_misspelt_variable_is_an_error_that_lists_those_there_are(folder):
    for word in ("MODLE=gpt2", "NOTEBOOK=00"):
        done = make(folder, "notebooks", word)
        assert done.returncode != 0
        assert f"There is no {word.split('=')[0]} to set. There are: NB PROFILE MODEL" in done.stderr
    assert not (folder / "called").exists()
    assert make(folder, "notebooks", "SEED=3", "PYTHON=python3", "-s").returncode == 0
