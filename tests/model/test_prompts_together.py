"""Prompts that are read in one pass: each keeps, holds and says what it would alone, whatever the others are."""

from collections.abc import Callable

import torch

from tests.model.conftest import Pair
from tests.model.test_mllama import ONE, TWO_APART, noise, raw
from tests.model.test_stored_kept_sets import REQUESTS
from tests.tolerances import LOGITS
from trimserve.api.trim import TrimRequest
from trimserve.evaluation.pages import OwnKeyValues, OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled, ToPrefill
from trimserve.trimming.plan import TrimPlan

NO_IMAGES = [TrimRequest(enabled=False)] * 2


def wanted(model: Mllama, pool: OwnPages) -> list[ToPrefill]:
    """Every way to trim, between two prompts without images, one of them long."""
    tile, prompts = model.info.tile_size, []
    images = [noise((1, 2), tile, 1), noise((2, 2), tile, 2)]
    texts = ["just words", *[TWO_APART, ONE] * len(REQUESTS), "words " * 40]
    trims = [NO_IMAGES[0], *(trim for trim in REQUESTS.values() for _ in range(2)), NO_IMAGES[1]]
    for text, trim in zip(texts, trims, strict=True):
        plan, prompt = TrimPlan.of(trim), model.prepare(raw(text, images[: text.count("<|image|>")]))
        encoded = [run_through(model.encode_image(image, plan.needs)) for image in prompt.images]
        kv = pool.key_values(len(prompt.token_ids) + 1, sum(each.num_features for each in encoded))
        prompts.append(ToPrefill(prompt, encoded, plan, kv))
    return prompts


def decoded(model: Mllama, prompts: list[ToPrefill]) -> list[torch.Tensor]:
    return [model.decode([7], [each.kv]).clone() for each in prompts]


def test_prompts_of_every_policy_are_read_together_as_alone(equipped: Pair) -> None:
    model = equipped.ours
    together, alone = (wanted(model, OwnPages(model.info, 2**25)) for _ in range(2))
    results: list[Prefilled] = run_through(model.prefill_together(together))
    for own, each, result in zip(together, alone, results, strict=True):
        [expected] = run_through(model.prefill_together([each]))
        torch.testing.assert_close(result.logits, expected.logits, atol=LOGITS, rtol=0)
        assert own.kv.cross_lengths == each.kv.cross_lengths
        for count in ("num_valid", "num_kept", "num_merged", "layer_rows"):
            assert getattr(result, count) == getattr(expected, count)
    for step, expected_step in zip(decoded(model, together), decoded(model, alone), strict=True):
        torch.testing.assert_close(step, expected_step, atol=LOGITS, rtol=0)


def test_rows_of_more_than_16_are_the_same_to_the_last_bit_in_any_company(equipped: Pair) -> None:
    model = equipped.ours
    pool = OwnPages(model.info, 2**24)
    texts = ["words " * 40, "others " * 30, "and more of them " * 20]
    prompts = [model.prepare(raw(text, [])) for text in texts]
    plan = TrimPlan.of(NO_IMAGES[0])

    def read(make: Callable[[], list[OwnKeyValues]]) -> list[ToPrefill]:
        return [ToPrefill(prompt, [], plan, kv) for prompt, kv in zip(prompts, make(), strict=True)]

    def fresh() -> list[OwnKeyValues]:
        return [pool.key_values(len(prompt.token_ids)) for prompt in prompts]

    together = run_through(model.prefill_together(read(fresh)))
    for each, result in zip(read(fresh), together, strict=True):
        [alone] = run_through(model.prefill_together([each]))
        assert len(each.prompt.token_ids) > 16
        assert torch.equal(result.logits, alone.logits)
