"""From logits to the next token of each row of a batch: penalties, filters, noise, log-probabilities.

    logits -> logit_bias -> repetition, presence, frequency penalty -> min_new_tokens or constraint
           -> temperature -> top_k -> top_p -> min_p -> Gumbel noise -> argmax

The order is transformers'. Each step takes all rows that need it at once. Rows never see each other, and what is
summed over a row is summed exactly, so that a request gets the same tokens in every batch. It knows no text.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from trimserve.api.chunks import TokenLogprob
from trimserve.api.sampling import SamplingParams
from trimserve.errors import RequestFailed
from trimserve.executor.failures import is_device_error
from trimserve.executor.noise import NOISE_RANGE, gumbel_noise, noise_keys
from trimserve.ops.upload import upload

__all__ = [
    "SampledToken",
    "Sampling",
    "SamplingState",
    "apply_filters",
    "apply_penalties",
    "has_penalty",
    "sample",
]

log = logging.getLogger(__name__)

_CANDIDATES: Final = (256, 4096)
"""Of top_p, tried one after the other before the whole vocabulary; the first is nearly always enough."""


@dataclass(slots=True)
class SamplingState:
    """What the next token of one request depends on besides its logits."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    end_token_ids: frozenset[int]
    """Tokens that end this request, impossible before `params.min_new_tokens`."""
    generated_token_ids: list[int] = field(default_factory=list)
    """Only grows."""
    forbidden: NDArray[np.bool_] | None = None
    """Bool [V], tokens that a constraint makes impossible, with regard to `params.min_new_tokens`; None for no
    constraint."""
    _counts: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _num_counted: int = field(default=0, init=False, repr=False)

    def token_counts(self) -> Mapping[int, int]:
        """How often each token of prompt and answer was generated; 0 for those of the prompt alone."""
        counts = self._counts
        if not counts:
            counts.update(dict.fromkeys(self.prompt_token_ids, 0))
        for token_id in self.generated_token_ids[self._num_counted :]:
            counts[token_id] = counts.get(token_id, 0) + 1
        self._num_counted = len(self.generated_token_ids)
        return counts

    def after(self, drafts: Sequence[int], forbidden: NDArray[np.bool_] | None) -> "SamplingState":
        """The state if drafts had been drawn.

        Args:
            drafts: tokens.
            forbidden: by the constraint then.
        """
        generated = [*self.generated_token_ids, *drafts]
        state = SamplingState(self.params, self.prompt_token_ids, self.end_token_ids, generated, forbidden)
        if has_penalty(self.params):
            state._counts = {**self.token_counts()}
            state._num_counted = len(self.generated_token_ids)
        return state


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row."""

    token_id: int
    logprob: TokenLogprob | None
    """None unless the request asked for it."""


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | RequestFailed]:
    """Draw the next token of each row. Waits for the device once, on a GPU, unless top_p needs many candidates.

    Args:
        logits: float32 [B, V], not changed.
        states: B states.
    Returns:
        One entry per row: the token, or why this row alone has none (a NaN or infinity among its logits).
    Raises:
        RuntimeError: the device failed.
    """
    try:
        return Sampling(logits, states).read()
    except Exception as error:
        if is_device_error(error):
            raise
        if len(states) == 1:
            failure = RequestFailed("sampling failed")
            failure.__cause__ = error
            return [failure]
        log.exception("sampling %d rows failed; each is tried alone", len(states))
    return [sample(row[None], [state])[0] for row, state in zip(logits, states, strict=True)]


class Sampling:
    """The next token of each row of a batch, drawn on the logits' device, which need not be waited for at once."""

    def __init__(
        self, logits: Tensor, states: Sequence[SamplingState], candidates: Sequence[int] = _CANDIDATES
    ) -> None:
        """Begin to draw.

        Args:
            logits: float32 [B, V], not changed; may be changed once this has begun, on a GPU.
            states: B states.
            candidates: of top_p, see `_CANDIDATES`.
        """
        num_candidates, *self._more = *candidates, logits.shape[1]
        self._states = states
        self.token_ids, is_short = _drawn(logits, states, num_candidates)
        """int64 [B] on the device."""
        self.was_redrawn = False
        """Whether `read` drew again, with more candidates, so that tokens differ from `token_ids`."""
        self._logits = logits if is_short is None or not logits.is_cuda else logits.clone()
        self._columns = _columns(logits, states, self.token_ids, is_short)
        self.ended: torch.cuda.Event | None = None
        """When the tokens were on the host; None on a CPU."""
        if logits.is_cuda:
            self._columns = _on_its_way(self._columns)
            self.ended = torch.cuda.Event(enable_timing=True)
            self.ended.record()

    def read(self) -> list[SampledToken | RequestFailed]:
        """Wait for the tokens; see `sample`."""
        if self.ended is not None:
            self.ended.synchronize()  # and not for what is queued behind them
        read = self._columns.tolist()
        if read and read[0][1] < 0:
            self.was_redrawn = True
            return Sampling(self._logits, self._states, self._more[:-1]).read()
        num_tops = [state.params.num_top_logprobs for state in self._states]
        return [_outcome(*values, num_top=num_top) for values, num_top in zip(read, num_tops, strict=True)]


