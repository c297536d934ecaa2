"""What bfloat16, int8 and int4 weights cost the embedded model, on held-out questions.

    python -m benchmarks.bench_precision [--questions 1000] [--out FILE] [--threads 1]

Every question is answered untrimmed and with the trimming that the checkpoint recommends, by the model in every
precision. Beside exact matches, with intervals over images, stands how far the distribution of the first token is from
that of float32: KL(float32 || this) in nats, and how often the likeliest token is the same. The last line of standard
output is the report.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from benchmarks.serve.report import about, write_json
from training.heldout import write_held_out
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest
from trimserve.config import Dtype, EngineConfig, ModelConfig, Quantize
from trimserve.evaluation.answers import UNTRIMMED
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.metrics import Bootstrap, is_match, kl_divergence
from trimserve.evaluation.pages import OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.trimming.plan import TrimPlan

__all__ = ["main"]

_OUT = Path(__file__).parent / "results" / "precision.json"
_VARIANTS: Final[tuple[tuple[Dtype, Quantize], ...]] = (
    ("float32", "none"),
    ("bfloat16", "none"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("float32", "int4"),
    ("bfloat16", "int4"),
)

Floats = NDArray[np.float64]


def main() -> None:
    """Command line."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        questions = load_questions(write_held_out(Path(folder), arguments.questions))
        rows = _measure(questions, Console(stderr=True))
    report = {
        "benchmark": "precision",
        **about(arguments.threads),
        "seconds": round(time.monotonic() - start, 1),
        "model": "embedded",
        "num_questions": len(questions),
        "rows": rows,
    }
    write_json(report, arguments.out)
    print(json.dumps(report))


def _measure(questions: Sequence[Question], console: Console) -> list[dict[str, Any]]:
    exact: dict[str, list[Floats]] = {}
    rows = []
    for dtype, quantize in _VARIANTS:
        model = load_model(ModelConfig(dtype=dtype, quantize=quantize), EngineConfig())
        info = model.info
        settings = {
            "untrimmed": UNTRIMMED,
            "trimmed": TrimRequest(k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio),
        }
        asked = track(questions, f"{dtype} {quantize}", console=console)
        answers = list(InProcess(model).answers(asked, [settings["trimmed"]]))
        for column, (name, trim) in enumerate(settings.items()):
            found = list(_first_tokens(model, questions, trim))
            row = {"dtype": dtype, "quantize": quantize, "weight_bytes": info.weight_bytes, "setting": name}
            texts = [of_question[column].text for of_question in answers]
            rows.append(row | _figures(questions, texts, exact.setdefault(name, found), found))
            console.print(rows[-1], highlight=False)
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
        parts = (ImageFile(question.image.read_bytes()), Text(question.text))
        prompt = model.prepare(ChatPrompt((Message("user", parts),)))
        images = [run_through(model.encode_image(image)) for image in prompt.images]
        kv = pool.key_values(len(prompt.token_ids), sum(image.num_features for image in images))
        logits = run_through(model.prefill(prompt, images, TrimPlan.of(trim), kv)).logits
        kv.release()
        yield logits.double().log_softmax(dim=-1).numpy()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="how many")
    parser.add_argument("--threads", type=int, default=1, help="threads of one op")
    parser.add_argument("--out", type=Path, default=_OUT, help="the report")
    return parser.parse_args()


if __name__ == "__main__":
    main()
