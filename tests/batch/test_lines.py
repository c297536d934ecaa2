"""What a line of a batch may be, and what is said of one that is none."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimserve.batch.lines import Line, id_of, parse, read_lines
from trimserve.client import make_request
from trimserve.errors import InvalidRequest
from trimserve.v1 import generation_pb2 as pb

PIXEL = b"\x89PNG..."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an image, below it another."""
    (tmp_path / "a.png").write_bytes(PIXEL)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.png").write_bytes(PIXEL + b"b")
    return tmp_path


def line(document: Any) -> Line:
    return Line(3, document if isinstance(document, bytes) else json.dumps(document).encode())


def test_a_prompt_with_images_and_system_is_a_conversation_of_one_question(folder: Path) -> None:
    document = {"id": 7, "prompt": "?", "images": ["a.png", {"path": "deep/b.png"}], "system": "Be brief."}
    question = parse(line({**document, "sampling": {"maxNewTokens": 5}, "trim": {"k_ratio": 0.5}}), folder)
    assert question.request == make_request(
        "?",
        [PIXEL, PIXEL + b"b"],
        system="Be brief.",
        sampling=pb.SamplingParams(max_new_tokens=5),
        trim=pb.TrimOptions(k_ratio=0.5),
    )
    assert question.files == {
        "chat.messages[1].parts[0].image": "a.png",
        "chat.messages[1].parts[1].image": "deep/b.png",
    }


def test_images_are_read_wherever_a_message_has_some(folder: Path) -> None:
    data = base64.b64encode(b"given").decode()
    parts = [{"image": {"path": "a.png"}}, {"text": "and"}, {"image": {"data": data}}, {"image": "deep/b.png"}]
    question = parse(line({"chat": {"messages": [{"role": "ROLE_USER", "parts": parts}]}}), folder)
    assert [part.image.data for part in question.request.chat.messages[0].parts] == [PIXEL, b"", b"given", PIXEL + b"b"]
    assert question.files == {
        "chat.messages[0].parts[0].image": "a.png",
        "chat.messages[0].parts[3].image": "deep/b.png",
    }
    raw = parse(line({"rawPrompt": "<|image|>", "images": ["a.png"]}), folder)
    assert raw.request == pb.GenerateRequest(raw_prompt="<|image|>", images=[pb.Image(data=PIXEL)])
    assert raw.files == {"images[0]": "a.png"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "line: must be a JSON object: "),
        (b'{"id": NaN, "prompt": "?"}', "line: must be a JSON object: NaN is no JSON"),
        (b'{"id": 1e999, "prompt": "?"}', "line: must be a JSON object: 1e999 is too large"),
        (b"\xff", "line: must be a JSON object: "),
        (b"[" * 100_000, "line: must be a JSON object: "),
        ([], "line: must be a JSON object, got list"),
        ({"promt": "?"}, 'line: Message type "trimserve.v1.GenerateRequest" has no field named "promt"'),
        ({"prompt": 3}, "prompt: must be text, got int"),
        ({"prompt": "\ud800"}, "line: must be text, got half of a surrogate pair"),
        ({"raw_prompt": "\ud800"}, "line: "),
        ({"prompt": "?", "chat": {}}, "prompt: must not be beside chat"),
        ({"prompt": "?", "images": "a.png"}, "images: must be a list, got str"),
        ({"prompt": "?", "images": [3]}, 'image: must be a path, or an object with "path" or "data", got 3'),
        ({"prompt": "?", "images": ["none.png"]}, "none.png: No such file or directory"),
        ({"prompt": "?", "images": ["."]}, ".: Is a directory"),
        ({"prompt": "?", "images": ["-"]}, "-: No such file or directory"),
        ({"prompt": "?", "images": ["a\0"]}, "a\0: "),
        ({"prompt": "?", "images": ["https://example.org/a.png"]}, "https://example.org/a.png: is a URL"),
        ({"prompt": "?", "sampling": {"temperature": "warm"}}, "line: "),
        ({"prompt": "?", "sampling": 3}, "line: "),
    ],
)
def test_what_is_wrong_is_told_in_a_line(folder: Path, document: Any, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(line(document), folder)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


NAMES = st.sampled_from(
    ["id", "prompt", "system", "images", "image", "path", "data", "chat", "messages", "role", "parts", "text", "trim"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(NAMES | st.text(), each, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_no_json_does_anything_but_make_a_request_or_be_refused(document: Any) -> None:
    written = line(document)
    id_of(written)
    try:
        parse(written, Path("/nonexistent"))
    except InvalidRequest:
        return


def test_lines_count_blank_ones_and_skip_them() -> None:
    lines = [*read_lines(io.BytesIO(b"\n{}\n  \r\n[]\r\n1"))]
    assert lines == [Line(1, b"{}"), Line(3, b"[]"), Line(4, b"1")]


def test_an_id_is_repeated_whatever_it_is_and_whatever_else_is_wrong() -> None:
    assert id_of(line({"id": "a", "promt": 1})) == "a"
    assert id_of(line({"id": [1]})) == [1]
    assert id_of(line(b"{")) is None
