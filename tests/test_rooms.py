"""Which file of steer_utils may import which; and only hf.py knows the inner workings of transformers."""

import ast
import re
import shutil
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "steer_utils"
ROOMS = {  # and the rooms that each may import besides itself; files outside of the folders are the ground
    "ground": [],
    "additions": ["ground"],
    "pplm": ["ground"],
    "lm_steer": ["ground"],
    "measure": ["ground"],
    "course": ["ground", "additions", "pplm", "lm_steer", "measure"],
}
INNER = re.compile(r"transformers\.(models|masking_utils|integrations)\b|transformers\..*\._|steer_utils$")
INNER_ATTRIBUTES = {"transformer", "layers", "gpt_neox", "embed_tokens", "self_attn", "wte", "base_model"}


def room(module: str) -> str:
    first = f"{module}.".split(".")[1]
    return first if first in ROOMS else "ground"


def imported(module: str, path: Path, tree: ast.Module) -> list[str]:
    """Full names of all that a file imports, in functions and for type checking too."""
    folder, found = module.split(".")[: None if path.name == "__init__.py" else -1], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            found += [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    """What is against the rules, in words."""
    paths = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in files.items()}
    found, graph = [], {}
    for module, tree in trees.items():
        names = imported(module, files[module], tree)
        # `from .. import hf` names a file, `from ..hf import blocks` what is in one
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys()
        allowed = [room(module), *ROOMS[room(module)]]
        found += [f"{module} imports {other}" for other in graph[module] if room(other) not in allowed]
        if module != "steer_utils.hf":
            if module.startswith("steer_utils.course.exercises."):  # answers say `su`, as the notebooks do
                names = [name for name in names if name != "steer_utils"]
            found += [f"{module} imports {name}" for name in names if INNER.match(name)]
            uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            found += [f"{module} uses .{node.attr}" for node in uses if node.attr in INNER_ATTRIBUTES]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def test_every_import_is_allowed_and_there_is_no_circle():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("pplm/steer.py", "from ..measure import metrics", "pplm.steer imports steer_utils.measure.metrics"),
        (
            "pplm/steer.py",
            "def f():\n    import steer_utils.lm_steer.steer",
            "imports steer_utils.lm_steer.steer",
        ),
        ("measure/metrics.py", "from ..additions.vector import x", "imports steer_utils.additions.vector"),
        ("models.py", "from .course import plots", "models imports steer_utils.course.plots"),
        ("pplm/steer.py", "from .. import measure", "pplm.steer imports steer_utils.measure"),
        ("pplm/steer.py", "import steer_utils as su", "pplm.steer imports steer_utils"),
        ("data.py", "if TYPE_CHECKING:\n    from . import checkpoint", "a circle: "),
        (
            "measure/metrics.py",
            "from transformers.models.gpt2 import x",
            "metrics imports transformers.models",
        ),
        ("additions/vector.py", "blocks = model.model.layers", "vector uses .layers"),
    ],
)
def test_a_forbidden_line_is_found(tmp_path, file, line, expected):
    copy = shutil.copytree(PACKAGE, tmp_path / "steer_utils", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / file).open("a", encoding="utf-8") as written:
        written.write(f"\n{line}\n")
    new = set(violations(copy)) - set(violations(PACKAGE))
    assert any(expected in one for one in new), new
