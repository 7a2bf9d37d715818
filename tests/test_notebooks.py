"""Every notebook: executed in an empty folder with the wheel installed, as on Colab, and as it is stored."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import tokenizers
import torch
import transformers
from filelock import FileLock

import steer_utils as su
from steer_utils.course import exercises, runs

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
SETUP = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
PARTS = ("You will be able to", "Time and memory", "fails", "Exercise 1", "Summary", "References")

LESSONS = [path for path in NOTEBOOKS if "playground" not in path.stem]

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def printed(path: Path) -> str:
    """All text that the stored outputs show."""
    outputs = [output for cell in cells(path) for output in cell.outputs]
    texts = [one.get("text", "") + "".join(one.get("data", {}).get("text/plain", "")) for one in outputs]
    return "\n".join(texts)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of tests, the same for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def installed(shared: Path) -> Path:
    """A folder with the package as pip installs it from a wheel."""
    site = shared / "site"
    with FileLock(shared / "site.lock"):  # one worker builds; the others wait here and find it done
        if not site.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            subprocess.run([*pip, "--target", site.with_suffix(".new"), ROOT], check=True)
            site.with_suffix(".new").rename(site)
    return site


@pytest.fixture(scope="session")
def tiny_gpt2(shared: Path) -> Path:
    """A random GPT-2 of eight blocks, with a tokenizer made from the course's texts, as a folder."""
    folder = shared / "tiny-gpt2"
    with FileLock(shared / "tiny.lock"):
        if not folder.exists():
            end = "<|endoftext|>"
            bpe = tokenizers.ByteLevelBPETokenizer()
            bpe.train_from_iterator(course_texts(), 8000, special_tokens=[end], show_progress=False)
            special = {"bos_token": end, "eos_token": end}
            tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
            torch.manual_seed(0)
            sizes = {"n_embd": 32, "n_layer": 8, "n_head": 4, "vocab_size": len(tokenizer)}
            how = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}  # so that steers move it
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **how))
            for part in (model, tokenizer):
                part.save_pretrained(folder.with_suffix(".new"))
            folder.with_suffix(".new").rename(folder)
    return folder


def course_texts() -> list[str]:
    """Film snippets and prompts, and word lists many times, so that their words are tokens."""
    texts = su.data.rated_sentences("movie")["text"].tolist()
    texts += [text for name in ("openings", "neutral", "hostile") for text in su.data.prompts(name)]
    lists = [" ".join(su.data.words(path)) for path in sorted((su.data.DATA / "wordlists").glob("*.txt"))]
    return texts + 20 * lists


