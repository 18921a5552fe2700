"""Checks that every link inside a built site leads to a page, and to an anchor that the page has.

python .ci/check_links.py build/site
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

SITE = "http://site/"  # stands for the host


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors = {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collects what an element links to, and what leads to it."""
        found = dict(attrs)
        self.anchors |= {found[name] or "" for name in ("id", "name") if name in found}
        self.links += [found[name] or "" for name in ("href", "src") if name in found]


def broken_links(root: Path) -> list[str]:
    """Returns a line for each link to a missing file or anchor, and for each page whose address a host may drop."""
    pages = {path.relative_to(root).as_posix(): Page(path.read_text("utf-8")) for path in sorted(root.rglob("*.html"))}
    broken = [f"{name}: a part of its address starts with a dot" for name in pages if f"/{name}".count("/.")]
    broken += [] if "index.html" in pages else [f"{root}: no index.html"]
    for name, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(SITE + name, link))
            path = unquote(target.path).lstrip("/")
            path += "index.html" if path == "" or path.endswith("/") else ""
            if target.netloc != "site":
                continue
            if not (root / path).is_file():
                broken.append(f"{name}: {link} leads to no file")
            elif path in pages and unquote(target.fragment) not in pages[path].anchors:
                broken.append(f"{name}: {link} leads to no anchor")
    return broken


if __name__ == "__main__":
    (site,) = sys.argv[1:]
    sys.exit("\n".join(broken_links(Path(site))) or None)
