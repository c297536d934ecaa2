"""What a token adds to a text, beside what the tokenizer itself decodes."""

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from trimserve.engine.detokenizer import token_bytes
from trimserve.model.loading import embedded_model_folder


@pytest.mark.parametrize("text", ["Hello there", "grüß dich", "☃ snow\n\tman", "a\u2028b", "\x00\x7f\xad"])
def test_the_bytes_of_the_tokens_of_a_text_are_the_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model_folder() / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(token_bytes(tokenizer, each) for each in ids) == text.encode()


def test_a_special_token_is_its_name_and_an_unknown_one_nothing() -> None:
    tokenizer = Tokenizer.from_file(str(embedded_model_folder() / "tokenizer.json"))
    special = tokenizer.token_to_id("<|image|>")
    assert special is not None
    assert token_bytes(tokenizer, special) == b"<|image|>"
    assert token_bytes(tokenizer, 10**9) == b""


def test_a_tokenizer_that_is_not_byte_level_decodes_each_token() -> None:
    words = WordLevel({"▁é": 0, "?": 1}, unk_token="?")  # type: ignore[call-arg,unused-ignore]  # stubs of some releases
    tokenizer = Tokenizer(words)
    tokenizer.decoder = Metaspace()  # type: ignore[assignment,unused-ignore]  # stubs of some releases
    assert token_bytes(tokenizer, 0).decode().strip() == "é"