def _on_its_way(values: Tensor) -> Tensor:
    """A tensor on the host that will have the values of one on a GPU."""
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu").pin_memory()
    return host.copy_(values, non_blocking=True)


def apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Bias and penalties, no end token before `min_new_tokens`, no token that a constraint forbids.

    Ids past the vocabulary are ignored.

    Args:
        logits: float32 [B, V], not changed.
        states: B states.
    Returns:
        float32 [B, V]; `logits` itself when no row asks for any of these.
    """
    biases: dict[int, Mapping[int, float]] = {}
    counts: dict[int, Mapping[int, float]] = {}
    ends: dict[int, Mapping[int, float]] = {}
    forbidden: dict[int, NDArray[np.bool_]] = {}
    for row, state in enumerate(states):
        params = state.params
        if params.logit_bias:
            biases[row] = params.logit_bias
        if has_penalty(params):
            counts[row] = state.token_counts()
        if state.forbidden is not None:
            forbidden[row] = state.forbidden
        elif len(state.generated_token_ids) < params.min_new_tokens:
            ends[row] = dict.fromkeys(state.end_token_ids, -math.inf)
    if not (biases or counts or ends or forbidden):
        return logits
    logits = logits.clone()
    if biases:
        rows, ids, values = _entries(biases, logits)
        logits[rows, ids] += values
    if counts:
        rows, ids, times = _entries(counts, logits)
        logits[rows, ids] = _penalize(logits[rows, ids], times, [state.params for state in states], rows)
    if ends:
        rows, ids, values = _entries(ends, logits)
        logits[rows, ids] = values
    if len(forbidden) == len(states):
        logits.masked_fill_(_tensor(np.stack([*forbidden.values()]), logits), -math.inf)
    elif forbidden:
        index = _tensor([*forbidden], logits)
        logits[index] = logits[index].masked_fill_(_tensor(np.stack([*forbidden.values()]), logits), -math.inf)
    return logits


def apply_filters(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Temperature, then top_k (ties with the k-th stay), top_p (the smallest set that reaches it) and min_p.

    Args:
        logits: float32 [B, V], not changed.
        params: of B rows, temperatures above 0.
    Returns:
        float64 [B, V], logits over temperature up to a constant; -inf where a token is filtered out.
    """
    return _filter(logits, params, logits.shape[1])[0]


