"""The documentation site: its navigation, the links of its pages, and the check of what was built."""

from pathlib import Path

import pytest

from scripts.generate.site_pages import ROOT, documents, links_rewritten, listed, pipes_unescaped, place
from scripts.verify.site_links import Page, problems


def test_the_navigation_names_every_document() -> None:
    missing = set(documents()) - set(listed())
    assert not missing, "add it to docs/zensical.toml"


def test_a_link_out_of_docs_leads_to_the_same_file_below_the_sites_root() -> None:
    linked: list[Path] = []
    text = links_rewritten(ROOT / "docs/fleet.md", linked)
    assert "](docker/envoy.yaml)" in text
    assert ROOT / "docker/envoy.yaml" in linked
    text = links_rewritten(ROOT / "examples/ray/README.md", linked)
    assert "](../../fleet.md" in text
    assert place(ROOT / "docs/fleet.md") == Path("fleet.md")


def test_pipes_in_code_of_a_table_lose_the_backslash_that_github_wants() -> None:
    assert pipes_unescaped("| `a \\| b` | c \\| d |\nin `text \\|`") == "| `a | b` | c \\| d |\nin `text \\|`"


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<p id="a"><a href="#a"></a><a href="other.html#b"></a><a href="https://example.org"></a>', None),
        ('<a href="gone.html">', "links to gone.html, which is not there"),
        ('<img src="gone.png">', "links to gone.png, which is not there"),
        ('<a href="other.html#c">', "links to other.html#c, an anchor that is not there"),
        ('<a href="#b">', "links to #b, an anchor that is not there"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "loads https://example.org/a.css"),
        ('<script src="//example.org/a.js">', "loads //example.org/a.js"),
        ('<pre class="mermaid">', "loads https://unpkg.com, for a Mermaid diagram"),
    ],
)
def test_links_that_lead_nowhere_and_what_is_loaded_from_elsewhere_are_found(
    html: str, problem: str | None, tmp_path: Path
) -> None:
    page, other = tmp_path / "page.html", tmp_path / "other.html"
    page.write_text(html)
    other.write_text('<p id="b">')
    assert problems(page, {page: Page(page), other: Page(other)}) == ([problem] if problem else [])
