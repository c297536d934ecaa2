"""trimserve beside Meta's own code, `llama-models`, which the weights were trained with.

Small random weights in Meta's format are converted and served; logits of every row, pixels and token ids are compared,
and what is meant to differ is shown to differ. `make verify-meta` installs what this needs.

Usage: python -m scripts.verify.meta [--out FILE]
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from scripts.verify.meta import load_torchvision

load_torchvision()

from benchmarks.machine import about
from benchmarks.report import write_json
from scripts.verify.meta.checkpoint import MetaGeometry, save_checkpoint
from scripts.verify.meta.departures import Trial, departures
from scripts.verify.meta.inputs import compare_pixels, compare_tokens
from scripts.verify.meta.judge import TOKENIZER_MODEL, Judge, begin, chat_format
from scripts.verify.meta.logits import (
    CASES,
    GEOMETRIES,
    META_MASK,
    REAL_TILES,
    SWAP_FACTOR,
    TOLERANCE,
    Case,
    Compared,
    compare,
    summed,
)
from scripts.verify.meta.prompts import file_of, noise
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

ROOT = Path(__file__).resolve().parents[3]

OUT = ROOT / "benchmarks/results/meta.json"
REAL_CASES = (
    Case("tiles of 560 pixels", "<|image|>What is this?", ((2, 2),)),
    Case("tiles of 560 pixels", "Look:<|image|>", ((1, 1),)),
)
META_PACKAGES = ("llama-models", "fairscale", "torchvision", "tiktoken")


def main() -> None:
    """Compare, print, write down; ends with status 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="what was found; default: %(default)s")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # Meta's code asks for an older name
    begin()
    format_ = chat_format()
    found: list[Compared] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, geometry) in enumerate(GEOMETRIES.items()):
            ours, judge = both(Path(folder) / str(seed), geometry, seed)
            found += [each for case in CASES for each in compare(ours, judge, format_, case)]
            print(f"logits compared: {name}")
        ours, judge = both(Path(folder) / "real", REAL_TILES, seed=len(GEOMETRIES))
        found += [each for case in REAL_CASES for each in compare(ours, judge, format_, case)]
        trial = Trial(ours, judge, format_, file_of(noise(8, 8, seed=0)))
        report = {
            "benchmark": "meta",
            **origin(),
            "tolerance": TOLERANCE,
            "swap_factor": SWAP_FACTOR,
            "geometries": [*GEOMETRIES, REAL_CASES[0].kind],
            "logits": summed(found),
            "pixels": compare_pixels(ours, judge, format_, num_sizes=300),
            "tokens": compare_tokens(ours, format_, num_texts=3000),
            "departures": [
                {"given": each.given, "meta": each.meta, "trimserve": each.trimserve, "seen": each.is_seen(trial)}
                for each in departures()
            ],
        }
    show(report)
    write_json(report, arguments.out)
    if wrong := list(failures(report)):
        sys.exit("\n".join(wrong))
    print("trimserve and Meta's code agree, but for the departures above")


def both(folder: Path, geometry: MetaGeometry, seed: int) -> tuple[Mllama, Judge]:
    """The same random weights, here and in Meta's code."""
    judge = Judge(geometry, seed)
    save_checkpoint(folder, judge.model.state_dict(), geometry, TOKENIZER_MODEL)
    return load_model(ModelConfig(model=str(folder)), EngineConfig()), judge


def origin() -> dict[str, Any]:
    """Machine, versions and commit."""
    run = about(torch.get_num_threads())
    run["versions"] |= {name: metadata.version(name) for name in META_PACKAGES}
    return run


def failures(report: dict[str, Any]) -> Iterator[str]:
    """What is not as it should be."""
    least = report["swap_factor"] * report["tolerance"]
    for line in report["logits"]:
        if line["kind"] == META_MASK:
            if line["smallest_difference"] < least:
                yield f"{line['kind']}: logits differ by {line['smallest_difference']:.1e} only: the mask shows nothing"
        elif line["largest_difference"] > report["tolerance"]:
            yield f"{line['kind']}: logits differ by {line['largest_difference']:.1e}, above {report['tolerance']:.0e}"
        if line["smallest_move"] is not None and line["smallest_move"] < least:
            yield f"{line['kind']}: another image moves logits by {line['smallest_move']:.1e} only"
    for name in ("pixels", "tokens"):
        if unequal := report[name]["unequal"]:
            yield f"{name}: {len(unequal)} differ, such as {unequal[0]}"
    if len(report["pixels"]["grids"]) < 8:
        yield f"pixels: only the grids {report['pixels']['grids']} were met"
    for departure in report["departures"]:
        if not departure["seen"]:
            yield f"departure not seen: {departure['given']}"


def show(report: dict[str, Any]) -> None:
    """Print a table for each part."""
    console = Console()
    logits = Table("logits of", "cases", "rows", "largest difference", "smallest move by another image")
    for line in report["logits"]:
        moved = "" if line["smallest_move"] is None else f"{line['smallest_move']:.2f}"
        cells = (str(line["cases"]), str(line["rows"]), f"{line['largest_difference']:.1e}", moved)
        logits.add_row(line["kind"], *cells)
    console.print(logits)
    pixels, tokens = report["pixels"], report["tokens"]
    console.print(f"pixels: {pixels['images']} images, {len(pixels['unequal'])} differ")
    console.print(f"token ids: {tokens['conversations']} conversations, {len(tokens['unequal'])} differ")
    table = Table("departure", "Meta", "trimserve", "seen")
    for each in report["departures"]:
        table.add_row(each["given"], each["meta"], each["trimserve"], "yes" if each["seen"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main()
