"""Tables of docs/performance.md about decode steps, precision and quantized weights, made from what was measured."""

from typing import Any, Final

__all__ = ["generate_tables", "precision_table", "quantized_table", "real_size_table"]

_VARIANTS: Final = (
    ("trimserve", "float32", "none"),
    ("trimserve", "bfloat16", "none"),
    ("trimserve", "float32", "int8"),
    ("trimserve", "bfloat16", "int8"),
    ("transformers", "float32", "none"),
    ("transformers, compiled", "float32", "none"),
    ("transformers", "bfloat16", "none"),
)
_SETTINGS: Final = {"off": "4 tiles, untrimmed", "default": "4 tiles", "one_tile": "1 tile"}


def generate_tables(report: dict[str, Any] | None, folder: str) -> str:
    """Milliseconds of a decode step by batch, and of vision and prefill, as Markdown.

    Args:
        report: of `bench_generate`; None: there is none yet.
        folder: of the report and its picture, in `benchmarks/results`.
    """
    if report is None:
        return "Not measured yet: `python -m benchmarks.bench_generate`."
    steps = [row for row in report["rows"] if row["phase"] == "decode"]
    batches = sorted({row["batch"] for row in steps})
    lines = [
        f"![tokens per second by batch, and steps beside their floor](../benchmarks/results/{folder}/generate.png)",
        "",
        f"| decode step, ms (times its floor) | request | {' | '.join(f'batch {batch}' for batch in batches)} |",
        f"|---|---|{'---:|' * len(batches)}",
    ]
    for engine, dtype, quantize in _VARIANTS:
        for setting, request in _SETTINGS.items():
            wanted = {"engine": engine, "dtype": dtype, "quantize": quantize, "setting": setting}
            cells = {row["batch"]: _step(row) for row in steps if wanted.items() <= row.items()}
            if cells:
                name = f"{engine}, {_precision(dtype, quantize)}"
                lines.append(f"| {name} | {request} | {' | '.join(cells.get(batch, '') for batch in batches)} |")
    lines += ["", "| ms | request | vision | prefill |", "|---|---|---:|---:|"]
    for engine, dtype, _ in (each for each in _VARIANTS if each[2] == "none"):
        for setting, request in _SETTINGS.items():
            wanted = {"engine": engine, "dtype": dtype, "setting": setting}
            found = {row["phase"]: row["ms"]["median"] for row in report["rows"] if wanted.items() <= row.items()}
            if "prefill" in found:
                vision = f"{found['vision']:,.0f}" if "vision" in found else ""
                lines.append(f"| {engine}, {dtype} | {request} | {vision} | {found['prefill']:,.0f} |")
    machine = report["machine"]
    origin = f"{machine['cpu']}, {machine['simd']}, {machine['num_threads']} of {machine['num_cpus']} CPUs"
    return "\n".join([*lines, "", f"Measured on {origin}, torch {report['versions']['torch']}."])


def precision_table(report: dict[str, Any] | None) -> str:
    """Accuracy and divergence by precision, as Markdown.

    Args:
        report: of `bench_precision`; None says how to get one.
    """
    if report is None:
        return "Not measured yet: `python -m benchmarks.bench_precision`."
    lines = [
        "| weights | bytes | trimming | exact match [95 %] | KL to float32, nats | same first token |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for row in report["rows"]:
        match = row["accuracy"]
        interval = f"{match['value']:.1%} [{match['low']:.1%}, {match['high']:.1%}]"
        lines.append(
            f"| {_precision(row['dtype'], row['quantize'])} | {row['weight_bytes'] / 2**20:.1f} MiB | "
            f"{'on' if row['setting'] == 'trimmed' else 'off'} | {interval} | "
            f"{row['divergence_nats']['value']:.6f} | {row['same_first_token']:.1%} |"
        )
    return "\n".join([*lines, "", f"{report['num_questions']:,} held-out questions to the embedded model."])


def quantized_table(report: dict[str, Any] | None) -> str:
    """Steps and prefills with quantized weights beside their floors, as Markdown.

    Args:
        report: of `bench_quantized`; None says how to get one.
    """
    if report is None:
        return "Not measured yet: `python -m benchmarks.bench_quantized`."
    lines = [
        "| weights | rows | ms | reading the weights, ms | products, ms | times the larger |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    told = []
    for row in report["rows"]:
        if "int8_over_int4" in row:
            told.append(f"{row['int8_over_int4']['median']:.2f} with {row['dtype']} rows")
            continue
        lines.append(
            f"| {_precision(row['dtype'], row['quantize'])} | {row['rows']} | {row['milliseconds']['median']:.1f} | "
            f"{row['bytes_floor_ms']:.1f} | {row['products_floor_ms']:.1f} | {row['over_floor']:.2f} |"
        )
    told_ratios = (
        f"A step with int8 over one with int4: {' and '.join(told)}. The last column compares fastest tenths; it falls "
        "below 1 where many outputs share the packing of rows, which the products' rate counts for few."
    )
    return "\n".join([*lines, "", told_ratios, "", _machine(report)])


def real_size_table(report: dict[str, Any] | None) -> str:
    """What serving a model of 11B parameters takes, as Markdown.

    Args:
        report: of `bench_real_size`; None says how to get one.
    """
    if report is None:
        return "Not measured yet: `python -m benchmarks.bench_real_size`."
    lines = [
        "| weights | ready, s | peak memory | first token, new image, s | same image, s | step, ms (times its bytes) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['quantize']} | {row['ready_seconds']:,.0f} | {row['peak_bytes'] / 2**30:.1f} GiB | "
        f"{row['first_token_seconds_of_new_image']:,.1f} | {row['first_token_seconds_of_same_image']:,.1f} | "
        f"{row['step_ms']:,.0f} ({row['step_over_floor']:.2f}) |"
        for row in report["rows"]
    ]
    return "\n".join([*lines, "", _machine(report)])


def _machine(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    return f"Measured on {machine['cpu']}, {machine['num_threads']} thread(s), torch {versions['torch']}."


def _precision(dtype: str, quantize: str) -> str:
    return dtype if quantize == "none" else f"{quantize}, {dtype}"


def _step(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return "failed"
    floor = f" ({row['times_floor']:.2f})" if "times_floor" in row else ""
    return f"{row['ms']['median']:,.1f}{floor}"
