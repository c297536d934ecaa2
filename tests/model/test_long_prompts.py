"""Long prompts are read in pieces: the same comes of them, and between two pauses no more is done than of a piece."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import THREE_MIXED, noise, raw
from trimserve import ops
from trimserve.api.trim import TrimRequest
from trimserve.model import pieces
from trimserve.model.interruptible import run_through
from trimserve.model.prepared import PreparedPrompt
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies import view

TRIMMED = TrimPlan.of(TrimRequest(k_ratio=0.1))


def pictures(pair: Pair, number: int) -> list[Image.Image]:
    """Different ones, of four tiles each."""
    return [noise((2, 2), pair.ours.info.tile_size, seed) for seed in range(number)]


@pytest.mark.parametrize("plan", [NO_TRIM, TRIMMED], ids=["untrimmed", "trimmed"])
def test_pieces_change_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch, plan: TrimPlan) -> None:
    prompt = pair.ours.prepare(raw(THREE_MIXED, pictures(pair, 3)))
    encoded = pair.encoded(prompt)
    whole = run_through(pair.ours.prefill(prompt, encoded, plan, pair.granted(prompt)))
    monkeypatch.setattr(pieces, "PIECE_ROWS", 7)
    monkeypatch.setattr(view, "_SCORED_ROWS", 5)
    cut = run_through(pair.ours.prefill(prompt, encoded, plan, pair.granted(prompt)))
    assert torch.equal(cut.logits, whole.logits)
    assert cut.num_kept == whole.num_kept


def test_between_two_pauses_of_a_prompt_of_16k_tokens_a_piece_of_its_rows_is_read(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(Geometry(num_layers=2, cross_layers=(1,), max_position_embeddings=2**15))
    image, num_tokens = pair.ours.info.image_token_id, 2**14
    few = pair.ours.prepare(raw("<|image|>" * 4, pictures(pair, 4)))
    prompt = PreparedPrompt((image,) * 4 + (5,) * (num_tokens - 4), few.images)
    encoded, kv = pair.encoded(few), pair.granted(prompt)
    since_pause: dict[str, int] = {}
    most: dict[str, int] = {}

    def counted(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(rows: Tensor, *arguments: Any) -> Any:
            since_pause[name] = since_pause.get(name, 0) + len(rows)
            most[name] = max(most.get(name, 0), since_pause[name])
            return work(rows, *arguments)

        return counting

    for name in ("attention", "headwise_scores", "silu_gate"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    num_pauses = 0
    for _ in pair.ours.prefill(prompt, encoded, TRIMMED, kv):
        since_pause.clear()
        num_pauses += 1
    assert most == {"attention": 1024, "headwise_scores": 1024, "silu_gate": 1024}
    assert num_pauses > 4 * num_tokens // 1024
