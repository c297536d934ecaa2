"""Check the built documentation site: every link and anchor leads somewhere, and nothing is loaded from elsewhere.

The builder checks links of the documents; this reads the pages as a browser gets them, with navigation and pictures.

Usage: python -m scripts.verify.site_links, after `make site`
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).resolve().parents[2] / "build/site"
LOADS = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser loads by itself."""
NOT_LOADED = {"canonical", "prev", "next"}
"""Kinds of `link` that it does not."""


class Page(HTMLParser):
    """Anchors and links of a page."""

    def __init__(self, path: Path) -> None:
        """Read a page.

        Args:
            path: of an HTML file.
        """
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one element brings."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        loaded = values.get(LOADS.get(tag, ""))
        if loaded and values.get("rel") not in NOT_LOADED:
            self.loads.append(loaded)
        if "mermaid" in values.get("class", "").split():
            self.loads.append("https://unpkg.com, for a Mermaid diagram")


def problems(path: Path, pages: dict[Path, Page]) -> list[str]:
    """What is wrong with a page's links.

    Args:
        path: of the page.
        pages: all pages of the site, by path.
    """
    page, found = pages[path], []
    for link in page.links + page.loads:
        scheme, host, target, _, anchor = urlsplit(link)
        if scheme or host:
            if link in page.loads and scheme != "data":
                found.append(f"loads {link}")
            continue
        leads_to = (path.parent / unquote(target)).resolve() if target else path
        leads_to = leads_to / "index.html" if leads_to.is_dir() else leads_to
        if not leads_to.is_file():
            found.append(f"links to {link}, which is not there")
        elif leads_to in pages and unquote(anchor) not in pages[leads_to].anchors:
            found.append(f"links to {link}, an anchor that is not there")
    return found


def main() -> None:
    """Check all pages and styles."""
    pages = {path: Page(path) for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"}
    if not pages:
        sys.exit("there is no site in build/site: run `make site`")
    found = [f"{path.relative_to(SITE)} {problem}" for path in pages for problem in problems(path, pages)]
    for path in SITE.rglob("*.css"):
        elsewhere = re.findall(r"(?:url\(|@import )[\"']?(https?:[^\"')]+)", path.read_text())
        found += [f"{path.relative_to(SITE)} loads {address}" for address in elsewhere]
    if found:
        sys.exit("\n".join(found))
    print(f"site: {len(pages)} pages, {sum(len(page.links) for page in pages.values())} links")


if __name__ == "__main__":
    main()
