"""The website: README, notebooks as stored, docs/, and the docstrings of steer_utils. See `make site`.

Sphinx reads a copy of these files, in build/source, of the same layout; there the README is index.md.
"""

import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
from docutils import nodes
from latex2mathml.converter import convert
from PIL import Image
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))
import steer_utils

ROOT = Path(__file__).parents[1]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
REFERENCE = ("examples", "api", "code", "results", "gallery", "speed", "models")
CONTENTS = {
    "Course": ("notebooks/[0-9]*", "notebooks/GLOSSARY", "notebooks/TEACHING"),
    "Reference": [f"docs/{name}" for name in REFERENCE],
    "Project": ("CONTRIBUTING", "CHANGELOG", "data/README", "CODE_OF_CONDUCT", "SECURITY"),
}

project, author, copyright = "steer_utils", "the steer_utils authors", "2026, the steer_utils authors"
version = release = steer_utils.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
smartquotes = False
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
default_role = "literal"  # `x` in a docstring
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 70
html_theme, html_title = "sphinx_book_theme", "steer_utils"
html_static_path, html_css_files = ["static"], ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
}


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """What Sphinx is to read instead of a file."""
    path = Path(app.env.doc2path(name))
    if path.suffix == ".ipynb":
        source[0] = nbformat.writes(notebook(nbformat.reads(source[0], as_version=4)))
        return
    added = {"index": contents, "docs/gallery": gallery, "docs/api": api}.get(name, str)()
    place = path.relative_to(app.srcdir).parent
    source[0] = (
        re.sub(r"(\]\()(?!https?:|#)([^)]+)", lambda at: at[1] + here(app, place, at[2]), source[0]) + added
    )


def notebook(given: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with its badge as words, and the pictures' alternative text where MyST-NB reads it."""
    for cell in given.cells:
        cell.source = re.sub(r"!\[(Open in Colab)\]\([^)]+\)", r"\1", cell.source)
        for output in cell.get("outputs", []):
            if text := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": text}}
    return given


def here(app: Sphinx, place: Path, target: str) -> str:
    """A link of the repository on the website, or to the repository if the website lacks the file."""
    path, anchor, heading = target.partition("#")
    found = (app.srcdir / place / path).resolve()
    if found == app.srcdir / "README.md":
        return ("../" * len(place.parts)) + f"index.md{anchor}{heading}"
    if found.is_file():
        return target
    return f"{REPOSITORY}/blob/main/{found.relative_to(app.srcdir)}"


def contents() -> str:
    """The trees of pages."""
    trees = [
        "\n".join(("```{toctree}", ":hidden:", ":glob:", f":caption: {title}", "", *pages, "```"))
        for title, pages in CONTENTS.items()
    ]
    return "\n\n" + "\n\n".join(trees)


def gallery() -> str:
    """Every figure below its notebook, with its alternative text in words too."""
    parts = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        parts.append(f"## [{title}](../notebooks/{path.name})")
        parts += [figure(one) for one in sorted((ROOT / "figures").glob(f"{path.stem[:2]}_*.png"))]
    return "\n\n" + "\n\n".join(parts)


def figure(path: Path) -> str:
    with Image.open(path) as picture:
        text = " ".join(picture.text["Description"].split())
    return f"```{{figure}} ../figures/{path.name}\n:alt: {text}\n\n{text}\n```"


def api() -> str:
    """The public names, below the docstring of the module that holds them."""
    parts = []
    for module, names in steer_utils._NAMES.items():
        parts += [f"## {module}", directive("automodule", f"steer_utils.{module}", "no-index")]
        for name in names.split():
            kind = "autoclass" if inspect.isclass(getattr(steer_utils, name)) else "autofunction"
            options = ("members", "inherited-members: Module") if kind == "autoclass" else ()
            parts.append(directive(kind, f"steer_utils.{name}", *options))
    return "\n\n" + "\n\n".join(parts)


def directive(kind: str, name: str, *options: str) -> str:
    lines = (
        f".. {kind}:: {name}",
        *(f"   :{option if ':' in option else option + ':'}" for option in options),
    )
    return "\n".join(("```{eval-rst}", *lines, "```"))


def docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Formulas as they are set; a paragraph for each parameter, what is returned, what is raised."""
    names = inspect.signature(thing).parameters if what in ("class", "function", "method") else ()
    words = "|".join([r"Shapes|Sources?(?: of [\w ]+)?", *map(re.escape, names)])
    begins = re.compile(
        rf"(?:(?<=[.;] )|^)((?:{words})(?:, \w+)*:|Raises|Returns|\w+Error(?= for| if| unless))"
    )
    parts = []
    for part in "\n".join(lines).rstrip().split("\n\n"):
        text = (
            f"::\n\n{part}" if part.startswith("    ") else begins.sub(r"\n\n**\1**", " ".join(part.split()))
        )
        parts.append(text.strip("\n"))
    lines[:] = [*"\n\n".join(parts).splitlines(), ""]


def mathml(block: bool) -> Any:
    """A visitor that writes a formula as MathML, which browsers draw without a script."""

    def visit(self: Any, node: nodes.math | nodes.math_block) -> None:
        self.body.append(convert(node.astext(), display="block" if block else "inline"))
        raise nodes.SkipNode

    return visit, None


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", mathml(block=False), mathml(block=True))
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring)
