"""What a run is written down as: machine, versions, settings and figures; and the table for people."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serve.comparison import Plan
from trimserve.evaluation.report import about_this_run

__all__ = ["about", "make_report", "print_report", "write_json"]


def about(num_threads: int) -> dict[str, Any]:
    """Machine, versions and commit.

    Args:
        num_threads: of one op, in every process that was measured.
    """
    run = about_this_run(1, 0)
    return {
        "machine": {**run["machine"], "num_threads": num_threads},
        "versions": {**run["versions"], "grpcio": metadata.version("grpcio")},
        "commit": run["commit"],
    }


def make_report(models: Sequence[dict[str, Any]], plans: Sequence[Plan], seconds: float) -> dict[str, Any]:
    """The whole run as plain data.

    Args:
        models: what `Comparison.run` found.
        plans: of each model.
        seconds: that everything took.
    """
    return {
        "benchmark": "serve",
        **about(plans[0].num_threads),
        "seconds": round(seconds, 1),
        "models": [{**model, "plan": asdict(plan)} for model, plan in zip(models, plans, strict=True)],
    }


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a document; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show what there is to see."""
    for model in report["models"]:
        table = Table(title=f"{model['model']}: {model['plan']['num_requests']} requests", title_justify="left")
        columns = ("ms", "tokens/s", "TTFT p50", "p99", "gap p50", "p99", "whole p50", "failed")
        for column in columns:
            table.add_column(column, justify="left" if column == "ms" else "right")
        for name, load in model["loads"].items():
            table.add_row(name, *_cells(load))
        console.print(table)
        console.print({name: model[name] for name in ("ratios", "repeated_images", "added_latency")})
        console.print({"answers equal to transformers'": model["untrimmed_answers_and_transformers"]})


def _cells(load: dict[str, Any]) -> list[str]:
    if "tokens_per_second" not in load:
        return [load["errors"][0][:60]]
    cells = [f"{load['tokens_per_second']:.1f}"]
    wanted = {"time_to_first_token": ("p50", "p99"), "inter_token": ("p50", "p99"), "duration": ("p50",)}
    for name, points in wanted.items():
        found = load.get(f"{name}_seconds") or {}
        cells += [f"{found[point] * 1e3:,.1f}" if point in found else "" for point in points]
    return [*cells, str(load.get("num_failed", ""))]
