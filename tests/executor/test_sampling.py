"""Sampling against transformers' processors, hand-worked tables and the distribution it promises."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessorList
from transformers.generation import logits_process as peer

from trimserve.api.chunks import TokenLogprob
from trimserve.api.sampling import SamplingParams
from trimserve.errors import RequestFailed
from trimserve.executor.noise import gumbel_noise, noise_keys
from trimserve.executor.sampling import SampledToken, SamplingState, apply_filters, apply_penalties, sample

VOCAB_SIZE = 50


def state(
    params: SamplingParams,
    prompt: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    ends: tuple[int, ...] = (),
) -> SamplingState:
    return SamplingState(params, prompt, frozenset(ends), list(generated))


def drawn(logits: Tensor, states: list[SamplingState]) -> list[int]:
    tokens = sample(logits, states)
    assert all(isinstance(token, SampledToken) for token in tokens)
    return [token.token_id for token in tokens if isinstance(token, SampledToken)]


def random_logits(seed: int, vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def penalized(logits: Tensor, state: SamplingState) -> Tensor:
    return apply_penalties(logits[None], [state])[0]


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    return apply_filters(logits[None], [params])[0]


def test_greedy_takes_the_largest_and_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert drawn(logits, [state(SamplingParams()), state(SamplingParams())]) == [1, 0]


@given(st.integers(0, 99), st.floats(0.5, 2.0), st.lists(st.integers(0, 49)), st.lists(st.integers(0, 49)))
def test_repetition_penalty_is_transformers(seed: int, penalty: float, prompt: list[int], generated: list[int]) -> None:
    logits = random_logits(seed)
    ids = torch.tensor([prompt + generated], dtype=torch.int64)
    expected = peer.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    params = SamplingParams(repetition_penalty=penalty)
    torch.testing.assert_close(penalized(logits, state(params, (*prompt,), (*generated,))), expected)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    result = penalized(torch.zeros(4), state(params, prompt=(0, 0, 2), generated=(1, 2, 1)))
    assert result.tolist() == [0.0, -1.0, -0.75, 0.0]


def test_penalties_follow_the_tokens_that_come() -> None:
    running = state(SamplingParams(repetition_penalty=2.0, frequency_penalty=0.25), prompt=(0,))
    for token_id, expected in [(1, [0.5, 0.25, 1.0]), (0, [0.25, 0.25, 1.0]), (1, [0.25, 0.0, 1.0])]:
        running.generated_token_ids.append(token_id)
        assert penalized(torch.ones(3), running).tolist() == expected
        assert penalized(torch.ones(3), running).tolist() == expected


def test_the_prompt_is_looked_at_once() -> None:
    prompt = [0]
    running = SamplingState(SamplingParams(repetition_penalty=2.0), prompt, frozenset(), [1])
    for _ in range(2):
        assert penalized(torch.ones(3), running).tolist() == [0.5, 0.5, 1.0]
        prompt.clear()


@given(
    st.integers(0, 99),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([5e-324, 0.1, 100.0]),
        top_p=st.sampled_from([5e-324, 0.5, 1.0]),
        min_p=st.sampled_from([0.0, 5e-324, 1.0]),
        repetition_penalty=st.sampled_from([0.01, 100.0]),
        presence_penalty=st.sampled_from([-2.0, 2.0]),
        frequency_penalty=st.sampled_from([-2.0, 2.0]),
        logit_bias=st.sampled_from([{}, {0: -100.0, 1: 100.0}]),
    ),
)
def test_parameters_at_their_bounds_overflow_nothing(seed: int, params: SamplingParams) -> None:
    logits = 1e4 * random_logits(seed)
    changed = penalized(logits, state(params, prompt=(*range(20),), generated=(*range(10, 50),)))
    assert changed.isfinite().all()
    scores = filtered(changed, params)
    assert scores.max() == 0
    assert not scores.isnan().any()


def test_bias_is_added_and_ids_past_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(logit_bias={1: 2.5, 9: 1.0}, repetition_penalty=2.0, presence_penalty=1.0, min_new_tokens=9)
    rows = [state(params, prompt=(9, 2), generated=(9,), ends=(9,)), state(SamplingParams())]
    assert apply_penalties(torch.ones(2, 3), rows).tolist() == [[1.0, 3.5, 0.5], [1.0, 1.0, 1.0]]


def test_end_tokens_are_impossible_before_min_new_tokens() -> None:
    logits = torch.tensor([0.0, 9.0, 8.0, 1.0])
    params = SamplingParams(min_new_tokens=2)
    for generated, expected in [((), 3), ((3,), 3), ((3, 3), 1)]:
        assert drawn(logits[None], [state(params, generated=generated, ends=(1, 2))]) == [expected]


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_are_transformers(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(seed)
    warpers = LogitsProcessorList([peer.TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(peer.TopKLogitsWarper(top_k))
    warpers.append(peer.TopPLogitsWarper(top_p))
    warpers.append(peer.MinPLogitsWarper(min_p))
    expected = warpers(torch.LongTensor(1, 0), logits[None].double())[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(filtered(logits, params).softmax(dim=0), expected.softmax(dim=0))


@given(st.integers(0, 10_000), st.floats(0.001, 0.02), st.sampled_from([257, 5000]), st.floats(0.05, 0.999))
def test_top_p_is_transformers_however_many_tokens_it_keeps(
    seed: int, spread: float, vocab_size: int, top_p: float
) -> None:
    logits = torch.stack([random_logits(seed, vocab_size), random_logits(seed + 1, vocab_size) * spread])
    expected = peer.TopPLogitsWarper(top_p)(torch.LongTensor(2, 0), logits.double())
    result = apply_filters(logits, [SamplingParams(temperature=1.0, top_p=top_p)] * 2)
    torch.testing.assert_close(result.softmax(dim=1), expected.softmax(dim=1))


def test_top_p_draws_from_beyond_its_first_candidates() -> None:
    logits = random_logits(0, 5000)[None].expand(40, -1) * 0.001
    states = [state(SamplingParams(temperature=1.0, top_p=0.999, seed=row)) for row in range(40)]
    ranks = logits[0].argsort(descending=True).argsort()
    assert max(ranks[token_id].item() for token_id in drawn(logits, states)) > 4096


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_top_k_keeps_ties() -> None:
    logits = torch.tensor([0.1, 0.5, 0.2, 0.2]).log()
    kept = [
        (SamplingParams(temperature=1.0, top_p=0.4), [1]),
        (SamplingParams(temperature=1.0, top_p=0.6), [1, 2]),  # tie: lower id
        (SamplingParams(temperature=1.0, top_k=2), [1, 2, 3]),  # tie with the second: stays
        (SamplingParams(temperature=1.0, min_p=0.3), [1, 2, 3]),
        (SamplingParams(temperature=1.0, min_p=0.5), [1]),
        (SamplingParams(temperature=1.0), [0, 1, 2, 3]),
    ]
    scores = apply_filters(logits.expand(len(kept), 4), [params for params, _ in kept])
    for row, (params, expected) in zip(scores, kept, strict=True):
        assert row.isfinite().nonzero().flatten().tolist() == expected, params


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(1)
    assert drawn(logits[None], [state(SamplingParams(temperature=temperature, top_p=0.9))]) == [logits.argmax()]


def test_drawn_tokens_follow_the_filtered_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -0.5, 2.0, 1.5, -3.0])
    params = SamplingParams(temperature=0.8, top_k=5, seed=11)
    num_draws = 3000
    tokens = Counter(
        drawn(logits[None], [state(params, generated=(0,) * position)])[0] for position in range(num_draws)
    )
    probabilities = (logits / 0.8)[:5].softmax(dim=0)
    assert tokens[5] == 0
    observed = torch.tensor([tokens[token_id] for token_id in range(5)])
    expected = probabilities * num_draws
    # The 99.9th percentile of chi-square with 4 degrees of freedom.
    assert ((observed - expected) ** 2 / expected).sum() < 18.47


@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.integers(0, 60), st.sampled_from([0.3, 1.0]))
def test_the_token_is_that_of_the_largest_filtered_score_with_noise(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    logits = random_logits(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    noise = gumbel_noise(noise_keys([seed], [2]), torch.arange(VOCAB_SIZE))
    expected = (filtered(logits, params) + noise).argmax()
    assert drawn(logits[None], [state(params, generated=(1, 2))]) == [expected]


TOKEN_IDS = st.integers(0, VOCAB_SIZE + 3)
"""Some are past the vocabulary."""
ROWS = st.builds(
    SamplingState,
    params=st.builds(
        SamplingParams,
        min_new_tokens=st.sampled_from([0, 0, 3]),
        temperature=st.sampled_from([0.0, 1e-30, 0.7, 1.0, 5.0]),
        top_p=st.sampled_from([1.0, 1.0, 0.3, 0.95]),
        top_k=st.sampled_from([0, 0, 1, 7, 60]),
        min_p=st.sampled_from([0.0, 0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 0.8, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.4]),
        frequency_penalty=st.sampled_from([0.0, 0.0, -0.3]),
        logit_bias=st.dictionaries(TOKEN_IDS, st.floats(-5, 5), max_size=3),
        seed=st.integers(0, 2**64 - 1),
        num_top_logprobs=st.sampled_from([None, None, 0, 1, 5, 60]),
    ),
    prompt_token_ids=st.lists(TOKEN_IDS, max_size=9),
    end_token_ids=st.frozensets(TOKEN_IDS, max_size=3),
    generated_token_ids=st.lists(TOKEN_IDS, max_size=9),
)


@given(
    rows=st.lists(ROWS, min_size=1, max_size=9),
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([VOCAB_SIZE, 301]),
    step=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_a_row_is_sampled_the_same_alone_and_in_every_batch(
    rows: list[SamplingState], seed: int, vocab_size: int, step: float, data: st.DataObject
) -> None:
    logits = torch.stack([random_logits(seed + row, vocab_size) for row in range(len(rows))])
    if step:
        logits = (logits / step).round() * step  # many ties
    before = logits.clone()
    alone = [sample(logits[row : row + 1], [rows[row]])[0] for row in range(len(rows))]
    order = data.draw(st.lists(st.sampled_from(range(len(rows))), min_size=1, max_size=12))
    assert sample(logits[order], [rows[row] for row in order]) == [alone[row] for row in order]
    assert torch.equal(logits, before)


def test_seeds_and_positions_draw_different_tokens() -> None:
    params = [SamplingParams(temperature=1.0, seed=seed, top_p=0.9) for seed in range(8)]
    tokens = [
        drawn(random_logits(1).expand(8, -1), [state(its, generated=(1,) * position) for its in params])
        for position in range(8)
    ]
    assert min(len(set(row)) for row in [*tokens, *zip(*tokens, strict=True)]) > 1


class Waits(TorchDispatchMode):
    """Counts the calls that wait for the device."""

    num = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num += func.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense)
        return func(*args, **(kwargs or {}))


def num_waits(rows: Sequence[SamplingParams], monkeypatch: pytest.MonkeyPatch) -> int:
    tolist, waits = Tensor.tolist, Waits()  # type: ignore[no-untyped-call]  # torch leaves it so
    logits = torch.stack([random_logits(row, 1000) for row in range(len(rows))])

    def counted(tensor: Tensor) -> object:
        waits.num += 1
        return tolist(tensor)

    with waits, monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", counted)
        sample(logits, [state(params, (1, 2), (3,), (4,)) for params in rows])
    return waits.num


def test_the_device_is_waited_for_per_step_not_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_waits([SamplingParams()] * 9, monkeypatch) == 1
    every = SamplingParams(
        min_new_tokens=3,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={1: 1.0},
        num_top_logprobs=3,
    )
    mixed = [every, SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(num_top_logprobs=1)] * 4
    assert num_waits(mixed, monkeypatch) == 2  # a GPU is spared one more, see tests/pretended/test_budget.py


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=2.0, num_top_logprobs=4),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: SamplingParams) -> None:
    logits = torch.stack([random_logits(1), random_logits(2), random_logits(3)])
    states = [state(params, prompt=(1, 4)) for _ in range(3)]
    expected = sample(logits, states)
    logits[1, 4] = bad
    first, failed, third = sample(logits, states)
    assert isinstance(failed, RequestFailed)
    assert "not finite" in str(failed)
    assert [first, third] == [expected[0], expected[2]]


def test_a_row_without_any_finite_logit_fails() -> None:
    [failed] = sample(torch.full((1, 4), -math.inf), [state(SamplingParams(temperature=1.0, top_p=0.5))])
    assert isinstance(failed, RequestFailed)


@pytest.mark.parametrize(
    "impossible",
    [
        SamplingParams(temperature=1.0, seed=2**65),
        SamplingParams(temperature=1.0, top_k=3, min_p=-1.0, top_p=0.5, seed=2**65),
        SamplingParams(logit_bias={2**70: 1.0}),
    ],
)
def test_a_row_whose_parameters_raise_fails_alone(impossible: SamplingParams) -> None:
    logits = torch.stack([random_logits(1), random_logits(2), random_logits(3)])
    others = SamplingParams(temperature=1.0, repetition_penalty=1.5, num_top_logprobs=2)
    states = [state(others, generated=(1, 1)), state(impossible), state(others)]
    expected = sample(logits[::2], states[::2])
    first, failed, third = sample(logits, states)
    assert isinstance(failed, RequestFailed)
    assert failed.__cause__ is not None  # the engine logs it
    assert [first, third] == expected
    assert all(isinstance(outcome, SampledToken) for outcome in expected)


def test_logprobs_are_those_of_the_model_before_penalties_and_filters() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 2.0])
    params = SamplingParams(temperature=0.5, top_k=1, logit_bias={0: 100.0}, num_top_logprobs=3)
    expected = logits.log_softmax(dim=0).tolist()
    [token] = sample(logits[None], [state(params)])
    assert isinstance(token, SampledToken)
    assert token.token_id == 0
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(expected[0])
    assert [token_id for token_id, _ in token.logprob.top] == [1, 2, 3]
    assert [logprob for _, logprob in token.logprob.top] == pytest.approx(expected[1:])


def test_logprobs_come_only_when_asked_for_and_no_more_than_the_vocabulary() -> None:
    for num_top, expected in [(None, None), (0, 0), (2, 2), (20, 4)]:
        [token] = sample(torch.zeros(1, 4), [state(SamplingParams(num_top_logprobs=num_top))])
        assert isinstance(token, SampledToken)
        assert (None if token.logprob is None else len(token.logprob.top)) == expected


def test_equal_logprobs_are_listed_by_id() -> None:
    logits = torch.zeros(2, 300)
    logits[1, 200] = 1.0
    wide, narrow = SamplingParams(num_top_logprobs=3), SamplingParams(num_top_logprobs=2)
    listed = []
    for token in sample(logits, [state(wide), state(narrow)]):
        assert isinstance(token, SampledToken)
        assert isinstance(token.logprob, TokenLogprob)
        listed.append([token_id for token_id, _ in token.logprob.top])
    assert listed == [[0, 1, 2], [200, 0]]
