"""Tables of docs/ about what scripts/verify/ found: batches, full load, the walkthrough, and Meta's own code."""

from typing import Any, Final

from benchmarks.report import Columns, markdown, origin, tabulated

__all__ = ["batch_table", "departures_table", "load_table", "meta_table", "tools_table", "walkthrough_table"]

_VERSIONS: Final = ("llama-models", "torch", "transformers", "pillow", "trimserve")


def load_table(report: dict[str, Any]) -> str:
    """What two hundred streams came to, and how long those waited who looked on, as Markdown."""
    requests, checks = report["requests"], report["checks"]
    rows = [
        [name, f"{waited['num']:,}", *(f"{1e3 * waited[point]:,.0f}" for point in ("p50", "p99", "max"))]
        for name, waited in report["onlookers_seconds"].items()
    ]
    failed = [name.replace("_", " ") for name, held in checks.items() if not held]
    told = (
        f"{report['plan']['clients']} clients, {report['seconds']:,.0f} s: {requests['answered']:,} streams came whole "
        f"and {requests['not_as_provoked']} did not; {report['tokens_per_second']:,.0f} tokens/s. Memory grew by "
        f"{report['memory']['growth']:.1%} from the second fifth of the time to the last. "
        + (f"Not held: {', '.join(failed)}." if failed else "All checks held.")
    )
    return "\n\n".join(
        [told, markdown(["asked for", "times", "p50, ms", "p99, ms", "longest, ms"], rows), origin(report)]
    )


def batch_table(report: dict[str, Any]) -> str:
    """What a batch reaches beside bare clients, and what came of one that was killed, as Markdown."""
    columns: Columns = {
        "round": "{number}",
        "bare clients, lines/s": "{served_lines_per_second:.1f}",
        "`trimserve batch`, lines/s": "{batch_lines_per_second:.1f}",
        "ratio": "{ratio:.3f}",
    }
    rows = [{"number": number, **each} for number, each in enumerate(report["rounds"], 1)]
    killed = report["killed"]
    places = ", ".join(map(str, killed["lines_at_kill"]))
    told = (
        f"{report['num_lines']:,} lines, {report['concurrency']} at a time, {report['max_new_tokens']} tokens each; "
        f"the median ratio is {report['ratio']:.3f}. Killed (`kill -9`) at {places} lines and started again each time: "
        f"{killed['num_lost']} lost, {killed['num_doubled']} doubled, {killed['num_other_texts']} with another text."
    )
    return "\n\n".join([tabulated(rows, columns), told, origin(report)])


def tools_table(report: dict[str, Any]) -> str:
    """What other people's tools found at the HTTP door, as Markdown."""
    scores, measured, versions = report["exact_match"], report["guidellm"], report["tools"]
    rows = [
        (
            f"lmms-eval {versions['lmms-eval']}",
            f"{report['questions']:,} held-out questions",
            f"{scores['lmms-eval']:.1%} exact, `trimserve eval` {scores['trimserve eval']:.1%}",
        ),
        (
            f"guidellm {versions['guidellm']}",
            f"{measured['successful']:,} streams about an image",
            f"{measured['errored']} errors, tokens as asked for: {measured['least_tokens']} each",
        ),
    ]
    return markdown(["tool", "asked", "found"], rows)


def walkthrough_table(report: dict[str, Any]) -> str:
    """How long each command took, as Markdown."""
    steps = [(step["command"].replace("|", "\\|"), step["seconds"]) for step in report["steps"]]
    return markdown(["command", "seconds"], [[f"`{command}`", f"{seconds:.1f}"] for command, seconds in steps])


def meta_table(report: dict[str, Any]) -> str:
    """Differences of logits by kind of prompt, and what was compared of pixels and token ids, as Markdown."""
    rows = []
    for line in report["logits"]:
        moved = "" if line["smallest_move"] is None else f"{line['smallest_move']:.2f}"
        rows.append([line["kind"], line["cases"], line["rows"], f"{line['largest_difference']:.1e}", moved])
    head = ["logits of", "cases", "rows", "largest difference", "another image moves them by at least"]
    pixels, tokens, versions = report["pixels"], report["tokens"], report["versions"]
    equal = pixels["images"] - len(pixels["unequal"])
    same = tokens["conversations"] - len(tokens["unequal"])
    return "\n".join(
        [
            markdown(head, rows),
            "",
            f"- Pixels: {equal} of {pixels['images']} images bit for bit, in {len(pixels['grids'])} tile grids.",
            f"- Token ids: {same:,} of {tokens['conversations']:,} conversations, {tokens['tokens']:,} tokens.",
            "",
            f"By {', '.join(f'{name} {versions[name]}' for name in _VERSIONS)} at {report['commit'][:12]}.",
        ]
    )


def departures_table(report: dict[str, Any]) -> str:
    """Inputs of which Meta's code makes something else, as Markdown; takes what `meta_table` takes."""
    sides = ("given", "meta", "trimserve")
    rows = [[each[side].replace("|", r"\|") for side in sides] for each in report["departures"]]
    return markdown(["input", "Meta's code", "trimserve"], rows, words=3)
