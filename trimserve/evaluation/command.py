"""`trimserve eval`: options in, files and a table out."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from trimserve.config import Config, EngineConfig, ModelConfig
from trimserve.connection import Connection, connected, with_connection
from trimserve.evaluation import options
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions, load_questions
from trimserve.evaluation.progress import progress
from trimserve.knobs import adapter_of

if TYPE_CHECKING:
    from trimserve.api.trim import TrimRequest
    from trimserve.evaluation.answers import Answerer
    from trimserve.evaluation.parameters import Measure
    from trimserve.evaluation.report import Report

__all__ = ["evaluate"]


@with_connection("a model in this process")
def evaluate(
    data: options.Data,
    out: options.Out,
    policies: options.Policies = "trimmed,random,strided",
    k_ratios: options.KRatios = "0.02,0.05,0.1,0.2,0.4,1.0",
    keep: options.Keep = None,
    merge_ratios: options.MergeRatios = "0",
    limit: options.Limit = None,
    only_calibrate: options.Calibrate = False,
    max_kl: options.MaxKl = 0.02,
    by: options.By = "cosine",
    num_threads: options.NumThreads = None,
    model: options.Model = None,
    device: options.ModelDevice = "auto",
    dtype: options.ModelDtype = "auto",
    quantize: options.ModelQuantize = "none",
    codebook: options.ModelCodebook = None,
    compressor: options.ModelCompressor = None,
    guide_model: options.GuideModel = None,
    adapter: options.Adapter = None,
    *,
    connection: Connection,
) -> None:
    """Measure what trimming costs: accuracy and divergence against the kept fraction of the visual features."""
    from trimserve.evaluation.settings import has_parameters, parse_policies, parse_ratios

    if keep is None and options.ALL_POLICIES in policies.split(",") and not only_calibrate:
        keep = options.KEEP_OF_ALL
    is_kept = keep is not None
    budgets = parse_ratios(k_ratios, "--k-ratios") if keep is None else parse_ratios(keep, "--keep")
    merge_budgets = parse_ratios(merge_ratios, "--merge-ratios", can_be_zero=True)
    questions = load_questions(data, limit=limit, need_answers=not only_calibrate)
    draw = None if only_calibrate else _find_picture(is_comparison=is_kept)
    config = ModelConfig(
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        codebook=codebook,
        compressor=tuple(compressor or ()),
        guide_model=guide_model,
    )
    if connection.address is not None and only_calibrate and is_kept:
        raise typer.BadParameter("--calibrate with --keep compares logits, which a server does not tell")
    with _answerer(connection, config, num_threads, adapter) as answerer:
        trims = parse_policies(policies, answerer.policies, is_kept=is_kept)
        first = replace(trims[0], merge_ratio=merge_budgets[0])
        if only_calibrate and is_kept and not has_parameters(first):
            raise typer.BadParameter(f"{first.policy} has no parameters to be found", param_hint="--policies")
        out.mkdir(parents=True, exist_ok=True)
        if draw is not None:
            merged = [replace(trim, merge_ratio=merge_ratio) for trim in trims for merge_ratio in merge_budgets]
            _compare(answerer, questions, merged, budgets, out, draw, is_kept=is_kept)
        elif is_kept:
            _calibrate_parameters(answerer, questions, first, budgets, by, out / "calibration.json")
        else:
            _calibrate(answerer, questions, first, max_kl, out / "calibration.json")


def _compare(
    answerer: "Answerer",
    questions: Sequence[Question],
    policies: Sequence["TrimRequest"],
    budgets: Sequence[float],
    out: Path,
    draw: Callable[["Report", Path], None],
    *,
    is_kept: bool,
) -> None:
    """Ask everything under every policy and budget; write the report and its picture."""
    from trimserve.evaluation.curve import measure_curve
    from trimserve.evaluation.settings import under

    trims = [trim for policy in policies for trim in under(policy, budgets, is_kept=is_kept)]
    with progress("questions", len(questions)) as advance:
        report = measure_curve(answerer, questions, trims, on_question=advance)
    (out / "report.json").write_text(report.to_json())
    draw(report, out / "curves.png")
    Console().print(_table(report))
    _tell_files(out / "report.json", out / "curves.png")


def _calibrate(
    answerer: "Answerer", questions: Sequence[Question], trim: "TrimRequest", max_kl: float, file: Path
) -> None:
    """Find the smallest k_ratio within the bound."""
    from trimserve.evaluation.curve import MAX_PROBES, calibrate

    with progress("questions, at most", MAX_PROBES * len(questions)) as advance:
        found = calibrate(answerer, questions, max_kl, trim, on_question=advance)
    setting = {"policy": trim.policy, "merge_ratio": trim.merge_ratio}
    _write_calibration(answerer, questions, {**setting, **asdict(found)}, file)
    table = Table("k_ratio", "kept", "KL, nats", box=None)
    for probe in sorted(found.probes, key=lambda probe: probe.k_ratio):
        table.add_row(f"{probe.k_ratio:.2f}", f"{probe.kept_fraction:.1%}", f"{probe.divergence:.4f}")
    Console().print(table)
    Console().print(f"smallest k_ratio with a mean KL of at most {max_kl:g} nats: {found.k_ratio:.2f}", highlight=False)
    _tell_files(file)


def _calibrate_parameters(
    answerer: "Answerer",
    questions: Sequence[Question],
    trim: "TrimRequest",
    budgets: Sequence[float],
    measure: "Measure",
    file: Path,
) -> None:
    """Find the parameters under which answers begin most like the untrimmed ones."""
    from trimserve.evaluation.parameters import find_parameters, max_passes
    from trimserve.evaluation.report import variant

    with progress("questions, at most", max_passes(trim.policy) * len(questions)) as advance:
        found = find_parameters(answerer, questions, trim, budgets, measure, on_question=advance)
    setting = {"policy": trim.policy, "merge_ratio": trim.merge_ratio, "keep": list(budgets), "by": measure}
    _write_calibration(answerer, questions, {**setting, **asdict(found)}, file)
    table = Table("parameters", "cosine", "KL, nats", box=None)
    for probe in found.probes:
        name = variant(trim.policy, probe.parameters)
        table.add_row(name, f"{probe.similarity:.5f}", f"{probe.divergence:.4f}")
    Console().print(table)
    Console().print(f"most like untrimmed: {variant(trim.policy, found.parameters)}", highlight=False)
    _tell_files(file)


def _write_calibration(
    answerer: "Answerer", questions: Sequence[Question], found: dict[str, object], file: Path
) -> None:
    document = {"model": answerer.describe(), "data": describe_questions(questions), **found}
    file.write_text(json.dumps(document, indent=2) + "\n")


def _table(report: "Report") -> Table:
    budget = "keep" if any(row.keep for row in report.rows) else "k_ratio"
    table = Table("policy", budget, "merge_ratio", "kept", "exact match", "95 % interval", "KL, nats", box=None)
    for row in report.rows:
        if row.kind == ALL_KINDS:
            accuracy = row.accuracy
            interval = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
            figures = (f"{row.kept_fraction:.1%}", f"{accuracy.value:.1%}", interval, f"{row.divergence.value:.4f}")
            table.add_row(row.name, f"{row.keep or row.k_ratio:g}", f"{row.merge_ratio:g}", *figures)
    return table


def _tell_files(*files: Path) -> None:
    written = ", ".join(map(str, files))
    Console(stderr=True).print(written, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _answerer(
    connection: Connection, config: ModelConfig, num_threads: int | None, adapter: str | None
) -> Iterator["Answerer"]:
    """A server, or a model in this process."""
    is_served = connection.address is not None
    name, with_adapter = adapter_of(adapter, Config(model=config), is_served=is_served)
    if is_served:
        from trimserve.evaluation.served import Served

        with connected(connection) as client:
            yield Served(client, adapter=name)
    else:
        yield _in_process(with_adapter.model, num_threads, name)


def _in_process(model: ModelConfig, num_threads: int | None, adapter: str | None) -> "Answerer":
    import torch

    from trimserve.evaluation.in_process import InProcess
    from trimserve.model.loading import load_model

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    folder = None if adapter is None else model.adapters[adapter]
    return InProcess(load_model(model, EngineConfig()), adapter=folder)


def _find_picture(*, is_comparison: bool) -> Callable[["Report", Path], None]:
    """What draws the report, looked for before anything is measured."""
    try:
        from trimserve.evaluation.comparison import draw_comparison
        from trimserve.evaluation.picture import draw_curves
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"the picture needs {error.name}: pip install 'trimserve[eval]'") from None
    return draw_comparison if is_comparison else draw_curves
