"""`trimserve eval`: options in, files and a table out."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from trimserve.client import Client
from trimserve.config import Dtype, EngineConfig, ModelConfig, Quantize
from trimserve.connection import Ca, Token, connected
from trimserve.evaluation.dataset import ALL_KINDS, Question, describe_questions, load_questions

if TYPE_CHECKING:
    from trimserve.evaluation.answers import Answerer
    from trimserve.evaluation.report import Report
    from trimserve.models.trimming import TrimParams

__all__ = ["evaluate"]

_ALL = "all"
_KEEP = "0.05,0.11,0.22,0.33,0.5"

_console = Console(stderr=True)


def evaluate(
    data: Annotated[Path, typer.Option(help="JSONL file: image, question, answer and kind on each line.")],
    out: Annotated[Path, typer.Option(help="Folder for report.json and curves.png, or calibration.json.")],
    policies: Annotated[
        str,
        typer.Option(
            help="What chooses the features, separated by commas; the first is compared with the others. all: every "
            "policy, beside random."
        ),
    ] = "trimmed,random,strided",
    k_ratios: Annotated[
        str,
        typer.Option(
            help="Budgets per head, each in (0, 1], separated by commas; other policies than trimmed keep as many "
            "features as it does."
        ),
    ] = "0.02,0.05,0.1,0.2,0.4,1.0",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Instead of --k-ratios: shares of each image that every policy keeps, each in (0, 1], separated by "
            f"commas; with --policies all: {_KEEP}."
        ),
    ] = None,
    merge_ratios: Annotated[
        str,
        typer.Option(
            help="Rows that the other features of a tile are merged into, as shares of its own, each in [0, 1], "
            "separated by commas; 0 drops them."
        ),
    ] = "0",
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first questions only.")] = None,
    only_calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Instead find the smallest k_ratio within --max-kl, with the first policy and the first merge_ratio; "
            "needs no answers.",
        ),
    ] = False,
    max_kl: Annotated[
        float, typer.Option(min=0, help="Bound on the mean KL of the first token's distribution to untrimmed, in nats.")
    ] = 0.02,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one op on the CPU; default: PyTorch's choice.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running server; default: a model in this process.")
    ] = None,
    ca: Ca = None,
    token: Token = None,
    model: Annotated[str | None, typer.Option("--model", help="Folder or hub id; default: the embedded model.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and KV of a model in this process.")] = "auto",
    quantize: Annotated[Quantize, typer.Option(help="How that model's linear layers are stored.")] = "none",
) -> None:
    """Measure what trimming costs: accuracy and divergence against the kept fraction of the visual features."""
    from trimserve.evaluation.curve import measure_curve
    from trimserve.models.trimming import TrimParams

    if keep is None and policies == _ALL:
        keep = _KEEP
    budgets = _parse_ratios(keep, "--keep") if keep else _parse_ratios(k_ratios, "--k-ratios")
    merge_budgets = _parse_ratios(merge_ratios, "--merge-ratios", can_be_zero=True)
    questions = load_questions(data, limit=limit, need_answers=not only_calibrate)
    draw = None if only_calibrate else _find_picture(is_comparison=keep is not None)
    if address is not None and (model, dtype, quantize) != (None, "auto", "none"):
        raise typer.BadParameter("--address excludes --model, --dtype and --quantize")
    server = None if address is None else connected(address, ca, token)
    with _answerer(server, ModelConfig(model=model, dtype=dtype, quantize=quantize), num_threads) as answerer:
        names = _parse_policies(policies, answerer.policies, is_kept=keep is not None and not only_calibrate)
        out.mkdir(parents=True, exist_ok=True)
        if draw is None:
            trim = TrimParams(policy=names[0], merge_ratio=merge_budgets[0])
            _calibrate(answerer, questions, trim, max_kl, out / "calibration.json")
            return
        trims = [
            trim
            for name in names
            for merge_ratio in merge_budgets
            for trim in _under(TrimParams(policy=name, merge_ratio=merge_ratio), budgets, is_kept=keep is not None)
        ]
        with _progress("questions", len(questions)) as advance:
            report = measure_curve(answerer, questions, trims, on_question=advance)
    (out / "report.json").write_text(report.to_json())
    draw(report, out / "curves.png")
    Console().print(_table(report))
    _console.print(f"{out / 'report.json'}, {out / 'curves.png'}", highlight=False, markup=False, soft_wrap=True)


def _calibrate(
    answerer: "Answerer", questions: Sequence[Question], trim: "TrimParams", max_kl: float, file: Path
) -> None:
    from trimserve.evaluation.curve import MAX_PROBES, calibrate

    with _progress("questions, at most", MAX_PROBES * len(questions)) as advance:
        found = calibrate(answerer, questions, max_kl, trim, on_question=advance)
    setting = {"policy": trim.policy, "merge_ratio": trim.merge_ratio}
    document = {"model": answerer.describe(), "data": describe_questions(questions), **setting, **asdict(found)}
    file.write_text(json.dumps(document, indent=2) + "\n")
    table = Table("k_ratio", "kept", "KL, nats", box=None)
    for probe in sorted(found.probes, key=lambda probe: probe.k_ratio):
        table.add_row(f"{probe.k_ratio:.2f}", f"{probe.kept_fraction:.1%}", f"{probe.divergence:.4f}")
    Console().print(table)
    Console().print(f"smallest k_ratio with a mean KL of at most {max_kl:g} nats: {found.k_ratio:.2f}", highlight=False)
    _console.print(str(file), highlight=False, markup=False, soft_wrap=True)


def _table(report: "Report") -> Table:
    budget = "keep" if any(row.keep for row in report.rows) else "k_ratio"
    table = Table("policy", budget, "merge_ratio", "kept", "exact match", "95 % interval", "KL, nats", box=None)
    for row in report.rows:
        if row.kind == ALL_KINDS:
            accuracy = row.accuracy
            interval = f"{accuracy.low:.1%} to {accuracy.high:.1%}"
            figures = (f"{row.kept_fraction:.1%}", f"{accuracy.value:.1%}", interval, f"{row.divergence.value:.4f}")
            table.add_row(row.policy, f"{row.keep or row.k_ratio:g}", f"{row.merge_ratio:g}", *figures)
    return table


@contextmanager
def _answerer(
    server: AbstractContextManager[Client] | None, model: ModelConfig, num_threads: int | None
) -> Iterator["Answerer"]:
    """A server, or a model in this process."""
    if server is None:
        import torch

        from trimserve.evaluation.in_process import InProcess
        from trimserve.models.loading import load_model

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        yield InProcess(load_model(model, EngineConfig()))
        return
    from trimserve.evaluation.served import Served

    with server as client:
        yield Served(client)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error; what is yielded moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _parse_ratios(text: str, option: str, *, can_be_zero: bool = False) -> list[float]:
    bounds = "[0, 1]" if can_be_zero else "(0, 1]"
    ratios: list[float] = []
    for part in text.split(","):
        try:
            ratio = float(part)
        except ValueError:
            ratio = math.nan
        if not (0 < ratio <= 1 or (can_be_zero and ratio == 0)):
            raise typer.BadParameter(f"must be numbers in {bounds}, got {part.strip()!r}", param_hint=option)
        ratios.append(ratio)
    return list(dict.fromkeys(ratios))


def _parse_policies(text: str, known: Sequence[str], *, is_kept: bool) -> list[str]:
    from trimserve.models.policies.policy import BeforeDecoder
    from trimserve.models.policies.table import POLICIES

    asked = ["random", *known] if text == _ALL else [name.strip() for name in text.split(",")]
    names = list(dict.fromkeys(asked))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"must be among {', '.join(known)}, got {name!r}", param_hint="--policies")
        if issubclass(POLICIES[name], BeforeDecoder) and not is_kept:
            raise typer.BadParameter(f"{name} chooses before any head looks: use --keep", param_hint="--policies")
    return names


def _under(trim: "TrimParams", budgets: Sequence[float], *, is_kept: bool) -> list["TrimParams"]:
    """A policy under each of the budgets: shares of the image, or of each head's."""
    from trimserve.models.policies.budget import FixedRatio
    from trimserve.models.policies.table import POLICIES

    if not is_kept:
        return [replace(trim, k_ratio=ratio) for ratio in budgets]
    if not POLICIES[trim.policy].budgets:
        return [trim]
    return [replace(trim, budget=FixedRatio(ratio)) for ratio in budgets]


def _find_picture(*, is_comparison: bool) -> Callable[["Report", Path], None]:
    """What draws the report, looked for before anything is measured."""
    try:
        from trimserve.evaluation.comparison import draw_comparison
        from trimserve.evaluation.picture import draw_curves
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"the picture needs {error.name}: pip install 'trimserve[eval]'") from None
    return draw_comparison if is_comparison else draw_curves