def _filter(logits: Tensor, params: Sequence[SamplingParams], num_candidates: int) -> tuple[Tensor, Tensor | None]:
    """See `apply_filters`; and whether top_p needed more than so many candidates, bool [], None if it did not look."""
    is_short: Tensor | None = None

    def cut_top_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
        """Cut, and note whether the candidates were too few."""
        nonlocal is_short
        scores, is_short = _cut_top_p(scores, params, num_candidates)
        return scores

    # The largest becomes 0 first: no temperature, however small, can overflow it.
    scores = logits.double() - logits.amax(dim=1, keepdim=True)
    scores /= _tensor([own.temperature for own in params], scores)[:, None]
    for cut, rows in (
        (_cut_top_k, [row for row, own in enumerate(params) if 0 < own.top_k < scores.shape[1]]),
        (cut_top_p, [row for row, own in enumerate(params) if own.top_p < 1.0]),
        (_cut_min_p, [row for row, own in enumerate(params) if own.min_p > 0.0]),
    ):
        if len(rows) == len(params):
            scores = cut(scores, params)
        elif rows:
            index = _tensor(rows, scores)
            scores[index] = cut(scores[index], [params[row] for row in rows])
    return scores, is_short


def _drawn(logits: Tensor, states: Sequence[SamplingState], num_candidates: int) -> tuple[Tensor, Tensor | None]:
    """Int64 [B], and as `_filter`."""
    scores = apply_penalties(logits, states)
    token_ids = scores.argmax(dim=1)  # the first of equals
    sampled = [row for row, state in enumerate(states) if state.params.temperature > 0.0]
    filtered = [row for row in sampled if _has_filter(states[row].params)]
    is_short: Tensor | None = None
    for rows in filtered, sorted({*sampled} - {*filtered}):
        if rows:
            index = _tensor(rows, logits)
            token_ids[index], found_short = _draw(scores[index], [states[row] for row in rows], num_candidates)
            is_short = is_short if found_short is None else found_short
    return token_ids, is_short


def _columns(logits: Tensor, states: Sequence[SamplingState], token_ids: Tensor, is_short: Tensor | None) -> Tensor:
    """All that `_outcome` takes of each row; no token (-1) where all must be drawn again."""
    # float64 holds every id and every logprob: the host reads once.
    told = token_ids if is_short is None else token_ids.masked_fill(is_short, -1)
    columns = [logits.amax(dim=1, keepdim=True).double(), told[:, None].double()]
    num_tops = {row: num for row, state in enumerate(states) if (num := state.params.num_top_logprobs) is not None}
    if num_tops:
        index = _tensor([*num_tops], logits)
        found = _logprobs(logits[index], token_ids[index], min(max(num_tops.values()), logits.shape[1]))
        columns.append(found.new_zeros(len(states), found.shape[1]).index_copy_(0, index, found))
    return torch.cat(columns, dim=1)


def _outcome(highest: float, token_id: float, *logprobs: float, num_top: int | None) -> SampledToken | RequestFailed:
    if not math.isfinite(highest):
        return RequestFailed("the model's logits are not finite")
    if num_top is None:
        return SampledToken(int(token_id), None)
    top = zip(map(int, logprobs[1::2]), logprobs[2::2], strict=True)
    return SampledToken(int(token_id), TokenLogprob(logprobs[0], tuple(top)[:num_top]))


def _draw(logits: Tensor, states: Sequence[SamplingState], num_candidates: int) -> tuple[Tensor, Tensor | None]:
    """Int64 [B], and as `_filter`. Of these rows all have a filter or none has."""
    scores, is_short = _filter(logits, [state.params for state in states], num_candidates)
    positions = [len(state.generated_token_ids) for state in states]
    keys = _tensor(noise_keys([state.params.seed for state in states], positions), scores)
    if _has_filter(states[0].params) and not scores.is_cuda:
        # The largest score is 0: what no noise can lift to it needs none. A GPU would have to be waited for.
        rows, ids = (scores > -NOISE_RANGE).nonzero(as_tuple=True)
        scores[rows, ids] += gumbel_noise(keys[rows], ids)
    else:
        scores += gumbel_noise(keys[:, None], torch.arange(scores.shape[1], device=scores.device))
    return scores.argmax(dim=1), is_short


