"""Tables of README and docs, made from what was measured, so that no number there is typed by hand."""

import json
from pathlib import Path
from typing import Any, Final

__all__ = [
    "RESULTS",
    "batch_table",
    "bytes_tables",
    "fleet_table",
    "headline",
    "kv_int8_table",
    "load_table",
    "read_result",
    "saving",
    "serve_tables",
    "speculation_table",
    "vision_table",
    "walkthrough_table",
]

RESULTS = Path(__file__).parent / "results"
"""What the benchmarks wrote."""

_REQUESTS: Final = {"four_tiles": "4 tiles", "one_tile": "1 tile", "two_images": "2 images of 4 tiles", "text": "text"}
_LAYOUTS: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve, untrimmed",
    "transformers": "transformers",
    "sglang_layout": "SGLang's layout",
}
_LOADS: Final = {
    "trimserve": "trimserve",
    "trimserve_untrimmed": "trimserve, untrimmed",
    "transformers_sequential": "transformers, one at a time",
    "transformers_batched": "transformers, batched",
    "transformers_serve": "`transformers serve`",
    "trimserve_open_loop": "trimserve, open loop",
}


def read_result(name: str) -> dict[str, Any] | None:
    """A document of `RESULTS`; None before it was measured.

    Args:
        name: path within the folder.
    """
    path = RESULTS / name
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def bytes_tables(report: dict[str, Any] | None) -> str:
    """Bytes of one request by layout, and requests at once in equal bytes, as Markdown.

    Args:
        report: of `bench_bytes`; None says how to get one.
    """
    if report is None:
        return _missing("bench_bytes")
    return "\n\n".join([*(_bytes_of_model(model) for model in report["models"]), _origin(report)])


def headline(of_bytes: dict[str, Any] | None, of_trimming: dict[str, Any] | None) -> str:
    """What trimming saves and costs, in a few lines of Markdown.

    Args:
        of_bytes: report of `bench_bytes`.
        of_trimming: report of `trimserve eval` on the embedded model, of the budgets that it recommends, among others.
    """
    if of_bytes is None or of_trimming is None:
        return _missing("bench_bytes")
    model = _embedded(of_bytes)
    row, before = _exact_answers(model, of_trimming)
    at_once = model["at_once"]["four_tiles"]
    return (
        f"| saved and paid, embedded model | |\n|---|---|\n"
        f"| cross-attention KV of an image, beside transformers' | {_held(model, 'four_tiles'):.0%} for 4 tiles, "
        f"{_held(model, 'one_tile'):.0%} for 1 tile |\n"
        f"| requests with a 4-tile image at once, in equal memory | {at_once['trimserve']}, untrimmed "
        f"{at_once['trimserve_untrimmed']}, transformers {at_once['transformers']} |\n"
        f"| exact answers to {row['num_questions']:,} held-out questions | {row['accuracy']['value']:.1%}, untrimmed "
        f"{before:.1%} |"
    )


def saving(of_bytes: dict[str, Any] | None, of_trimming: dict[str, Any] | None) -> str:
    """The same in one sentence.

    Args:
        of_bytes: as `headline` takes it.
        of_trimming: as `headline` takes it.
    """
    if of_bytes is None or of_trimming is None:
        return _missing("bench_bytes")
    model = _embedded(of_bytes)
    row, before = _exact_answers(model, of_trimming)
    return (
        f"An image of four tiles holds **{_held(model, 'four_tiles'):.0%}** of the cross-attention KV that it holds in "
        f"transformers, and **{row['accuracy']['value']:.1%}** of {row['num_questions']:,} held-out questions are "
        f"answered exactly; untrimmed, {before:.1%} are (embedded model)."
    )


