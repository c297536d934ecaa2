"""Sampling against transformers' processors, hand-worked tables and the distribution it promises."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as peer

from trimserve.engine.request import SamplingParams
from trimserve.engine.sampling import (
    SampledToken,
    SamplingState,
    apply_filters,
    apply_penalties,
    gumbel_noise,
    sample,
)
from trimserve.errors import RequestFailed


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


def random_logits(seed: int, vocab_size: int = 50) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_largest_and_ties_go_to_the_lower_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert drawn(logits, [state(SamplingParams()), state(SamplingParams())]) == [1, 0]


@given(st.integers(0, 99), st.floats(0.5, 2.0), st.lists(st.integers(0, 49)), st.lists(st.integers(0, 49)))
def test_repetition_penalty_is_transformers(seed: int, penalty: float, prompt: list[int], generated: list[int]) -> None:
    logits = random_logits(seed)
    ids = torch.tensor([prompt + generated], dtype=torch.int64)
    expected = peer.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())[0]
    params = SamplingParams(repetition_penalty=penalty)
    torch.testing.assert_close(apply_penalties(logits, state(params, (*prompt,), (*generated,))), expected)


def test_presence_and_frequency_penalties_count_generated_tokens_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    penalized = apply_penalties(torch.zeros(4), state(params, prompt=(0, 0), generated=(1, 2, 1)))
    assert penalized.tolist() == [0.0, -1.0, -0.75, 0.0]


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
    penalized = apply_penalties(logits, state(params, prompt=(*range(20),), generated=(*range(10, 50),)))
    assert penalized.isfinite().all()
    scores = apply_filters(penalized, params)
    assert scores.max() == 0
    assert not scores.isnan().any()


def test_bias_is_added_and_ids_past_the_vocabulary_are_ignored() -> None:
    params = SamplingParams(logit_bias={1: 2.5, 9: 1.0}, repetition_penalty=2.0, presence_penalty=1.0, min_new_tokens=9)
    penalized = apply_penalties(torch.ones(3), state(params, prompt=(9, 2), generated=(9,), ends=(9,)))
    assert penalized.tolist() == [1.0, 3.5, 0.5]


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
    filtered = apply_filters(logits, params)
    torch.testing.assert_close(filtered.softmax(dim=0), expected.softmax(dim=0))


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
    for params, expected in kept:
        assert apply_filters(logits, params).isfinite().nonzero().flatten().tolist() == expected, params


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


def test_noise_differs_between_seeds_and_positions_and_is_gumbel() -> None:
    device = torch.device("cpu")
    first = gumbel_noise(7, 0, 20_000, device)
    assert torch.equal(first, gumbel_noise(7, 0, 20_000, device))
    for other in (gumbel_noise(8, 0, 20_000, device), gumbel_noise(7, 1, 20_000, device)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03
    # Mean and standard deviation of the standard Gumbel distribution.
    assert first.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert first.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.03)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (5, 1000), (2**63, 7), (2**64 - 1, 3)])
def test_noise_is_the_documented_splitmix64(seed: int, position: int) -> None:
    # Whoever sends a seed again gets the same tokens, whatever the version or device.
    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    key = mix((mix(seed) + position) % 2**64)
    bits = [mix((key + token_id * 0x9E3779B97F4A7C15) % 2**64) >> 12 for token_id in range(6)]
    expected = [-math.log(-math.log((upper + 0.5) / 2**52)) for upper in bits]
    assert gumbel_noise(seed, position, 6, torch.device("cpu")).tolist() == pytest.approx(expected)


def test_a_row_draws_the_same_in_every_batch() -> None:
    states = [
        state(SamplingParams(temperature=1.0, seed=seed, top_p=0.9), generated=(1,) * (seed % 3)) for seed in range(8)
    ]
    logits = torch.stack([random_logits(seed) for seed in range(8)])
    alone = [drawn(logits[row : row + 1], states[row : row + 1])[0] for row in range(8)]
    assert drawn(logits, states) == alone
    assert drawn(logits.flip(0), states[::-1]) == alone[::-1]
    assert len(set(alone)) > 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(bad: float) -> None:
    logits = torch.stack([random_logits(1), random_logits(2), random_logits(3)])
    logits[1, 4] = bad
    first, failed, third = sample(logits, [state(SamplingParams()) for _ in range(3)])
    assert isinstance(failed, RequestFailed)
    assert "not finite" in str(failed)
    assert isinstance(first, SampledToken)
    assert first.token_id == logits[0].argmax()
    assert isinstance(third, SampledToken)
    assert third.token_id == logits[2].argmax()


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
