"""What later cross-attention layers that hold less cost in accuracy, and what they save in rows and in pages.

    python -m benchmarks.bench_layers [--questions 300] [--out FILE]

The embedded model answers held-out questions with several values of `cascade_ratio` (`sparsevlm`, half of the image
kept by the first layer) and of `late_exit_threshold` (`todre`, all of it kept), greedily. Rows are those that
the cross-attention layers of a request hold, and bytes those of their pages, as means over the questions.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from benchmarks.held_out import held_out
from benchmarks.ours import UNTRIMMED, encoded
from benchmarks.report import Columns, command_line, finish, tabulated
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.evaluation.in_process import prepare_question
from trimserve.evaluation.metrics import is_match
from trimserve.evaluation.pages import OwnPages
from trimserve.evaluation.report import UNTRIMMED_POLICY, variant
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.encoded_image import EncodedImage
from trimserve.trimming.plan import TrimPlan

__all__ = ["main", "table"]

_KEEP: Final = 0.5
"""Of `sparsevlm`, in the first layer."""
_CASCADE_RATIOS: Final = (1.0, 0.7, 0.5, 0.3)
_THRESHOLDS: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_MAX_NEW_TOKENS: Final = 24


def _settings() -> list[TrimRequest]:
    half, whole = FixedRatio(_KEEP), FixedRatio(1.0)
    return [
        UNTRIMMED,
        *(TrimRequest(policy="sparsevlm", budget=half, parameters={"cascade_ratio": x}) for x in _CASCADE_RATIOS),
        *(TrimRequest(policy="todre", budget=whole, parameters={"late_exit_threshold": x}) for x in _THRESHOLDS),
    ]


def _answer(
    model: Mllama, prompt: PreparedPrompt, images: Sequence[EncodedImage], trim: TrimPlan
) -> tuple[str, list[int]]:
    """The answer, and the rows that each layer held."""
    num_features = sum(image.num_features for image in images)
    kv = OwnPages(model.info, 2**23).key_values(len(prompt.token_ids) + _MAX_NEW_TOKENS, num_features)
    logits = run_through(model.prefill(prompt, images, trim, kv)).logits
    token_ids: list[int] = []
    while len(token_ids) < _MAX_NEW_TOKENS:
        token = int(logits.argmax())
        if token in model.info.generation_defaults.eos_token_ids:
            break
        token_ids.append(token)
        logits = model.decode([token], [kv])[0]
    return model.tokenizer.decode(token_ids, skip_special_tokens=True), kv.cross_lengths


def _row(model: Mllama, trim: TrimRequest, found: Sequence[tuple[bool, list[int]]]) -> dict[str, Any]:
    pool = OwnPages(model.info, 0)
    return {
        "policy": trim.policy if trim.enabled else UNTRIMMED_POLICY,
        "parameters": dict(trim.parameters),
        "accuracy": float(np.mean([is_right for is_right, _ in found])),
        "layer_rows": np.mean([rows for _, rows in found], axis=0).round(1).tolist(),
        "held_bytes": float(np.mean([pool.layered_cross_bytes(rows) for _, rows in found])),
    }


def table(report: dict[str, Any]) -> str:
    """What it costs and saves that later cross-attention layers hold less, as Markdown."""
    columns: Columns = {
        "policy": _name,
        "exact match": "{accuracy:.1%}",
        "rows of each layer": lambda row: ", ".join(f"{num_rows:,.0f}" for num_rows in row["layer_rows"]),
        "KiB in pages": lambda row: f"{row['held_bytes'] / 2**10:,.0f}",
    }
    asked = f"{report['questions']:,} questions; means over them. `sparsevlm` keeps {report['keep']:.0%} in the first"
    return f"{tabulated(report['rows'], columns)}\n\n{asked} layer, `todre` everything."


def _name(row: dict[str, Any]) -> str:
    policy = str(row["policy"])
    return policy if policy == UNTRIMMED_POLICY else f"`{variant(policy, row['parameters'])}`"


def main() -> None:
    """Ask, write, tell."""
    arguments = command_line(__doc__, "policies/later_layers.json", questions=300)
    model, settings = load_model(ModelConfig(), EngineConfig()), _settings()
    measured: list[list[tuple[bool, list[int]]]] = [[] for _ in settings]
    with held_out(arguments.questions) as questions:
        for question in questions:
            prompt = prepare_question(model, question)
            images = encoded(model, prompt)
            for trim, found in zip(settings, measured, strict=True):
                text, rows = _answer(model, prompt, images, TrimPlan.of(trim))
                found.append((is_match(text, question.answer or ""), rows))
    settled = [_row(model, trim, found) for trim, found in zip(settings, measured, strict=True)]
    figures = {"model": model.info.model_id, "questions": arguments.questions, "keep": _KEEP, "rows": settled}
    print(table(finish(arguments, figures)))


if __name__ == "__main__":
    main()
