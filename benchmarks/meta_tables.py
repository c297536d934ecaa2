"""Tables of docs/correctness.md: what the comparison with Meta's own code found."""

from typing import Any

__all__ = ["departures_table", "meta_table"]

_VERSIONS = ("llama-models", "torch", "transformers", "pillow", "trimserve")


def meta_table(report: dict[str, Any] | None) -> str:
    """Differences of logits by kind of prompt, and what was compared of pixels and token ids, as Markdown.

    Args:
        report: of `scripts/verify_meta.py`; None says how to get one.
    """
    if report is None:
        return "Not compared yet: `make verify-meta`."
    lines = [
        "| logits of | cases | rows | largest difference | another image moves them by at least |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in report["logits"]:
        moved = "" if line["smallest_move"] is None else f"{line['smallest_move']:.2f}"
        cells = f"{line['cases']} | {line['rows']} | {line['largest_difference']:.1e} | {moved}"
        lines.append(f"| {line['kind']} | {cells} |")
    pixels, tokens, versions = report["pixels"], report["tokens"], report["versions"]
    equal = pixels["images"] - len(pixels["unequal"])
    same = tokens["conversations"] - len(tokens["unequal"])
    lines += [
        "",
        f"- Pixels: {equal} of {pixels['images']} images bit for bit, in {len(pixels['grids'])} tile grids.",
        f"- Token ids: {same:,} of {tokens['conversations']:,} conversations, {tokens['tokens']:,} tokens.",
        "",
        f"By {', '.join(f'{name} {versions[name]}' for name in _VERSIONS)} at {report['commit'][:12]}.",
    ]
    return "\n".join(lines)


def departures_table(report: dict[str, Any] | None) -> str:
    """Inputs of which Meta's code makes something else, as Markdown.

    Args:
        report: see `meta_table`.
    """
    if report is None:
        return "Not compared yet: `make verify-meta`."
    lines = ["| input | Meta's code | trimserve |", "|---|---|---|"]
    for each in report["departures"]:
        cells = (each[side].replace("|", r"\|") for side in ("given", "meta", "trimserve"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
