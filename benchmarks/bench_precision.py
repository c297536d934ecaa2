"""What bfloat16, int8 and int4 weights cost the embedded model, on held-out questions.

    python -m benchmarks.bench_precision [--questions 1000] [--out FILE] [--threads 1]

Every question is answered untrimmed and with the trimming that the checkpoint recommends, by the model in every
precision. Beside exact matches, with intervals over images, stands how far the distribution of the first token is from
that of float32: KL(float32 || this) in nats, and how often the likeliest token is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.ours import encoded, recommended
from benchmarks.report import Columns, command_line, finish, noted, precision, tabulated
from training.heldout import held_out
from trimserve.api.trim import TrimRequest
from trimserve.config import Dtype, EngineConfig, ModelConfig, Quantize
from trimserve.evaluation.answers import UNTRIMMED, Answer
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.in_process import InProcess, prepare_question
from trimserve.evaluation.metrics import kl_divergence
from trimserve.evaluation.pages import OwnPages
from trimserve.evaluation.report import bootstrap_of, is_right
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.trimming.plan import TrimPlan

__all__ = ["main", "table"]

_DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
_QUANTIZE: Final[tuple[Quantize, ...]] = ("none", "int8", "int4")

Floats = NDArray[np.float64]


def _measure(questions: Sequence[Question]) -> list[dict[str, Any]]:
    exact: dict[str, list[Floats]] = {}
    rows: list[dict[str, Any]] = []
    for dtype, quantize in ((dtype, quantize) for quantize in _QUANTIZE for dtype in _DTYPES):
        model = load_model(ModelConfig(dtype=dtype, quantize=quantize), EngineConfig())
        settings = {"untrimmed": UNTRIMMED, "trimmed": recommended(model.info)}
        answers = list(InProcess(model).answers(questions, [settings["trimmed"]]))
        for column, (name, trim) in enumerate(settings.items()):
            found = list(_first_tokens(model, questions, trim))
            row = {"dtype": dtype, "quantize": quantize, "weight_bytes": model.info.weight_bytes, "setting": name}
            given = [of_question[column] for of_question in answers]
            noted(rows, row | _figures(questions, given, exact.setdefault(name, found), found))
    return rows


def _figures(
    questions: Sequence[Question], answers: Sequence[Answer], exact: Sequence[Floats], found: Sequence[Floats]
) -> dict[str, Any]:
    """Accuracy of the answers, and how far `found`, distributions of first tokens, are from `exact`."""
    bootstrap = bootstrap_of(questions)
    pairs = list(zip(exact, found, strict=True))
    divergences = [kl_divergence(p, q) for p, q in pairs]
    return {
        "accuracy": asdict(bootstrap.mean(is_right(questions, answers))),
        "divergence_nats": asdict(bootstrap.mean(np.array(divergences))),
        "same_first_token": round(float(np.mean([p.argmax() == q.argmax() for p, q in pairs])), 4),
    }


def _first_tokens(model: Mllama, questions: Sequence[Question], trim: TrimRequest) -> Iterator[Floats]:
    """Logarithms of the first answered token's probabilities, [vocab_size], of each question."""
    info = model.info
    pool = OwnPages(info, info.max_model_len * (info.self_kv_bytes_per_token + info.cross_kv_bytes_per_feature))
    for question in questions:
        prompt = prepare_question(model, question)
        images = encoded(model, prompt)
        kv = pool.key_values(len(prompt.token_ids), sum(image.num_features for image in images))
        logits = run_through(model.prefill(prompt, images, TrimPlan.of(trim), kv)).logits
        kv.release()
        yield logits.double().log_softmax(dim=-1).numpy()


def table(report: dict[str, Any]) -> str:
    """Accuracy and divergence by precision, as Markdown."""
    columns: Columns = {
        "weights": precision,
        "bytes": lambda row: f"{row['weight_bytes'] / 2**20:.1f} MiB",
        "trimming": lambda row: "on" if row["setting"] == "trimmed" else "off",
        "exact match [95 %]": "{accuracy[value]:.1%} [{accuracy[low]:.1%}, {accuracy[high]:.1%}]",
        "KL to float32, nats": "{divergence_nats[value]:.6f}",
        "same first token": "{same_first_token:.1%}",
    }
    asked = f"{report['num_questions']:,} held-out questions to the embedded model."
    return f"{tabulated(report['rows'], columns)}\n\n{asked}"


def main() -> None:
    """Measure and write."""
    arguments = command_line(__doc__, "precision.json", questions=1000)
    with held_out(arguments.questions) as questions:
        rows = _measure(questions)
    finish(arguments, {"model": "embedded", "num_questions": len(questions), "rows": rows})


if __name__ == "__main__":
    main()
