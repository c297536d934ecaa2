"""Times vision encoder, prefill and decode steps beside transformers, and decode steps beside their floor.

    python -m benchmarks.bench_generate [--bench-model DIR] [--out DIR] [--quick]

The geometry is `bench`'s (`bench_model.py`). A question about an image of four tiles is asked untrimmed (`off`) and
trimmed (`default`), one about an image of one tile trimmed (`one_tile`); images are encoded and prompts read one at a
time, as the engine does. Every sequence of a batch holds keys and values in pages of its own. transformers pads each
image to a full canvas; its step is timed with the cache that grows and sdpa, and with a static cache and
`torch.compile`. The floor of a step is the larger of the bytes of weights, keys and values over the read bandwidth and
of the products over the rate of products (`generate/floor.py`); a step and a read of much memory take turns.

Logits are compared first. Writes `report.json` and `generate.png`; the last line of standard output is the report.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console

from benchmarks.bench_model import BENCH_MODEL, max_kept_fraction, write_bench_model
from benchmarks.generate.floor import Floor, StepShape
from benchmarks.generate.ours import Ours
from benchmarks.generate.picture import draw_report
from benchmarks.generate.rival import Rival
from benchmarks.generate.setting import SETTINGS
from benchmarks.generate.timing import time_calls, time_in_turns
from benchmarks.ops.measure import stream
from benchmarks.serve.report import about, write_json
from benchmarks.transformers_step import cache_of
from trimserve.config import Dtype, Quantize
from trimserve.model.loading import embedded_model_folder

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "generate"
_LOGITS = 1e-2
"""By so much logits of a standard deviation of about 3 may differ in float32."""
_IMPORT = "import time, torch; start = time.perf_counter(); import trimserve.ops; print(time.perf_counter() - start)"

Row = dict[str, Any]


class _Variant(NamedTuple):
    """How our model is stored."""

    dtype: Dtype
    quantize: Quantize


_VARIANTS: Final = (
    _Variant("float32", "none"),
    _Variant("bfloat16", "none"),
    _Variant("float32", "int8"),
    _Variant("bfloat16", "int8"),
)


class _Plan(NamedTuple):
    """How much is measured."""

    folder: Path
    cap: float | None
    """Of the features that trimmed settings keep."""
    batches: Sequence[int] = (1, 4, 8, 16, 32)
    variants: Sequence[_Variant] = _VARIANTS
    compiled_batches: Sequence[int] = (1, 8)
    """Each is compiled anew."""
    seconds: float = 1.0
    """Of every figure."""


@torch.inference_mode()
def _ours(plan: _Plan, variant: _Variant) -> Iterator[Row]:
    ours = Ours(plan.folder, *variant, max_kept_fraction=plan.cap, most=max(plan.batches))
    shape = StepShape.of_checkpoint(plan.folder, getattr(torch, variant.dtype), variant.quantize)
    for setting in SETTINGS:
        asked = ours.ask(setting)
        row = {"engine": "trimserve", **variant._asdict(), "setting": setting.name, **asked.describe()}
        if variant.quantize == "none" and setting.name != "default":  # whose image is that of `off`
            yield row | {"phase": "vision", "batch": 1, "ms": time_calls(asked.encode, plan.seconds)}
        if variant.quantize == "none":
            yield row | {"phase": "prefill", "batch": 1, "ms": time_calls(asked.prefill, plan.seconds)}
        read, read_bytes = stream("read")
        for batch in plan.batches:
            taken, reading = time_in_turns([asked.step(batch), read], plan.seconds)
            floor = Floor.of_step(shape, batch, asked.kv_bytes(batch), read_bytes / reading["median"] * 1e3)
            yield row | {"phase": "decode", "batch": batch, "ms": taken, **_beside(floor, taken["median"])}
        asked.release()


def _beside(floor: Floor, taken: float) -> Row:
    return {
        "bytes": floor.num_bytes,
        "read_bytes_per_second": round(floor.num_bytes / floor.bytes_ms * 1e3),
        "bytes_ms": round(floor.bytes_ms, 3),
        "products_ms": round(floor.products_ms, 3),
        "times_floor": round(taken / floor.ms, 3),
    }


@torch.inference_mode()
def _theirs(plan: _Plan, rival: Rival, dtype: Dtype) -> Iterator[Row]:
    rival.to(getattr(torch, dtype))
    for setting in SETTINGS:
        if setting.name == "default":
            continue  # is the prompt of `off`
        rival.ask(setting)
        row = {"engine": "transformers", "dtype": dtype, "quantize": "none", "setting": setting.name}
        yield row | {"phase": "vision", "batch": 1, "ms": time_calls(rival.encode, plan.seconds)}
        prefill = partial(rival.prefill, rival.encode())
        yield row | {"phase": "prefill", "batch": 1, "ms": time_calls(prefill, plan.seconds)}
        cache = cache_of(prefill())
        for batch in plan.batches:
            yield row | {"phase": "decode", "batch": batch, "ms": time_calls(rival.step(cache, batch), plan.seconds)}
        for batch in plan.compiled_batches if (setting.name, dtype) == ("off", "float32") else ():
            compiled = row | {"engine": "transformers, compiled", "phase": "decode", "batch": batch}
            try:
                yield compiled | {"ms": time_calls(rival.compiled_step(batch), plan.seconds)}
            except Exception as error:  # noqa: BLE001 - the compiler's own, of whatever kind
                yield compiled | {"error": f"{type(error).__name__}: {str(error)[:300]}"}


@torch.inference_mode()
def _compare(plan: _Plan, rival: Rival) -> Row:
    """Both models' logits of the untrimmed prompt, in float32.

    Raises:
        AssertionError: they differ.
    """
    untrimmed = SETTINGS[0]
    asked = Ours(plan.folder, "float32", "none", max_kept_fraction=None, most=1).ask(untrimmed)
    rival.to(torch.float32)
    rival.ask(untrimmed)
    expected = rival.prefill(rival.encode()).logits[0, -1]
    difference = float((asked.logits - expected).abs().max())
    assert rival.token_ids == list(asked.prompt.token_ids)
    assert difference < _LOGITS
    return {"largest_logit_difference": round(difference, 6), "logit_std": round(float(expected.std()), 3)}


def _speedups(rows: Sequence[Row]) -> list[Row]:
    """How many times faster than transformers in the same dtype each of our figures without quantization is."""
    theirs = {_place(row): row["ms"]["median"] for row in rows if row["engine"] == "transformers"}
    found = []
    for row in rows:
        place = _place(row | {"setting": "off" if row["setting"] == "default" else row["setting"]})
        if row["engine"] == "trimserve" and place in theirs:
            named = {name: row[name] for name in ("phase", "dtype", "quantize", "setting", "batch")}
            found.append(named | {"speedup": round(theirs[place] / row["ms"]["median"], 2)})
    return found


def _place(row: Row) -> tuple[Any, ...]:
    return row["phase"], row["dtype"], row["setting"], row["batch"]


def _import_seconds() -> float:
    """What importing the ops takes beyond torch, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    return round(float(done.stdout), 3)