def _embedded(of_bytes: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = next(model for model in of_bytes["models"] if model["model"] == "embedded")
    return model


def _held(model: dict[str, Any], request: str) -> float:
    """Cross-attention KV of a request, as a share of what transformers holds for it."""
    size = model["requests"][request]["bytes"]
    return float(size["trimserve"]["cross"] / size["transformers"]["cross"])


def _exact_answers(model: dict[str, Any], of_trimming: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The evaluation's row of the model's own setting, and the accuracy without trimming."""
    setting = {"policy": "trimmed", "k_ratio": model["k_ratio"], "merge_ratio": model["merge_ratio"], "kind": "all"}
    [row] = [row for row in of_trimming["rows"] if setting.items() <= row.items()]
    return row, row["accuracy"]["value"] - row["accuracy_change"]["value"]


def batch_table(report: dict[str, Any] | None) -> str:
    """What a batch reaches beside bare clients, and what came of one that was killed, as Markdown.

    Args:
        report: of `bench_batch`; None says how to get one.
    """
    if report is None:
        return _missing("bench_batch")
    lines = ["| round | bare clients, lines/s | `trimserve batch`, lines/s | ratio |", "|---|---:|---:|---:|"]
    for number, each in enumerate(report["rounds"], 1):
        rates = f"{each['served_lines_per_second']:.1f} | {each['batch_lines_per_second']:.1f}"
        lines.append(f"| {number} | {rates} | {each['ratio']:.3f} |")
    killed = report["killed"]
    places = ", ".join(map(str, killed["lines_at_kill"]))
    told = (
        f"{report['num_lines']:,} lines, {report['concurrency']} at a time, {report['max_new_tokens']} tokens each; "
        f"the median ratio is {report['ratio']:.3f}. Killed (`kill -9`) at {places} lines and started again each time: "
        f"{killed['num_lost']} lost, {killed['num_doubled']} doubled, {killed['num_other_texts']} with another text."
    )
    return "\n".join([*lines, "", told, "", _origin(report)])


def fleet_table(report: dict[str, Any] | None) -> str:
    """Processor time of a token by what stands before the server, as Markdown.

    Args:
        report: of `bench_fleet`; None says how to get one.
    """
    if report is None:
        return _missing("bench_fleet")
    lines = ["| way | processor ms a token, median | lowest to highest |", "|---|---:|---:|"]
    for run in (key for key in report if key.startswith("beside_")):
        for name, cost in report[run].items():
            spread = f"{cost['low']:.3f} to {cost['high']:.3f}"
            lines.append(f"| {name.replace('_', ', ')}, {run.replace('_', ' ', 1)} | {cost['median']:.3f} | {spread} |")
    return "\n".join([*lines, "", _origin(report)])


def kv_int8_table(report: dict[str, Any] | None) -> str:
    """Decode steps with int8 keys and values beside bfloat16, and answers that stay the same, as Markdown.

    Args:
        report: of `bench_kv_int8`; None says how to get one.
    """
    if report is None:
        return _missing("bench_kv_int8")
    lines = ["| batch | bfloat16, ms | int8, ms | times as fast [95 %] | bytes of KV |", "|---:|---:|---:|---:|---:|"]
    for row in report["steps"]:
        low, high = row["interval"]
        times = f"{row['bfloat16_ms']:.1f} | {row['int8_ms']:.1f} | {row['speedup']:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {row['batch']} | {times} | {row['bytes_ratio']:.1%} |")
    unchanged = report["answers"]["unchanged"]
    told = (
        f"Of {report['answers']['num_questions']:,} answers of the embedded model, {unchanged['untrimmed']:.1%} "
        f"untrimmed and {unchanged['trimmed']:.1%} trimmed stay the same to the letter."
    )
    return "\n".join([*lines, "", told, "", _origin(report)])


def speculation_table(report: dict[str, Any] | None) -> str:
    """Tokens a second with and without drafts, by what the answers are like, as Markdown.

    Args:
        report: of `bench_speculation`; None says how to get one.
    """
    if report is None:
        return _missing("bench_speculation")
    lines = [
        "| answers | batch | tokens/s without | with | times as fast [95 %] | steps a token | drafts right |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        low, high = row["interval"]
        rates = f"{row['plain_tokens_per_second']:.0f} | {row['tokens_per_second']:.0f}"
        right = f"{row['accepted'] / row['proposed']:.0%}" if row["proposed"] else "none made"
        times = f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}] | {row['steps_ratio']:.2f} | {right}"
        lines.append(f"| {row['case']} | {row['batch']} | {rates} | {times} |")
    return "\n".join([*lines, "", _origin(report)])


def serve_tables(report: dict[str, Any] | None) -> str:
    """Rates and latencies under load by target, and the probes of an idle server, as Markdown.

    Args:
        report: of `bench_serve`; None says how to get one.
    """
    if report is None:
        return _missing("bench_serve")
    picture = "![tokens per second, waiting and pace by target](../benchmarks/results/serve/serve.png)"
    return "\n\n".join([picture, *(_loads_of_model(model) for model in report["models"]), _origin(report)])


def load_table(report: dict[str, Any] | None) -> str:
    """What two hundred streams came to, and how long those waited who looked on, as Markdown.

    Args:
        report: of `benchmarks.soak load`; None says how to get one.
    """
    if report is None:
        return _missing("soak load")
    requests, checks = report["requests"], report["checks"]
    lines = ["| asked for | times | p50, ms | p99, ms | longest, ms |", "|---|---:|---:|---:|---:|"]
    for name, waited in report["onlookers_seconds"].items():
        cells = " | ".join(f"{1e3 * waited[point]:,.0f}" for point in ("p50", "p99", "max"))
        lines.append(f"| {name} | {waited['num']:,} | {cells} |")
    failed = [name.replace("_", " ") for name, held in checks.items() if not held]
    told = (
        f"{report['plan']['clients']} clients, {report['seconds']:,.0f} s: {requests['answered']:,} streams came whole "
        f"and {requests['not_as_provoked']} did not; {report['tokens_per_second']:,.0f} tokens/s. Memory grew by "
        f"{report['memory']['growth']:.1%} from the second fifth of the time to the last. "
        + (f"Not held: {', '.join(failed)}." if failed else "All checks held.")
    )
    return "\n".join([told, "", *lines, "", _origin(report)])


def walkthrough_table(report: dict[str, Any] | None) -> str:
    """How long each command took, as Markdown.

    Args:
        report: of `scripts/verify_walkthrough.py`; None says how to get one.
    """
    if report is None:
        return "Not measured yet: `python scripts/verify_walkthrough.py`."
    lines = ["| command | seconds |", "|---|---:|"]
    for step in report["steps"]:
        command = step["command"].replace("|", "\\|")
        lines.append(f"| `{command}` | {step['seconds']:.1f} |")
    return "\n".join(lines)


def _bytes_of_model(model: dict[str, Any]) -> str:
    cap = f", at most {model['max_kept_fraction']:.0%} of the features kept" if model["max_kept_fraction"] else ""
    title = f"**{model['model']}** ({model['dtype']}, k_ratio {model['k_ratio']:g}{cap})"
    lines = [
        f"{title}, answers of {model['max_new_tokens']} tokens; one request holds:",
        "",
        f"| request | features | held | {' | '.join(_LAYOUTS.values())} | cross KV over transformers' |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, request in model["requests"].items():
        features = request["features"]
        held = features["kept"] + features["merged"]
        sizes = " | ".join(_size(request["bytes"][layout]["total"]) for layout in _LAYOUTS)
        ratio = request["cross_bytes_over_transformers"]
        over = "" if ratio is None else f"{ratio:.3f}"
        lines.append(f"| {_REQUESTS[name]} | {features['valid']} | {held} | {sizes} | {over} |")
    at_once = model["at_once"]
    lines += [
        "",
        f"Requests that run at once in {_size(at_once['kv_bytes'])} of KV:",
        "",
        f"| request | {' | '.join(_LAYOUTS.values())} |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, counts in at_once.items():
        if name in _REQUESTS:
            lines.append(f"| {_REQUESTS[name]} | {' | '.join(str(counts[layout]) for layout in _LAYOUTS)} |")
    return "\n".join(lines)


def _loads_of_model(model: dict[str, Any]) -> str:
    plan = model["plan"]
    asked = f"{plan['num_requests']} requests of {plan['max_new_tokens']} tokens, {plan['concurrency']} clients"
    lines = [
        f"**{model['model']}**: {asked}, {plan['repeated_share']:.0%} of the images repeated; milliseconds:",
        "",
        "| target | tokens/s | first token p50 | p99 | between messages p50 | p99 | whole answer p50 | p99 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    loads = {name: model["loads"][name] for name in _LOADS if name in model["loads"]}
    lines += [f"| {_LOADS[name]} | {' | '.join(_load_cells(load))} |" for name, load in loads.items()]
    ratios, latency = model["ratios"], model["added_latency"]
    over = {name: ratios.get(f"trimserve_over_{name}") for name in _LOADS if name.startswith("transformers")}
    told = ", ".join(f"{ratio:.1f} times that of {_LOADS[name]}" for name, ratio in over.items() if ratio)
    share = f"{latency['added_over_bare_step']:.0%}"
    added, step = (f"{1e3 * latency[name]:.2f} ms" for name in ("added_seconds_per_token", "bare_step_seconds"))
    images = model["repeated_images"]
    waits = " and ".join(f"{images[kind]['repeated_over_first']:.2f} ({_REQUESTS[kind]})" for kind in images)
    lines += [
        "",
        f"- Rate of trimserve: {told}." if told else "- No rival answered every request.",
        f"- First token of another question on an image, over that of the first question on it: {waits}.",
        f"- The service adds {added} to a token at batch 1, {share} of the bare decode step of {step}.",
    ]
    return "\n".join(lines)


def _load_cells(load: dict[str, Any]) -> list[str]:
    if "tokens_per_second" not in load:
        return [f"failed: {load['errors'][0].splitlines()[-1][:80]}", *[""] * 6]
    cells = [f"{load['tokens_per_second']:,.1f}"]
    for name in ("time_to_first_token", "inter_token", "duration"):
        found = load.get(f"{name}_seconds") or {}
        cells += [f"{1e3 * found[point]:,.1f}" if found else "" for point in ("p50", "p99")]
    return cells


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"


def _origin(report: dict[str, Any]) -> str:
    machine, versions, commit = report["machine"], report["versions"], report["commit"]
    at = "" if commit is None else f" at {commit[:12]}"
    return (
        f"Measured on {machine['cpu']}, {machine['num_threads']} thread(s) per process, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trimserve {versions['trimserve']}{at}."
    )


def _missing(module: str) -> str:
    return f"Not measured yet: `python -m benchmarks.{module}`."


def vision_table(report: dict[str, Any] | None) -> str:
    """Seconds of the vision encoder's layers beside transformers', as Markdown.

    Args:
        report: of `bench_vision`; None says how to get one.
    """
    if report is None:
        return _missing("bench_vision")
    lines = ["| tiles | dtype | trimserve, s | transformers, s | times as fast [95 %] |", "|---:|---|---:|---:|---:|"]
    for row in report["results"]:
        low, high = row["interval"]
        seconds = f"{row['seconds']:.2f} | {row['transformers_seconds']:.2f}"
        lines.append(f"| {row['tiles']} | {row['dtype']} | {seconds} | {row['speedup']:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join([*lines, "", _origin(report)])
