"""What keys and values kept beside an image are worth: the first token of another question on it.

    python -m benchmarks.bench_repeated [--pairs 15] [--dtype float32] [--bench-model DIR] [--out FILE]

Engines over one `bench` model take turns, so that all meet the same moments of the machine. Each is asked about a
four-tile image that is new, and then another question about the same image, which is what is measured:

- `features`: the image cache has room for one image's visual features and nothing else, so that the second question
  projects them again;
- `kv`: the image cache keeps what the cross-attention layers made of them, too.

They must give the same tokens. Engines are driven without service and sockets, on one thread; seconds are the thread's
own, so that other work on the machine does not count. They begin when the engine has the image's pixels; what comes
before, file to pixels to tiles, is the same in both.
"""

import json
import random
from statistics import median
from typing import Any, Final

import torch

from benchmarks.driven import UNCUT, Driven
from benchmarks.measure import in_pairs, interval
from benchmarks.models import bench_model, max_kept_fraction
from benchmarks.ours import UNTRIMMED, chat, encoded, recommended
from benchmarks.report import finish, options
from benchmarks.workload import draw_picture
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama

__all__ = ["main"]

_QUESTIONS: Final = (
    "What do you see?",
    "Which colours are there, and where?",
    "How many objects are in the upper half of the picture?",
    "Is there any text in it? Read it.",
)
_CACHE_BYTES: Final = 2**29  # the default
_NUM_TOKENS: Final = 8


class _Case:
    """Two engines that are asked the same, trimmed or not."""

    def __init__(self, model: Mllama, name: str, trim: TrimRequest) -> None:
        self._name, self._trim, self._side = name, trim, 2 * model.info.tile_size
        [image] = encoded(model, model.prepare(chat(_QUESTIONS[0], draw_picture(random.Random(0), self._side))))
        sizes = {"features": image.nbytes, "kv": _CACHE_BYTES}
        self._engines = {
            name: Driven(model, num_bytes, max_batch=1, prefill_slice_seconds=UNCUT)
            for name, num_bytes in sizes.items()
        }
        self._new_image: list[float] = []
        self._tokens: dict[tuple[str, int], list[int]] = {}

    def measure(self, num_pairs: int) -> dict[str, Any]:
        """Figures of both."""
        pairs = in_pairs(
            lambda number: self._ask("features", number), lambda number: self._ask("kv", number), num_pairs
        )
        for number in range(num_pairs + 1):
            if self._tokens["features", number] != self._tokens["kv", number]:
                raise AssertionError(f"{self._name}: keys and values that were kept changed an answer")
        ratios = [kv / features for features, kv in pairs]
        return {
            "case": self._name,
            "pairs": num_pairs,
            "features_seconds": round(median(features for features, _ in pairs), 4),
            "kv_seconds": round(median(kv for _, kv in pairs), 4),
            "new_image_seconds": round(median(self._new_image[2:]), 4),
            "of_features": {"ratio": round(median(ratios), 4), "interval": interval(ratios)},
        }

    def _ask(self, engine: str, number: int) -> float:
        """Two questions on an image of that number; seconds until the second one's first token."""
        rng = random.Random(number)
        picture, questions = draw_picture(rng, self._side), rng.sample(_QUESTIONS, 2)
        first, second = (self._first_token(engine, question, picture, number) for question in questions)
        self._new_image.append(first)
        return second

    def _first_token(self, engine: str, question: str, picture: bytes, number: int) -> float:
        sampling = SamplingParams(max_new_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
        driven = self._engines[engine]
        output = driven.begin(GenerationRequest("repeated", chat(question, picture), sampling, self._trim))
        began = driven.clock()
        driven.finish()
        self._tokens[engine, number] = output.token_ids
        return output.arrivals[0] - began


def main() -> None:
    """Print a row for each case; the last line is the report."""
    parser = options(__doc__, "repeated.json", bench_model=True)
    parser.add_argument("--pairs", type=int, default=15, help="of questions on new images")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = ModelConfig(model=str(bench_model(arguments.bench_model)), dtype=arguments.dtype)
    model = load_model(config, EngineConfig())
    rows = []
    for name, trim in {"trimmed": recommended(model.info, max_kept_fraction()), "untrimmed": UNTRIMMED}.items():
        rows.append(_Case(model, name, trim).measure(arguments.pairs))
        print(json.dumps(rows[-1]), flush=True)
    finish("repeated", arguments.out, {"dtype": arguments.dtype, "rows": rows})


if __name__ == "__main__":
    main()