def main() -> None:
    """Command line."""
    arguments = _arguments()
    console, start = Console(stderr=True), time.monotonic()
    torch.set_num_threads(arguments.threads)
    plan = _plan(arguments)
    rival = Rival(plan.folder)
    equality = _compare(plan, rival)
    rows: list[Row] = []
    for variant in plan.variants:
        for row in _ours(plan, variant):
            rows.append(row)
            console.print(_line(row), highlight=False, soft_wrap=True)
    for dtype in dict.fromkeys(variant.dtype for variant in plan.variants):
        for row in _theirs(plan, rival, dtype):
            rows.append(row)
            console.print(_line(row), highlight=False, soft_wrap=True)
    report = {
        "benchmark": "generate",
        **about(arguments.threads),
        "seconds": round(time.monotonic() - start, 1),
        "model": "embedded" if arguments.quick else "bench",
        "max_kept_fraction": plan.cap,
        "import_seconds": _import_seconds(),
        **equality,
        "rows": rows,
        "speedups_over_transformers": _speedups(rows),
    }
    write_json(report, arguments.out / "report.json")
    draw_report(report, arguments.out / "generate.png")
    print(json.dumps(report))


def _plan(arguments: argparse.Namespace) -> _Plan:
    if arguments.quick:
        folder = embedded_model_folder()
        return _Plan(folder, None, batches=(1, 2), variants=_VARIANTS[:3], compiled_batches=(), seconds=0.01)
    if not (arguments.bench_model / "config.json").exists():
        write_bench_model(arguments.bench_model)
    return _Plan(arguments.bench_model, max_kept_fraction())


def _line(row: Row) -> str:
    name = f"{row['engine']} {row['dtype']} {row['quantize']}"
    taken = f"{row['ms']['median']:10.2f} ms" if "ms" in row else row["error"][:60]
    floor = f"{row['times_floor']:6.2f} of floor" if "times_floor" in row else ""
    return f"{name:36} {row['setting']:9} {row['phase']:8} {row['batch']:3} {taken} {floor}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bench-model", type=Path, default=BENCH_MODEL, help="folder of the checkpoint; written if it is not there")
    add("--threads", type=int, default=1, help="threads of one op")
    add("--out", type=Path, default=_OUT, help="folder of the report")
    add("--quick", action="store_true", help="little of everything, of the embedded model, to see whether it works")
    return parser.parse_args()


if __name__ == "__main__":
    main()