def run(path: Path, site: Path, build: Path, *arguments: object) -> str:
    """Execute a notebook with the package from `site`, as on Colab; what it printed."""
    command = [sys.executable, ROOT / "notebooks" / "run.py", path.name, "--build", build, *arguments]
    reader = os.environ | {"PYTHONPATH": str(site), "COLAB_RELEASE_TAG": "release"}
    done = subprocess.run([*map(str, command)], cwd=build, env=reader, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return printed(build / path.name)


@pytest.mark.slow
@each_notebook
def test_runs_in_an_empty_folder_with_the_exercises_answered(path: Path, installed: Path, tmp_path: Path):
    # Few prompts and samples, which are written here. 08 shows what comes with the package, in its sizes.
    scale = () if path.stem.startswith("08") else ("-p", "SCALE", 0.1)
    text = run(path, installed, tmp_path, "--answers", *scale)
    assert not re.search("not yet|Warning", text)
    assert text.count("✔") == sum("exercises.check(" in cell.source for cell in cells(path))
    page = (tmp_path / path.name).with_suffix(".html").read_text(encoding="utf-8")
    assert 100_000 < len(page.encode()) < 1_500_000
    shell = re.sub(r'"data:image/[^"]*"', "", page)  # the pictures' letters spell anything
    assert not re.search(r"cdn|unpkg|jsdelivr|<script[^>]+src=|<img[^>]+src=.http", shell)


@pytest.mark.slow
@each_notebook
def test_the_full_profile_runs_to_the_last_cell(path: Path, installed: Path, tiny_gpt2: Path, tmp_path: Path):
    parameters = {"PROFILE": "full", "MODEL": tiny_gpt2, "SCALE": 0.05}
    if any(re.search("^SECOND = ", cell.source, re.MULTILINE) for cell in cells(path)):
        parameters["SECOND"] = tiny_gpt2
    run(path, installed, tmp_path, *(word for one in parameters.items() for word in ("-p", *one)))


@each_notebook
def test_is_stored_as_executed_in_order_with_a_picture_and_without_errors_or_warnings(path: Path):
    stored = [cell for cell in cells(path) if cell.source.strip()]
    assert [cell.execution_count for cell in stored] == list(range(1, len(stored) + 1))
    outputs = [output for cell in stored for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
    assert not re.search(r"Warning|%\||(?<![\w.])/(home|root|tmp|work|usr|Users)/", printed(path))
    pictures = [one.metadata.get("image/png", {}) for one in outputs if "image/png" in one.get("data", {})]
    assert pictures
    assert min(len(about.get("alt", "").split()) for about in pictures) >= 8
    assert path.stat().st_size < 1_000_000
    assert "widgets" not in nbformat.read(path, as_version=4).metadata  # a page shows stored frames


@each_notebook
def test_begins_with_the_same_cells_and_opens_a_gpu_runtime_in_colab(path: Path):
    setup, parameters, *_ = cells(path)
    assert setup.source == SETUP
    assert len([line for line in SETUP.splitlines() if line]) <= 5
    assert REPOSITORY in SETUP
    assert parameters.metadata.tags == ["parameters"]
    assert re.search(r'^PROFILE = "fast"', parameters.source, re.MULTILINE)
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "GPU"
    assert notebook.metadata.kernelspec.name == "python3"
    others = [other.name for other in NOTEBOOKS if other != path]
    assert [name for name in others if f"]({name})" not in notebook.cells[0].source] == []  # the map
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{place})" in notebook.cells[0].source


@each_lesson
def test_has_all_parts_of_a_lesson_short_cells_and_links_that_resolve(path: Path):
    prose = "\n".join(cell.source for cell in cells(path, "markdown"))
    stubs = [cell for cell in cells(path) if "exercise" in cell.metadata.get("tags", [])]
    assert [part for part in PARTS if part not in prose] == []
    assert 3 <= len(stubs) <= prose.count("<details>")
    assert [cell.source for cell in cells(path) if len(cell.source.splitlines()) > 25] == []
    assert ".." not in re.sub(r"\.\.\.", "", "\n".join(cell.source for cell in cells(path)))
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", prose)
    assert [target for target in targets if not (path.parent / target).exists()] == []


@each_lesson
def test_a_folded_answer_is_the_answer_that_the_check_compares_with(path: Path):
    code, prose = ("\n".join(cell.source for cell in cells(path, kind)) for kind in ("code", "markdown"))
    checks = re.findall(r'su\.exercises\.check\(\s*"(\d+)", (\w+)', code)
    folded = re.findall(r"<summary>Answer</summary>\s*```python\n(.*?)\n```", prose, re.DOTALL)
    assert [exercises.source(exercises.find(*check).answer) for check in checks] == folded
    assert {number for number, _ in checks} == {path.stem[:2]}


@each_lesson
def test_a_lesson_is_short(path: Path):
    lines = [line.strip() for cell in cells(path) for line in cell.source.splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) <= (300 if path.stem.startswith("08") else 250)


@pytest.mark.parametrize(
    ("tag", "numbers"),
    [("pplm.jl", ["02"]), ("activation_additions", ["03", "04"]), ("lm-steer", ["05", "06", "07"])],
)
def test_the_examples_of_the_originals_are_stored_with_their_outputs(tag: str, numbers: list[str]):
    for path in [path for path in NOTEBOOKS if path.stem[:2] in numbers]:
        tagged = [cell for cell in cells(path) if f"original:{tag}" in cell.metadata.get("tags", [])]
        assert tagged, path.stem
        assert any(cell.outputs for cell in tagged), path.stem


def test_the_wheel_carries_what_the_notebooks_read():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    carried = {Path(one).stem for one in wheel["force-include"] if one.startswith("figures/")}
    code = "\n".join(cell.source for path in NOTEBOOKS for cell in cells(path))
    named = set(re.findall(r'(?:notebook\.measured|notebook\.kept|on_file)\(\s*"(\w+)"', code))
    assert named | {runs.NAME} <= carried
    assert [name for name in carried - {runs.NAME} if f'"{name}"' not in code] == []


@each_notebook
def test_the_numbers_it_wrote_are_on_file(path: Path):
    kept = re.findall(r'notebook\.keep\(\s*"(\w+)"', "\n".join(cell.source for cell in cells(path)))
    assert kept
    for name in kept:
        assert name.startswith(path.stem[:2])
        files = sorted((ROOT / "figures").glob(f"{name}.*"))
        assert files, f"figures/ lacks {name}; type: make figures NB={path.stem[:2]}"
        assert all(json.loads(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".json")
