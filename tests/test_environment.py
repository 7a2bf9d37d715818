"""The files that describe the environment agree with each other, and importing the package is quick."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import steer_utils

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# conda-forge's "playwright" is the one for Node
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright", "ray-default": "ray"}


def ranges(requirements: Iterable[Requirement]) -> dict[str, str]:
    """name -> version range; names as pip compares them, so that transformer_lens is transformer-lens."""
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


def declared(*left_out: str) -> dict[str, str]:
    """name -> version range of every dependency in pyproject.toml, extras included but those left out."""
    extras = [lines for name, lines in PROJECT["optional-dependencies"].items() if name not in left_out]
    return ranges(map(Requirement, [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]))


def test_environment_yml_has_the_same_ranges_as_pyproject_and_asks_for_the_same_python():
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{PROJECT['requires-python']}" in lines
    (pip,) = (line["pip"] for line in lines if isinstance(line, dict))  # what conda-forge may not have
    conda = [line for line in lines if isinstance(line, str)]
    found = ranges(Requirement(line) for line in [*conda, *pip] if not line.startswith("--editable"))
    found = {CONDA_NAMES.get(name, name): found[name] for name in found.keys() - {"python", "pip"}}
    assert found == declared("site")


def test_conda_forge_has_each_package_that_environment_yml_asks_it_for_in_that_range():
    listed = (ROOT / "tests" / "conda_forge.txt").read_text().splitlines()[1:]
    seen = dict(line.split() for line in listed)
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    for wanted in (Requirement(line) for line in lines if isinstance(line, str)):
        assert wanted.name in seen, f"{wanted.name}: which name has it on conda-forge?"
        assert seen[wanted.name] in wanted.specifier, f"{wanted}: {seen[wanted.name]} was seen"


def test_environment_yml_gives_a_reason_for_each_dependency():
    for line in (ROOT / "environment.yml").read_text().splitlines():
        if re.match(r" +- [\w-]+[>=]=", line):
            assert re.search(r"# \w+", line), f"no reason beside {line.strip()!r}"


def pins() -> dict[str, str]:
    """name -> version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def needs(name: str) -> list[Requirement]:
    """What an installed package requires on this machine; nothing for an extra that is not installed."""
    with suppress(PackageNotFoundError):
        found = map(Requirement, requires(name) or ())
        return [one for one in found if not one.marker or one.marker.evaluate({"extra": ""})]
    return []


def test_constraints_pin_every_dependency_inside_its_range():
    pinned = pins()
    assert declared().keys() - pinned.keys() == set()
    for name, specifier in declared().items():
        assert pinned[name] in Requirement(f"{name}{specifier}").specifier


def test_the_pins_are_one_solution_of_all_ranges_with_whatever_the_packages_need_in_turn():
    pinned, todo, done = pins(), set(declared()), set()
    own = re.compile("nvidia-|cuda-|triton$|setuptools$")  # those that torch pins itself
    while todo:
        name = todo.pop()
        done.add(name)
        for one in needs(name):
            other = canonicalize_name(one.name)
            if not own.match(other):
                assert other in pinned, f"{name} needs {one}, which constraints.txt does not pin"
                assert pinned[other] in one.specifier, (
                    f"{name} needs {one}; constraints.txt has {pinned[other]}"
                )
                todo |= {other} - done


def test_the_plain_install_is_without_transformer_lens_and_no_file_begins_with_it():
    assert "transformer-lens" not in ranges(map(Requirement, PROJECT["dependencies"]))
    for path in (ROOT / "steer_utils").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "transformer_lens" not in {name.split(".")[0] for name in names}, path


def test_badges_and_set_up_cells_get_the_address_of_another_repository(tmp_path):
    for path in (
        *ROOT.glob("notebooks/*.ipynb"),
        *(ROOT / n for n in ("Makefile", "pyproject.toml", "README.md", "CITATION.cff")),
    ):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
    old = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")
    before = {path: path.read_text() for path in tmp_path.rglob("*.*")}
    assert subprocess.run(["make", "badges"], cwd=tmp_path, capture_output=True).returncode != 0
    subprocess.run(["make", "badges", "REPO=some.one/course"], cwd=tmp_path, check=True, capture_output=True)
    assert {path: path.read_text() for path in before} == {
        path: text.replace(old, "some.one/course") for path, text in before.items()
    }


def test_import_waits_neither_for_torch_nor_for_transformers():
    slow = {"torch", "transformers", "matplotlib", "beartype"}
    code = f"import sys, steer_utils; print(sorted({slow} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def seconds(code: str) -> float:
    """How long code takes in a new process, at best of five."""
    whole = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True) for _ in range(5)]
    return min(float(run.stdout) for run in runs)


def test_import_costs_no_more_than_a_few_modules_of_python():
    assert seconds("import steer_utils") <= 0.05 + seconds("pass")


@pytest.mark.parametrize(
    "first", ["import steer_utils.sampling", "from steer_utils import sampling", "import steer_utils.types"]
)
def test_whatever_is_imported_first_its_functions_are_checked(first):
    code = f"{first}\nimport steer_utils\nsteer_utils.sampling.sampling_processors(None, top_k='5')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "WrongType: attention_mask of sampling_processors must be a tensor, not None" in found.stderr


def test_every_public_name_can_be_imported():
    found = {name: getattr(steer_utils, name) for name in steer_utils.__all__}
    things = {name: one for name, one in found.items() if not isinstance(one, ModuleType)}
    assert {one.__name__ for one in things.values()} == set(things)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'; it has load, "):
        steer_utils.nonsense  # noqa: B018
