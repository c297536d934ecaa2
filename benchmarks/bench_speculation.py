"""What checking drafts is worth: tokens a second with and without, where answers repeat the prompt and elsewhere.

    python -m benchmarks.bench_speculation [--pairs 15] [--tokens 192] [--out FILE]

Two engines over one `bench` model take turns, an answer each, so that both meet the same moments of the machine; the
same requests must get the same tokens. Engines are driven without service and sockets, on one thread; seconds are the
thread's own, so that other work on the machine does not count. `bench` has random weights and would repeat nothing, so
its weights are changed, not its shape: after a token comes the next one of the vocabulary.

- `repeats`: the prompt counts up, and the answer counts up from the same token.
- `ordinary`: tokens at random, in which nothing is ever found.
- `misleading`: the prompt has every beginning that comes up, and goes on otherwise: the look-up is always wrong.
- `halting`: as `repeats`, but the look-up is wrong once in six tokens.
- `forced`: a constraint leaves no choice.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

import torch

from benchmarks.measure import in_pairs, medians, speedup
from benchmarks.models import BENCH_MODEL, bench_model
from benchmarks.report import Columns, command_line, finish, noted, origin, tabulated, times
from tests.engine.stepping import finished, make_engine, start, tokens
from trimserve.api.constraint import Regex
from trimserve.api.prompt import TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main", "table"]

_FIRST: Final = 1000
"""Token from which prompts count; those before it include all that are special."""
_UNCUT: Final = 1e6
"""Seconds that no prefill takes, so every one runs in one piece."""
_SHARPNESS: Final = 0.05
"""Of `lm_head`: the next token's logit is 26 above the others', whose standard deviation is 1."""


@dataclass(frozen=True, slots=True)
class _Case:
    """Requests of one kind."""

    name: str
    batch: int
    prompt: Callable[[int, int], tuple[int, ...]]
    """Of the number of a request and the tokens of its answer."""
    temperature: float = 0.0
    is_forced: bool = False

    def request(self, number: int, num_tokens: int) -> GenerationRequest:
        """The one with that number."""
        sampling = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True, temperature=self.temperature, seed=number)
        request = GenerationRequest(
            f"{self.name}-{number}", TokenPrompt(self.prompt(number, num_tokens)), sampling, TrimRequest(k_ratio=0.2)
        )
        text = "all of this must be written, word by word, " * (num_tokens // 4)  # more than is asked for
        return replace(request, constraint=Regex(text)) if self.is_forced else request


def _counting(number: int, num_tokens: int) -> tuple[int, ...]:
    first = _FIRST + 7 * number
    return (*range(first, first + num_tokens + 8), *range(first, first + 4))


def _short(number: int, _: int) -> tuple[int, ...]:
    return tuple(range(_FIRST + 7 * number, _FIRST + 7 * number + 16))


def _misleading(number: int, num_tokens: int) -> tuple[int, ...]:
    return (*_traps(number, num_tokens, 1), *_counting(number, num_tokens)[-4:])


def _halting(number: int, num_tokens: int) -> tuple[int, ...]:
    counted = _counting(number, num_tokens)
    return (*counted[:-4], *_traps(number, num_tokens, 6), *counted[-4:])


def _traps(number: int, num_tokens: int, every: int) -> Iterator[int]:
    """Three tokens that will come, and what will not come behind them."""
    first = _FIRST + 7 * number
    for begin in range(first, first + num_tokens + 8, every):
        yield from (*range(begin, begin + 3), begin - 9)


_CASES: Final = (
    _Case("repeats", 1, _counting),
    _Case("ordinary", 1, _short, temperature=8.0),
    _Case("misleading", 1, _misleading),
    _Case("halting", 1, _halting),
    _Case("forced", 1, _short, temperature=8.0, is_forced=True),
    _Case("repeats", 4, _counting),
    _Case("repeats", 16, _counting),
    _Case("ordinary", 16, _short, temperature=8.0),
)


class _Engine:
    """An engine that is measured, with drafts or without."""

    def __init__(self, model: Mllama, *, speculation: bool) -> None:
        self.engine = make_engine(model, speculation=speculation, prefill_slice_seconds=_UNCUT)
        self.num_steps: list[int] = []
        """Of each batch."""
        self.answers: list[list[list[int]]] = []

    def answer(self, case: _Case, num_tokens: int, first: int) -> float:
        """Answer a batch of requests; tokens a second of its decode steps."""
        asked = [start(self.engine, case.request(first + each, num_tokens)) for each in range(case.batch)]
        outputs = [output for _, output in asked]
        while self.engine.has_work and not all(
            map(tokens, outputs)
        ):  # a step reads all prompts that there are places for
            self.engine.step()
        num_before, num_steps = sum(len(tokens(output)) for output in outputs), 0
        began = time.thread_time()
        while self.engine.has_work:
            self.engine.step()
            num_steps += 1
        seconds = time.thread_time() - began
        for output in outputs:
            finished(output)  # rather than failed
        self.num_steps.append(num_steps)
        self.answers.append([tokens(output) for output in outputs])
        return (sum(map(len, self.answers[-1])) - num_before) / seconds


@torch.inference_mode()
def _count_up(model: Mllama) -> None:
    """Let the token with the next id follow each: layers add next to nothing, and the last product finds it."""
    parameters = dict(model._model.named_parameters())
    for name, parameter in parameters.items():
        if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1e-3)
    [embedding] = [each for name, each in parameters.items() if name.endswith("embed_tokens.weight")]
    [head] = [each for name, each in parameters.items() if name.endswith("lm_head.weight")]
    head.copy_(_SHARPNESS * embedding[: len(head)].roll(1, dims=0))


def _measure(model: Mllama, case: _Case, num_tokens: int, num_pairs: int) -> dict[str, Any]:
    plain, speculative = (_Engine(model, speculation=is_on) for is_on in (False, True))
    pairs = in_pairs(
        lambda number: speculative.answer(case, num_tokens, number),
        lambda number: plain.answer(case, num_tokens, number),
        num_pairs,
    )
    if plain.answers != speculative.answers:
        raise AssertionError(f"{case.name}: drafts changed an answer")
    with_drafts, without = medians(pairs, 2)
    steps = [on / max(1, off) for off, on in zip(plain.num_steps, speculative.num_steps, strict=True)]
    speculation = speculative.engine.speculation
    return {
        "case": case.name,
        "batch": case.batch,
        "plain_tokens_per_second": without,
        "tokens_per_second": with_drafts,
        **speedup(pairs),
        "steps_ratio": round(median(steps[1:]), 4),
        "proposed": speculation.num_proposed,
        "accepted": speculation.num_accepted,
        "pairs": num_pairs,
    }


def table(report: dict[str, Any]) -> str:
    """Tokens a second with and without drafts, by what the answers are like, as Markdown."""
    columns: Columns = {
        "answers": "{case}",
        "batch": "{batch}",
        "tokens/s without": "{plain_tokens_per_second:.0f}",
        "with": "{tokens_per_second:.0f}",
        "times as fast [95 %]": times,
        "steps a token": "{steps_ratio:.2f}",
        "drafts right": lambda row: f"{row['accepted'] / row['proposed']:.0%}" if row["proposed"] else "none made",
    }
    return f"{tabulated(report['rows'], columns)}\n\n{origin(report)}"


def main() -> None:
    """Measure and write."""
    options = {"pairs": 15, "tokens": 192, "cases": [case.name for case in _CASES], "dtype": ("float32", "bfloat16")}
    arguments = command_line(__doc__, "speculation.json", bench_model=BENCH_MODEL, **options)
    if arguments.threads != 1:
        raise SystemExit(f"--threads: must be 1, since seconds are the thread's own, got {arguments.threads}")
    config = ModelConfig(model=str(bench_model(arguments.bench_model)), dtype=arguments.dtype)
    model = load_model(config, EngineConfig())
    _count_up(model)
    rows: list[dict[str, Any]] = []
    for case in (case for case in _CASES if case.name in arguments.cases):
        noted(rows, _measure(model, case, arguments.tokens, arguments.pairs))
    finish(arguments, {"dtype": arguments.dtype, "tokens": arguments.tokens, "rows": rows})


if __name__ == "__main__":
    main()
