"""Requests that hold rows which a compressor made: their account, batches, several images, and a model without them."""

import pytest
import torch

from tests.model.conftest import NO_TRIM, Pair
from tests.model.test_mllama import ONE, TWO_APART, noise, raw
from tests.tolerances import LOGITS
from trimserve.api.trim import TrimRequest
from trimserve.model.interruptible import run_through
from trimserve.trimming.plan import TrimPlan, choose_from_image

FOR_THE_IMAGE = ("tokenpacker", "wico", "registers")
FOR_THE_QUESTION = ("flashsloth", "quecc")
LEARNED = (*FOR_THE_IMAGE, *FOR_THE_QUESTION)


@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 2)], [(1, 1), (2, 2)]])
@pytest.mark.parametrize("policy", LEARNED)
def test_a_tile_holds_its_class_token_and_the_rows_that_were_made(
    equipped: Pair, policy: str, grids: list[tuple[int, int]]
) -> None:
    images = [noise(grid, equipped.ours.info.tile_size, seed) for seed, grid in enumerate(grids)]
    prompt = equipped.ours.prepare(raw(TWO_APART if len(grids) > 1 else ONE, images))
    trim, kv = TrimPlan.of(TrimRequest(policy=policy)), equipped.granted(prompt)
    prefilled = run_through(equipped.ours.prefill(prompt, equipped.encoded(prompt), trim, kv))
    tiles = tuple(high * wide for high, wide in grids)
    assert prefilled.num_kept == tiles
    assert prefilled.num_merged == tuple(2 * each for each in tiles)  # compressors of these tests make 3 rows in all
    assert kv.cross_lengths[0] == 3 * tiles[-1]  # the last row sees the last image


@pytest.mark.parametrize("policy", [*LEARNED, "exit"])
def test_a_batch_of_learned_requests_equals_each_alone(equipped: Pair, policy: str) -> None:
    tile, trim = equipped.ours.info.tile_size, TrimPlan.of(TrimRequest(policy=policy))
    prompts = [
        equipped.ours.prepare(raw(ONE, [noise((1, 1), tile, 1)])),
        equipped.ours.prepare(raw(TWO_APART, [noise((1, 2), tile, 2), noise((2, 2), tile, 3)])),
        equipped.ours.prepare(raw("Another question about" + ONE, [noise((2, 2), tile, 3)])),
    ]

    def logits(*numbers: int) -> torch.Tensor:
        chosen = [prompts[number] for number in numbers]
        rows = [
            equipped.ours.prompt_rows(each, equipped.encoded(each), trim, equipped.granted(each)) for each in chosen
        ]
        return equipped.ours.logits(rows, [token for each in chosen for token in each.token_ids])

    alone = torch.cat([logits(number) for number in range(3)])
    torch.testing.assert_close(logits(0, 1, 2), alone, atol=LOGITS, rtol=0)


def test_a_model_with_compressors_answers_untrimmed_requests_bit_for_bit_as_one_without(
    pair: Pair, equipped: Pair
) -> None:
    prompt = raw(TWO_APART, [noise((1, 2), pair.ours.info.tile_size, 1), noise((2, 2), pair.ours.info.tile_size, 2)])
    assert torch.equal(equipped.logits(prompt, NO_TRIM)[0], pair.logits(prompt, NO_TRIM)[0])


@pytest.mark.parametrize("policy", LEARNED)
def test_only_what_reads_the_question_makes_other_rows_for_another(equipped: Pair, policy: str) -> None:
    image = noise((1, 2), equipped.ours.info.tile_size)
    trim = TrimPlan.of(TrimRequest(policy=policy))
    rows = []
    for question in ("<|image|>What is this?", "<|image|>How many are there?"):
        prompt = equipped.ours.prepare(raw(question, [image]))
        made = equipped.ours.prompt_rows(prompt, equipped.encoded(prompt), trim, equipped.granted(prompt))
        assert made.vision is not None
        rows.append(made.vision.features)
    assert torch.equal(*rows) == (policy in FOR_THE_IMAGE)


def test_an_image_has_room_for_the_rows_that_it_remembers(equipped: Pair) -> None:
    prompt = equipped.ours.prepare(raw(ONE, [noise((1, 2), equipped.ours.info.tile_size)]))
    [image] = equipped.encoded(prompt)
    made = 0
    for policy in FOR_THE_IMAGE:
        choice = choose_from_image(image, TrimPlan.of(TrimRequest(policy=policy)))
        again = TrimPlan.of(TrimRequest(policy=policy, merge_ratio=0.3, k_ratio=0.1))  # neither is asked
        assert choose_from_image(image, again) is choice
        assert choice.groups is not None
        assert choice.groups.rows is not None
        made += choice.groups.rows.nbytes
    assert image.made_bytes == made
