"""Text comes out as decoding everything at once would give it, whatever the tokens and stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.engine.fake_model import END, byte_tokenizer
from trimserve.engine.detokenizer import Detokenizer

# Tokens of several letters, of parts of characters, and across the border of two characters ("é" and "😀").
TOKENIZER = byte_tokenizer(
    [("a", "b"), ("ab", "a"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ã", "©"), ("©", "ð"), ("b", "Ã"), ("Ġ", "a")]
)
TOKEN_IDS = st.lists(
    st.one_of(
        st.sampled_from([*b"ab .", *"é😀\ufffd".encode(), END, *range(257, 265)]),
        st.integers(0, TOKENIZER.get_vocab_size() + 5),
    ),
    max_size=40,
)
TEXT = st.text(st.sampled_from("ab é😀."), max_size=30)
STOP_STRINGS = st.lists(st.text(st.sampled_from("ab é😀.\ufffd"), min_size=1, max_size=4), max_size=4)


def pieces(token_ids: list[int], stop_strings: list[str]) -> tuple[list[str], str | None]:
    """What comes out token by token, and the stop string that ended it."""
    detokenizer = Detokenizer(TOKENIZER, stop_strings)
    out = []
    for token_id in token_ids:
        out.append(detokenizer.add(token_id))
        if detokenizer.matched_stop is not None:
            return out, detokenizer.matched_stop
    return [*out, detokenizer.finish()], detokenizer.matched_stop


def cut(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The specification: read letter by letter, cut before the first complete stop string, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(TOKEN_IDS)
def test_any_tokens_give_the_text_of_decoding_them_at_once(token_ids: list[int]) -> None:
    out, _ = pieces(token_ids, [])
    assert "".join(out) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@given(TOKEN_IDS, STOP_STRINGS)
def test_any_tokens_are_cut_at_the_first_complete_stop_string(token_ids: list[int], stops: list[str]) -> None:
    out, matched = pieces(token_ids, stops)
    assert ("".join(out), matched) == cut(TOKENIZER.decode(token_ids, skip_special_tokens=True), stops)


@given(TEXT, STOP_STRINGS)
def test_the_cut_does_not_depend_on_where_tokens_begin(text: str, stop_strings: list[str]) -> None:
    bytewise, merged = list(text.encode()), TOKENIZER.encode(text).ids
    for token_ids in (bytewise, merged):
        out, matched = pieces(token_ids, stop_strings)
        assert ("".join(out), matched) == cut(text, stop_strings)


@given(TEXT)
def test_no_piece_splits_a_code_point(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    seen = b""
    given_out = ""
    for byte in text.encode():
        seen += bytes([byte])
        given_out += detokenizer.add(byte)
        # Every whole character comes at once, nothing of an incomplete one does.
        assert given_out == seen.decode(errors="ignore")


CASES = [  # tokens, stop strings, pieces, matched
    (["a", "b", "c"], [], ["a", "b", "c", ""], None),
    (["x", "ST", "OP", "y"], ["STOP"], ["x", "", ""], "STOP"),  # over several tokens
    (["xST", "OPy"], ["STOP"], ["x", ""], "STOP"),  # begins and ends in the middle of one
    (["x", "ST", "AY"], ["STOP"], ["x", "", "STAY", ""], None),  # held back, then decided otherwise
    (["x", "ST"], ["STOP"], ["x", "", "ST"], None),  # never decided
    (["SSTOP"], ["STOP"], ["S"], "STOP"),
    (["ab", "abc"], ["abc"], ["", "ab"], "abc"),  # the beginning repeats
    (["abcd"], ["bcd", "c"], ["ab"], "c"),  # complete first
    (["abcd"], ["cd", "bcd", "d"], ["a"], "bcd"),  # the longest of those complete at once
    (["a", END, "b"], ["ab"], ["", "", ""], "ab"),  # a special token has no text
]


@pytest.mark.parametrize(("tokens", "stop_strings", "expected", "matched"), CASES)
def test_stop_strings_by_hand(
    tokens: list[str | int], stop_strings: list[str], expected: list[str], matched: str | None
) -> None:
    words = sorted({token for token in tokens if isinstance(token, str)})
    tokenizer = _tokenizer_with(words)
    detokenizer = Detokenizer(tokenizer, stop_strings)
    out = []
    for token in tokens:
        token_id = tokenizer.get_vocab()[token] if isinstance(token, str) else token
        out.append(detokenizer.add(token_id))
        if detokenizer.matched_stop is not None:
            break
    else:
        out.append(detokenizer.finish())
    assert (out, detokenizer.matched_stop) == (expected, matched)


def test_an_incomplete_code_point_at_the_end_is_a_replacement_character() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.add(byte) for byte in (*b"a", *"😀".encode()[:3])] == ["a", "", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_text_that_came_without_watching_never_matches() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["ab"])
    out = [detokenizer.add(byte, watch=number > 2) for number, byte in enumerate(b"ababab")]
    assert (out, detokenizer.matched_stop) == (["a", "b", "a", "b", "", ""], "ab")


def _tokenizer_with(words: list[str]) -> Tokenizer:
    """Each word is one token."""
    merges = [(word[:length], word[length]) for word in words for length in range(1, len(word))]
    return byte_tokenizer(merges)