def _has_filter(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def has_penalty(params: SamplingParams) -> bool:
    """Whether what was drawn before changes how likely a token is."""
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


def _penalize(logits: Tensor, times: Tensor, params: Sequence[SamplingParams], rows: Tensor) -> Tensor:
    every = [(own.repetition_penalty, own.presence_penalty, own.frequency_penalty) for own in params]
    repetition, presence, frequency = _tensor(every, logits).float()[rows].unbind(dim=1)
    logits = torch.where(logits < 0, logits * repetition, logits / repetition)
    return logits - (presence * (times > 0) + frequency * times)


def _cut_top_k(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    largest = scores.topk(max(own.top_k for own in params), dim=1).values
    lowest = largest.gather(1, _tensor([own.top_k - 1 for own in params], scores)[:, None])
    return scores.masked_fill_(scores < lowest, -math.inf)


def _cut_top_p(scores: Tensor, params: Sequence[SamplingParams], num_candidates: int) -> tuple[Tensor, Tensor | None]:
    # Integers: their sums are the same in every order, so in every batch and by every kernel.
    weights = scores.exp().mul_(2.0**44).long()
    wanted = weights.sum(dim=1, keepdim=True) * _tensor([own.top_p for own in params], scores)[:, None]
    largest = weights.topk(min(num_candidates, scores.shape[1]), dim=1).values
    is_in = largest.cumsum(dim=1) - largest < wanted
    is_short = is_in[:, -1].any() if num_candidates < scores.shape[1] else None
    # A row of NaN has no member; its first stands in, so that no index is out of range.
    smallest = largest.gather(1, is_in.sum(dim=1, keepdim=True).clamp(min=1) - 1)
    num_ties = (is_in & (largest == smallest)).sum(dim=1, keepdim=True)
    is_tie = weights == smallest
    is_tie_in = is_tie & (is_tie.cumsum(dim=1, dtype=torch.int32) <= num_ties)  # the lower ids
    return scores.masked_fill_(~(is_tie_in | (weights > smallest)), -math.inf), is_short


def _cut_min_p(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    lowest = _tensor([math.log(own.min_p) for own in params], scores)[:, None]
    return scores.masked_fill_(scores < lowest, -math.inf)


def _logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Tensor:
    """Float64 [B, 1 + 2 * num_top]: logprob of the token, then ids and logprobs in turn, best first."""
    logprobs = logits.log_softmax(dim=1)
    # Bits of floats that are never positive grow as these fall; with the id below them, equals go by id.
    magnitudes = logprobs.view(torch.int32).long().bitwise_and_(0x7FFFFFFF)
    keys = magnitudes.mul_(2**32).add_(torch.arange(logits.shape[1], device=logits.device))
    ids = keys.topk(num_top, dim=1, largest=False).values & 0xFFFFFFFF
    top = torch.stack([ids.double(), logprobs.gather(1, ids).double()], dim=2)
    return torch.cat([logprobs.gather(1, token_ids[:, None]).double(), top.flatten(1)], dim=1)


def _entries(tables: Mapping[int, Mapping[int, float]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and float32 values of all entries of the rows' tables whose id has a logit."""
    sizes = [len(table) for table in tables.values()]
    rows = np.repeat(np.fromiter(tables, np.int64), sizes)
    ids = np.fromiter(chain.from_iterable(tables.values()), np.int64, sum(sizes))
    values = np.fromiter(chain.from_iterable(table.values() for table in tables.values()), np.float32, sum(sizes))
    # `<|image|>` is in every prompt with an image and has no logit.
    known = (ids >= 0) & (ids < logits.shape[1])
    return _tensor(rows[known], logits), _tensor(ids[known], logits), _tensor(values[known], logits)


def _tensor(values: ArrayLike, like: Tensor) -> Tensor:
    return upload(np.asarray(values), like.device)
