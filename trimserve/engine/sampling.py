"""From logits to the next token of each row of a batch: penalties, filters, noise, log-probabilities.

    logits -> logit_bias -> repetition, presence, frequency penalty -> min_new_tokens
           -> temperature -> top_k -> top_p -> min_p -> Gumbel noise -> argmax

The order is transformers'. Rows never see each other, and the noise of a row is a function of its seed, its
position and the token id alone, so that a request gets the same tokens in every batch and on every device.
It knows no text.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimserve.engine.request import SamplingParams, TokenLogprob
from trimserve.errors import RequestFailed

__all__ = ["SampledToken", "SamplingState", "apply_filters", "apply_penalties", "gumbel_noise", "sample"]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SamplingState:
    """What the next token of one request depends on besides its logits."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    end_token_ids: frozenset[int]
    """Tokens that end this request, impossible before `params.min_new_tokens`."""
    generated_token_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of one row."""

    token_id: int
    logprob: TokenLogprob | None
    """None unless the request asked for it."""


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[SampledToken | RequestFailed]:
    """Draw the next token of each row.

    Args:
        logits: float32 [B, V], not changed.
        states: B states, not changed.
    Returns:
        One entry per row: the token, or why this row alone has none (a NaN or infinity among its logits).
    """
    is_usable = logits.amax(dim=1).isfinite().tolist()
    return [
        _sample_row(row, state) if usable else RequestFailed("the model's logits are not finite")
        for row, state, usable in zip(logits, states, is_usable, strict=True)
    ]


def apply_penalties(logits: Tensor, state: SamplingState) -> Tensor:
    """Bias and penalties, and no end token before `min_new_tokens`. Ids past the vocabulary are ignored.

    Args:
        logits: float32 [V], not changed.
        state: of this row.
    Returns:
        float32 [V].
    """
    params, generated = state.params, state.generated_token_ids
    logits = logits.clone()
    if params.logit_bias:
        ids = _known_ids(params.logit_bias, logits)
        logits[ids] += logits.new_tensor([params.logit_bias[token_id] for token_id in ids.tolist()])
    if params.repetition_penalty != 1.0:
        ids = _known_ids({*state.prompt_token_ids, *generated}, logits)
        seen = logits[ids]
        logits[ids] = torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(generated)
        ids = _known_ids(counts, logits)
        repeats = logits.new_tensor([counts[token_id] for token_id in ids.tolist()])
        logits[ids] -= params.presence_penalty + params.frequency_penalty * repeats
    if len(generated) < params.min_new_tokens:
        logits[_known_ids(state.end_token_ids, logits)] = -math.inf
    return logits


def apply_filters(logits: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then top_k (ties with the k-th stay), top_p (the smallest set that reaches it) and min_p.

    Args:
        logits: float32 [V].
        params: temperature above 0.
    Returns:
        float64 [V], logits over temperature up to a constant; -inf where a token is filtered out.
    """
    # The largest becomes 0 first: no temperature, however small, can overflow it.
    scores = (logits.double() - logits.max()) / params.temperature
    if 0 < params.top_k < scores.numel():
        scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -math.inf)
    if params.top_p < 1.0:
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(dim=0)
        is_out = probabilities.cumsum(dim=0) - probabilities >= params.top_p
        scores = scores.masked_fill(torch.empty_like(is_out).scatter_(0, order, is_out), -math.inf)
    if params.min_p > 0.0:
        scores = scores.masked_fill(scores < math.log(params.min_p), -math.inf)
    return scores


def gumbel_noise(seed: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    """Gumbel noise: argmax(scores + noise) draws from softmax(scores).

    Token i gets `-log(-log(u))`, where u in (0, 1) is made of the upper 52 bits of
    `mix(mix(mix(seed) + position) + i * GOLDEN)`, the steps of splitmix64. The random bits come from integers
    alone: they are the same on every device and with every version of torch.

    Args:
        seed: unsigned 64 bits.
        position: tokens generated before this one.
        vocab_size: V.
        device: where to make it.
    Returns:
        float64 [V].
    """
    key = _mix(_mix(torch.tensor(_signed(seed))) + position).item()
    bits = _mix(torch.arange(vocab_size, dtype=torch.int64, device=device) * _GOLDEN + key)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # never 0 or 1
    return -(-uniform.log()).log()


def _sample_row(logits: Tensor, state: SamplingState) -> SampledToken | RequestFailed:
    try:
        params = state.params
        scores = apply_penalties(logits, state)
        if params.temperature > 0.0:
            position = len(state.generated_token_ids)
            scores = apply_filters(scores, params)
            scores = scores + gumbel_noise(params.seed, position, scores.numel(), scores.device)
        token_id = int(scores.argmax())  # the first of equals
        return SampledToken(token_id, _logprob(logits, token_id, params.num_top_logprobs))
    except Exception:
        log.exception("sampling failed with %s", state.params)
        return RequestFailed("sampling failed")


def _logprob(logits: Tensor, token_id: int, num_top: int | None) -> TokenLogprob | None:
    if num_top is None:
        return None
    logprobs = logits.log_softmax(dim=0)
    values, ids = logprobs.topk(min(num_top, logprobs.numel()))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    return TokenLogprob(float(logprobs[token_id]), tuple(top))


def _known_ids(token_ids: Iterable[int], logits: Tensor) -> Tensor:
    # `<|image|>` is in every prompt with an image and has no logit.
    known = [token_id for token_id in token_ids if token_id < logits.numel()]
    return torch.tensor(known, dtype=torch.int64, device=logits.device)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # torch has no unsigned shift: the sign bits that come in from the left are cleared.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)
