"""What later cross-attention layers that hold less cost in accuracy, and what they save in rows and in pages.

    python -m benchmarks.bench_layers [--questions 300] [--out FILE]

The embedded model answers held-out questions with several values of `cascade_ratio` (`sparsevlm`, half of the image
kept by the first layer) and of `late_exit_threshold` (`todre`, all of it kept), greedily. Rows and bytes are those of
the cross-attention layers of a request, mean over the questions: bytes of whole pages that hold as many layers as can
share one, and of pages of one layer.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.policy_tables import later_layers
from benchmarks.serve.report import about, write_json
from training.heldout import write_held_out
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.dataset import Question, load_questions
from trimserve.evaluation.metrics import is_match
from trimserve.evaluation.pages import OwnPages
from trimserve.evaluation.report import UNTRIMMED_POLICY
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

_OUT = Path(__file__).parent / "results" / "policies" / "later_layers.json"
_KEEP = 0.5
"""Of `sparsevlm`, in the first layer."""
_CASCADE_RATIOS = (1.0, 0.7, 0.5, 0.3)
_THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_MAX_NEW_TOKENS = 24


def main() -> None:
    """Ask, write, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--out", type=Path, default=_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelConfig(), EngineConfig())
    settings = [TrimRequest(enabled=False), *_settings()]
    measured: list[list[tuple[bool, list[int]]]] = [[] for _ in settings]
    with TemporaryDirectory() as folder:
        for question in load_questions(write_held_out(Path(folder), arguments.questions, 0)):
            prompt = _prepare(model, question)
            images = [run_through(model.encode_image(image)) for image in prompt.images]
            for trim, found in zip(settings, measured, strict=True):
                found.append(_answer(model, prompt, images, TrimPlan.of(trim), question))
    rows = [_row(model, trim, found) for trim, found in zip(settings, measured, strict=True)]
    report = {"model": model.info.model_id, "questions": arguments.questions, "keep": _KEEP, "rows": rows}
    write_json({**about(1), **report}, arguments.out)
    print(later_layers(report))


def _settings() -> list[TrimRequest]:
    half, whole = FixedRatio(_KEEP), FixedRatio(1.0)
    return [
        *(TrimRequest(policy="sparsevlm", budget=half, parameters={"cascade_ratio": x}) for x in _CASCADE_RATIOS),
        *(TrimRequest(policy="todre", budget=whole, parameters={"late_exit_threshold": x}) for x in _THRESHOLDS),
    ]


def _prepare(model: Mllama, question: Question) -> PreparedPrompt:
    parts = (ImageFile(question.image.read_bytes()), Text(question.text))
    return model.prepare(ChatPrompt((Message("user", parts),)))


def _answer(
    model: Mllama, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan, question: Question
) -> tuple[bool, list[int]]:
    """Whether the answer is right, and the rows that each layer held."""
    num_features = sum(image.num_features for image in images)
    kv = OwnPages(model.info, 2**23, 1).key_values(len(prompt.token_ids) + _MAX_NEW_TOKENS, num_features)
    logits = run_through(model.prefill(prompt, images, trim, kv)).logits
    token_ids: list[int] = []
    while len(token_ids) < _MAX_NEW_TOKENS:
        token = int(logits.argmax())
        if token in model.info.generation_defaults.eos_token_ids:
            break
        token_ids.append(token)
        logits = model.decode([token], [kv])[0]
    text = model.tokenizer.decode(token_ids, skip_special_tokens=True)
    return is_match(text, question.answer or ""), kv.cross_lengths


def _row(model: Mllama, trim: TrimRequest, found: Sequence[tuple[bool, list[int]]]) -> dict[str, Any]:
    pools = {"shared_pages": OwnPages(model.info, 0), "pages_of_one_layer": OwnPages(model.info, 0, 1)}
    return {
        "policy": trim.policy if trim.enabled else UNTRIMMED_POLICY,
        "parameters": dict(trim.parameters),
        "accuracy": float(np.mean([is_right for is_right, _ in found])),
        "layer_rows": np.mean([rows for _, rows in found], axis=0).round(1).tolist(),
        "held_bytes": {
            name: float(np.mean([pool.layered_cross_bytes(rows) for _, rows in found])) for name, pool in pools.items()
        },
    }


if __name__ == "__main__":
    main()
