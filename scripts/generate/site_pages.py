"""Build the documentation site, build/site, from docs/ and the pages elsewhere that it links to.

Documents link to each other by their places in the repository, so that they can be read there, too. Here docs/ becomes
the root of the site, and what it links to outside (a README, a picture, a YAML file) keeps its path below that root.

Usage: python -m scripts.generate.site_pages; zensical must be installed (requirements/site.txt)
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["documents", "links_rewritten", "listed", "pipes_unescaped", "place", "stage"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
STAGE = ROOT / "build"
PAGES = STAGE / "pages"
SITE = STAGE / "site"

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)((?:#[^)\s]*)?)\)")
"""`[text](target#anchor)` to another document or file; the text may hold a link's brackets, as badges do."""
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`]+`")


def place(path: Path) -> Path:
    """Where a file of the repository lies in the site: docs/ is its root."""
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT)


def documents() -> list[Path]:
    """Every page of docs/, but for the decisions, which their own index lists."""
    return sorted(DOCS.glob("*.md"))


def listed() -> list[Path]:
    """The documents that the navigation (docs/zensical.toml) names."""
    navigation = tomllib.loads((DOCS / "zensical.toml").read_text())["project"]["nav"]
    return [DOCS / page if (DOCS / page).exists() else ROOT / page for page in _pages(navigation)]


def _pages(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for part in entry.values() if isinstance(entry, dict) else entry:
        yield from _pages(part)


def links_rewritten(document: Path, found: list[Path]) -> str:
    """A document's text, with links that hold in the site.

    Args:
        document: a Markdown file of the repository.
        found: gets every file that the document links to.
    Raises:
        FileNotFoundError: a link leads nowhere.
    """

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        if ":" in target:
            return match[0]
        path = (document.parent / target).resolve()
        if path.is_dir():  # has no page: only its name stays
            return text
        if not path.exists():
            raise FileNotFoundError(f"{document.relative_to(ROOT)}: {target} does not exist")
        found.append(path)
        return f"{mark}[{text}]({os.path.relpath(place(path), place(document).parent)}{anchor})"

    text, parts, end = document.read_text(), [], 0
    for code in CODE.finditer(text):
        parts += [LINK.sub(rewritten, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(rewritten, text[end:])])


def pipes_unescaped(text: str) -> str:
    """Text whose tables have plain pipes in code: GitHub wants them escaped there, Zensical shows the backslash."""
    return re.sub(
        r"^\|.*$", lambda row: CODE_SPAN.sub(lambda span: span[0].replace("\\|", "|"), row[0]), text, flags=re.M
    )


def stage() -> None:
    """Write all pages, and the files that they link to, below `PAGES`.

    Raises:
        FileNotFoundError: the navigation or a link names what is not there.
    """
    shutil.rmtree(PAGES, ignore_errors=True)
    waiting, seen = [*documents(), *listed()], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        staged = PAGES / place(path)
        staged.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            staged.write_text(pipes_unescaped(links_rewritten(path, waiting)))
        else:
            shutil.copy(path, staged)
    shutil.copy(DOCS / "site.css", PAGES)
    shutil.copy(DOCS / "zensical.toml", STAGE)


def main() -> None:
    """Stage the pages and have Zensical build them; a broken link or anchor ends it."""
    stage()
    shutil.rmtree(SITE, ignore_errors=True)
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(STAGE / "zensical.toml")]
    sys.exit(subprocess.run(build, check=False).returncode)


if __name__ == "__main__":
    main()
