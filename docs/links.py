"""Links that lead nowhere, and parts that come from other hosts, in a folder of pages.

python docs/links.py FOLDER    `make site` ends with it
"""

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


@dataclass
class Page(HTMLParser):
    """A page's ids, the addresses it links to, and those it loads by itself."""

    text: str
    ids: set[str] = field(default_factory=set)
    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)
        self.loads |= set(re.findall(r"url\(\s*['\"]?(https?:[^)'\"]+)", self.text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADED and given.get("rel") not in ("canonical", "prev", "next", "search", "index"):
            self.loads |= {given[name] for name in (LOADED[tag],) if name in given}


def wrong(folder: Path) -> list[str]:
    """A line for each fault."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    pages = {
        path: page for path, page in pages.items() if "_static" not in path.parts
    }  # the theme's templates
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder.resolve())
        found += [f"{name} loads {one}" for one in page.loads if urlsplit(one).scheme in ("http", "https")]
        found += [f"{name} loads {one}" for one in page.loads if one.startswith("//")]
        found += [f"{name} links to {one}" for one in page.links | page.loads if dangling(path, one, pages)]
    return sorted(found)


def dangling(path: Path, address: str, pages: dict[Path, Page]) -> bool:
    """Whether a local address leads to no file, or to no id of a page."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return False
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    known = parts.fragment in ("", *(pages[target].ids if target in pages else (parts.fragment,)))
    return not (target.is_file() and (known or unquote(parts.fragment) in pages[target].ids))


if __name__ == "__main__":
    sys.exit("\n".join(wrong(Path(sys.argv[1]))) or 0)
