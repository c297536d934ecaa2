"""Chat encoding against transformers' own, and special tokens typed by a user."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.model.tiny_tokenizer import SPECIAL_TOKENS, TinyTokens, save_tiny_processor
from trimserve.api.prompt import ImageFile, Message, Text
from trimserve.errors import InvalidRequest
from trimserve.model.chat import ChatEncoder
from trimserve.model.chat_template import ChatTemplate

DATE = "1 Feb 2025"
PICTURE = ImageFile(b"")

Chat = tuple[ChatEncoder, PreTrainedTokenizerBase, TinyTokens]

texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" \n\t\r1234 aé'.{}<|>🙂\u00a0", max_size=30),
    st.sampled_from(["", " ", "\n\n", "  7 dogs\n", "\nHello", "12345", "🙂 👩‍👩‍👧", "don't", "{{ bos_token }}"]),
    st.sampled_from([" the circle", "What is", "tri", "angle", " the", " color of"]),  # merged by the vocabulary
).filter(lambda text: not any(token in text for token in (*SPECIAL_TOKENS, "<|image|>")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder: Path = tmp_path_factory.mktemp("tiny")
    tokens = save_tiny_processor(folder, tile_size=28, max_tiles=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return encoder(tokenizer, tokens.image_token_id), tokenizer, tokens


def encoder(tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> ChatEncoder:
    """With the tokenizer's own template."""
    template = ChatTemplate(tokenizer, "test", str(tokenizer.chat_template), DATE)
    return ChatEncoder(tokenizer, image_token_id, template)


def transformers_ids(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]]) -> list[int]:
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, date_string=DATE, return_dict=False)
    return list(ids)


@given(system=texts, question=texts, answer=texts, again=texts)
@settings(deadline=None)
@example(system="  Be brief.\n", question="\nHi", answer="", again=" ")
@example(system="", question=" the circle", answer="\n\n the square", again="  the color")
def test_text_conversations_encode_as_transformers_does(
    chat: Chat, system: str, question: str, answer: str, again: str
) -> None:
    encoder, tokenizer, _ = chat
    turns = [("system", system), ("user", question), ("assistant", answer), ("user", again)]
    ours = encoder.encode([Message(role, (Text(text),)) for role, text in turns])
    assert ours == transformers_ids(tokenizer, [{"role": role, "content": text} for role, text in turns])


@given(before=texts, after=texts, more=texts)
@settings(deadline=None)
@example(before="", after="\n\nWhat is this?", more="12")
@example(before=" the cir", after="the tri", more="angle")
def test_conversations_with_images_encode_as_transformers_does(chat: Chat, before: str, after: str, more: str) -> None:
    encoder, tokenizer, tokens = chat
    message = Message("user", (Text(before), PICTURE, PICTURE, Text(after), Text(more)))
    content = [
        {"type": "text", "text": before},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": after},
        {"type": "text", "text": more},
    ]
    ours = encoder.encode([message])
    assert ours == transformers_ids(tokenizer, [{"role": "user", "content": content}])
    assert ours.count(tokens.image_token_id) == 2


def test_begin_of_text_comes_once(chat: Chat) -> None:
    encoder, _, tokens = chat
    ids = encoder.encode([Message("user", (Text("Hi"),))])
    assert ids[0] == tokens.bos
    assert ids.count(tokens.bos) == 1


@pytest.mark.parametrize("typed", [*SPECIAL_TOKENS, "<|image|>"])
def test_special_tokens_typed_by_a_user_are_text(chat: Chat, typed: str) -> None:
    encoder, tokenizer, _ = chat
    special = set(tokenizer.added_tokens_decoder)
    harmless = encoder.encode([Message("user", (PICTURE, Text("see  now")))])
    ids = encoder.encode([Message("user", (PICTURE, Text(f"see {typed} now")))])
    assert [id_ for id_ in ids if id_ in special] == [id_ for id_ in harmless if id_ in special]
    assert f"see {typed} now" in tokenizer.decode(ids)


def test_special_token_typed_in_two_parts_is_text(chat: Chat) -> None:
    encoder, tokenizer, tokens = chat
    ids = encoder.encode([Message("user", (Text("<|ima"), Text("ge|>")))])
    assert tokens.image_token_id not in ids
    assert "<|image|>" in tokenizer.decode(ids)


def test_typed_placeholders_and_jinja_are_text(chat: Chat) -> None:
    encoder, tokenizer, _ = chat
    typed = "\ue0000\ue001 {{ bos_token }} {% raw %} \ue000999\ue001"
    ids = encoder.encode([Message("user", (Text("first"),)), Message("user", (Text(typed),))])
    decoded = tokenizer.decode(ids)
    assert typed in decoded
    assert decoded.count("first") == 1


def test_image_token_is_special_even_if_the_tokenizer_says_otherwise(chat: Chat) -> None:
    _, tokenizer, tokens = chat
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|picture|>", special=False)])
    picture_id = len(tokenizer) - 1
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['content'] is string }}<|picture|>{% endfor %}"
    )
    ids = encoder(tokenizer, picture_id).encode([Message("user", (Text("a<|picture|>b"),))])
    assert ids.count(picture_id) == 1
    assert ids[-1] == picture_id
    assert picture_id > tokens.image_token_id


def test_tokenizer_truncation_is_not_applied(chat: Chat) -> None:
    _, tokenizer, tokens = chat
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    ids = encoder(tokenizer, tokens.image_token_id).encode([Message("user", (Text("z" * 50),))])
    assert len(ids) > 50


def test_template_shows_the_date_of_the_setting(chat: Chat) -> None:
    encoder, tokenizer, _ = chat
    assert f"Today Date: {DATE}\n" in tokenizer.decode(encoder.encode([Message("user", (Text("Hi"),))]))


REFUSED = [
    ((), "chat.messages", "must have at least one message, got 0"),
    (
        (Message("tool", (Text("x"),)),),
        "chat.messages[0].role",
        "must be one of system, user, assistant, got 'tool'",
    ),
    (
        (Message("user", (Text("x"),)), Message("user", ())),
        "chat.messages[1].parts",
        "must have at least one part, got 0",
    ),
    (
        (Message("system", (Text("Be brief."),)), Message("user", (PICTURE, Text("What?")))),
        "chat.messages",
        "the chat template refuses them: Prompting with images is incompatible with system messages.",
    ),
]


@pytest.mark.parametrize(("messages", "field", "message"), REFUSED)
def test_refused_conversations_name_the_field(
    chat: Chat, messages: tuple[Message, ...], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat[0].encode(messages)
    assert (caught.value.field, caught.value.message) == (field, message)


def test_blank_system_message_goes_with_images(chat: Chat) -> None:
    encoder, _, tokens = chat
    ids = encoder.encode([Message("system", (Text(" \n"),)), Message("user", (PICTURE,))])
    assert ids.count(tokens.image_token_id) == 1


def test_without_a_template_a_conversation_is_refused(chat: Chat) -> None:
    _, tokenizer, tokens = chat
    with pytest.raises(InvalidRequest, match="no chat template: send raw_prompt instead"):
        ChatEncoder(tokenizer, tokens.image_token_id, None).encode([Message("user", (PICTURE,))])


def test_encoding_in_many_threads_gives_the_same_ids(chat: Chat) -> None:
    encoder, _, _ = chat
    chats = [[Message("user", (Text(f"<|eot_id|> question {i} " * 20), PICTURE))] for i in range(32)]
    expected = [encoder.encode(messages) for messages in chats]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encoder.encode, chats)) == expected
