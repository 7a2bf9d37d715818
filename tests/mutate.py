"""Break single lines of steer_utils, one at a time, and see whether the tests notice: `make mutate`.

python tests/mutate.py [--count 30] [--seed 0] [FILE …]    FILE as pplm/steps.py; all but course/ by default

Each change is made in a copy of the repository, where the tests of the file's room run, the golden cases, the
invariants and the test of the rooms. Where a change survives, either it makes no difference or a test is
missing: a person must judge which.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from copy import copy
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SWAPS = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
ALWAYS = ("golden", "invariants", "rooms")
SECONDS = 900  # for one run of tests; a change that makes an endless loop counts as caught


class Change(NamedTuple):
    """Bytes [start, end) of a file of steer_utils, which begin in that line, and what replaces them."""

    file: Path
    line: int
    start: int
    end: int
    new: bytes


def changes(file: Path) -> list[Change]:
    """All changes of a file: another operator, comparison, constant, negated condition or no result."""
    source = file.read_bytes()
    lines, tree, skipped = source.splitlines(keepends=True), ast.parse(source), set()
    for node in ast.walk(tree):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for part in [*filter(None, parts), *([node] if isinstance(node, ast.JoinedStr) else [])]:
            skipped |= {id(inner) for inner in ast.walk(part)}
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    found = []
    for node in ast.walk(tree):
        if id(node) not in skipped and (pair := replaced(node)):
            old, new = pair
            start, end = (
                starts[old.lineno - 1] + old.col_offset,
                starts[old.end_lineno - 1] + old.end_col_offset,
            )
            found.append(Change(file, old.lineno, start, end, new.encode()))
    return found


def replaced(node: ast.AST) -> tuple[ast.expr, str] | None:
    """The expression to replace and the new one, if the node is of a kind that can be changed."""
    other = copy(node)
    match node:
        case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAPS:
            other.op = SWAPS[type(node.op)]()
        case ast.Compare() if type(node.ops[0]) in SWAPS:
            other.ops = [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        case ast.Constant() if type(node.value) in (bool, int, float):
            other.value = not node.value if isinstance(node.value, bool) else node.value + 1
        case ast.If() | ast.IfExp() | ast.While():
            return node.test, f"(not ({ast.unparse(node.test)}))"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            return value, "None"
        case _:
            return None
    return node, f"({ast.unparse(other)})"


def test_files(root: Path, room: str) -> list[str]:
    """The test files of a room; for the ground, "", those named after its modules."""
    modules = [path.stem for path in (root / "steer_utils").glob("*.py")]
    names = [*ALWAYS, *([f"{room}_*"] if room else [f"{name}*" for name in modules])]
    return sorted({str(path) for name in names for path in (root / "tests").glob(f"test_{name}.py")})


def passes(root: Path, room: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-m", "not slow", "--hypothesis-seed=0"]
    settings = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *test_files(root, room)], cwd=root, env=settings, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="within steer_utils; all but course/ by default")
    parser.add_argument("--count", type=int, default=30, help="how many lines to change")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, leave = (
            Path(scratch) / "copy",
            shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache"),
        )
        package = shutil.copytree(ROOT, root, ignore=leave) / "steer_utils"
        files = [package / name for name in given.files] or sorted(package.rglob("*.py"))
        by_line = defaultdict(list)
        for change in (one for file in files if file.parent.name != "course" for one in changes(file)):
            by_line[change.file, change.line].append(change)
        rng = random.Random(given.seed)
        chosen = [
            rng.choice(by_line[line]) for line in rng.sample(sorted(by_line), min(given.count, len(by_line)))
        ]
        room = {one.file: "" if one.file.parent == package else one.file.parent.name for one in chosen}
        if failing := [name for name in sorted(set(room.values())) if not passes(root, name)]:
            sys.exit(f"tests fail without any change: {', '.join(name or 'ground' for name in failing)}")
        caught = 0
        for number, change in enumerate(chosen, 1):
            source = change.file.read_bytes()
            change.file.write_bytes(source[: change.start] + change.new + source[change.end :])
            survived = passes(root, room[change.file])
            change.file.write_bytes(source)
            caught += not survived
            place = f"{change.file.relative_to(root)}:{change.line}"
            old = source[change.start : change.end].decode()
            print(f"{number}/{len(chosen)} {'SURVIVED' if survived else 'caught'}  {place}", flush=True)
            print(f"    - {old}\n    + {change.new.decode()}", flush=True)
        print(f"{caught} of {len(chosen)} changes caught")


if __name__ == "__main__":
    main()
