"""Long prompts are read in pieces: the same comes of them, and between two pauses no more is done than of a piece."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.engine.stepping import Clock, deltas, make_engine, start
from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import THREE_MIXED, encoded, noise, raw
from trimserve import ops
from trimserve.api.prompt import TokenPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.model import pieces
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies import view

TRIMMED = TrimPlan.of(TrimRequest(k_ratio=0.1))


def pictures(pair: Pair, number: int) -> list[Image.Image]:
    """Different ones, of four tiles each."""
    return [noise((2, 2), pair.ours.info.tile_size, seed) for seed in range(number)]


@pytest.mark.parametrize("plan", [NO_TRIM, TRIMMED], ids=["untrimmed", "trimmed"])
def test_pieces_change_nothing_but_how_sums_are_rounded(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, plan: TrimPlan
) -> None:
    prompt = pair.ours.prepare(raw(THREE_MIXED, pictures(pair, 3)))
    images = pair.encoded(prompt)
    whole = run_through(pair.ours.prefill(prompt, images, plan, pair.granted(prompt)))
    monkeypatch.setattr(pieces, "PIECE_ROWS", 7)
    monkeypatch.setattr(view, "_SCORED_ROWS", 5)
    cut = run_through(pair.ours.prefill(prompt, images, plan, pair.granted(prompt)))
    torch.testing.assert_close(cut.logits, whole.logits, atol=1e-4, rtol=0)
    assert cut.num_kept == whole.num_kept


@pytest.fixture(scope="module")
def long(make_pair: Callable[..., Pair]) -> Pair:
    """A context of 32k positions."""
    return make_pair(Geometry(num_layers=2, cross_layers=(1,), max_position_embeddings=2**15))


def long_prompt(pair: Pair) -> TokenPrompt:
    """16k tokens, with four images of four tiles."""
    token_ids = (pair.ours.info.image_token_id,) * 4 + (5,) * (2**14 - 4)
    return TokenPrompt(token_ids, tuple(encoded(picture) for picture in pictures(pair, 4)))


def count_rows(monkeypatch: pytest.MonkeyPatch, saw: Callable[[str, int], None]) -> None:
    """Tell how many rows go through the ops whose work grows with a prompt."""

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(rows: Tensor, *arguments: Any) -> Any:
            saw(name, len(rows))
            return work(rows, *arguments)

        return counting

    for name in ("attention", "headwise_scores", "silu_gate"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))


def test_between_two_pauses_of_a_prompt_of_16k_tokens_a_piece_of_its_rows_is_read(
    long: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = long.ours.prepare(long_prompt(long))
    images, kv = long.encoded(prompt), long.granted(prompt)
    since_pause: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def saw(name: str, num_rows: int) -> None:
        since_pause[name] += num_rows
        most[name] = max(most[name], since_pause[name])

    count_rows(monkeypatch, saw)
    for _ in long.ours.prefill(prompt, images, TRIMMED, kv):
        since_pause.clear()
    assert most == {"attention": 1024, "headwise_scores": 1024, "silu_gate": 1024}


def test_a_running_stream_waits_for_a_slice_and_a_piece_while_16k_tokens_are_read(
    long: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, most_of_piece, knob = Clock(), 2.0, 3.0  # each op takes a second for a piece, and two of them share one

    def saw(_: str, num_rows: int) -> None:
        clock.now += num_rows / 1024

    count_rows(monkeypatch, saw)
    engine = make_engine(long.ours, clock=clock, max_batch=2, prefill_slice_seconds=knob)
    sampling = SamplingParams(max_new_tokens=100, ignore_eos=True)
    running = start(engine, GenerationRequest("running", TokenPrompt((7, 8)), sampling, TrimRequest()))[1]
    while not deltas(running):
        engine.step()
    newcomer = start(engine, GenerationRequest("long", long_prompt(long), sampling, TrimRequest(k_ratio=0.1)))[1]
    waits = []
    while not deltas(newcomer):
        before, num_tokens = clock.now, len(deltas(running))
        engine.step()
        assert len(deltas(running)) > num_tokens
        waits.append(clock.now - before)
    assert max(waits) <= knob + most_of_piece
    assert sum(waits) > 10 * knob
