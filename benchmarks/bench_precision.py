"""What bfloat16, int8 and int4 weights cost the embedded model, on held-out questions.

    python -m benchmarks.bench_precision [--questions 1000] [--out FILE] [--threads 1]

Every question is answered untrimmed and with the trimming that the checkpoint recommends, by the model in every
precision. Beside exact matches, with intervals over images, stands how far the distribution of the first token is from
that of float32: KL(float32 || this) in nats, and how often the likeliest token is the same. The last line of standard
output is the report.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.ours import UNTRIMMED, encoded, prepared, recommended
from benchmarks.report import finish, markdown, options, precision
from training.heldout import write_held_out
from trimserve.api.trim import TrimRequest
from trimserve.config import Dtype, EngineConfig, ModelConfig, Quantize
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.metrics import Bootstrap, is_match, kl_divergence
from trimserve.evaluation.pages import OwnPages
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
    rows = []
    for dtype, quantize in ((dtype, quantize) for quantize in _QUANTIZE for dtype in _DTYPES):
        model = load_model(ModelConfig(dtype=dtype, quantize=quantize), EngineConfig())
        settings = {"untrimmed": UNTRIMMED, "trimmed": recommended(model.info)}
        answers = list(InProcess(model).answers(questions, [settings["trimmed"]]))
        for column, (name, trim) in enumerate(settings.items()):
            found = list(_first_tokens(model, questions, trim))
            row = {"dtype": dtype, "quantize": quantize, "weight_bytes": model.info.weight_bytes, "setting": name}
            texts = [of_question[column].text for of_question in answers]
            rows.append(row | _figures(questions, texts, exact.setdefault(name, found), found))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _figures(
    questions: Sequence[Question], texts: Sequence[str], exact: Sequence[Floats], found: Sequence[Floats]
) -> dict[str, Any]:
    """Accuracy of the answers, and how far `found`, distributions of first tokens, are from `exact`."""
    images = list(dict.fromkeys(question.image for question in questions))
    bootstrap = Bootstrap(np.array([images.index(question.image) for question in questions]))
    is_right = [is_match(text, question.answer or "") for text, question in zip(texts, questions, strict=True)]
    pairs = list(zip(exact, found, strict=True))
    divergences = [kl_divergence(p, q) for p, q in pairs]
    return {
        "accuracy": asdict(bootstrap.mean(np.array(is_right, dtype=np.float64))),
        "divergence_nats": asdict(bootstrap.mean(np.array(divergences))),
        "same_first_token": round(float(np.mean([p.argmax() == q.argmax() for p, q in pairs])), 4),
    }


def _first_tokens(model: Mllama, questions: Sequence[Question], trim: TrimRequest) -> Iterator[Floats]:
    """Logarithms of the first answered token's probabilities, [vocab_size], of each question."""
    info = model.info
    pool = OwnPages(info, info.max_model_len * (info.self_kv_bytes_per_token + info.cross_kv_bytes_per_feature))
    for question in questions:
        prompt = prepared(model, question)
        images = encoded(model, prompt)
        kv = pool.key_values(len(prompt.token_ids), sum(image.num_features for image in images))
        logits = run_through(model.prefill(prompt, images, TrimPlan.of(trim), kv)).logits
        kv.release()
        yield logits.double().log_softmax(dim=-1).numpy()


def table(report: dict[str, Any]) -> str:
    """Accuracy and divergence by precision, as Markdown."""
    rows = []
    for row in report["rows"]:
        match, trimming = row["accuracy"], "on" if row["setting"] == "trimmed" else "off"
        rows.append(
            [
                precision(row),
                f"{row['weight_bytes'] / 2**20:.1f} MiB",
                trimming,
                f"{match['value']:.1%} [{match['low']:.1%}, {match['high']:.1%}]",
                f"{row['divergence_nats']['value']:.6f}",
                f"{row['same_first_token']:.1%}",
            ]
        )
    head = ["weights", "bytes", "trimming", "exact match [95 %]", "KL to float32, nats", "same first token"]
    return f"{markdown(head, rows)}\n\n{report['num_questions']:,} held-out questions to the embedded model."


def main() -> None:
    """Command line."""
    parser = options(__doc__, "precision.json", threads=True)
    parser.add_argument("--questions", type=int, default=1000, help="how many")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), arguments.questions))
        rows = _measure(questions)
    figures = {"model": "embedded", "num_questions": len(questions), "rows": rows}
    finish("precision", arguments.out, figures, arguments.threads)


if __name__ == "__main__":
    main()
