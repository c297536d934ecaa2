"""Data sets: what is read, and errors that name the line."""

import json
from pathlib import Path

import pytest

from trimserve.evaluation.dataset import DatasetError, Question, describe_questions, load_questions


def write(folder: Path, *lines: str) -> Path:
    """A data set beside one image file."""
    (folder / "a.png").write_bytes(b"a")
    path = folder / "set.jsonl"
    path.write_text("\n".join(lines))
    return path


GOOD = json.dumps({"image": "a.png", "question": "Why?", "answer": "so", "kind": "reason", "id": 7})
UNANSWERED = json.dumps({"image": "a.png", "question": "Why?"})


def test_lines_become_questions_with_images_beside_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, "", UNANSWERED)
    assert load_questions(path, need_answers=False) == [
        Question(tmp_path / "a.png", "Why?", "so", "reason", "set.jsonl:1"),
        Question(tmp_path / "a.png", "Why?", None, "", "set.jsonl:3"),
    ]


def test_texts_of_any_unicode_survive_also_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = "first\u2028second\x85third \U0001f600"
    line = json.dumps({"image": "a.png", "question": text}, ensure_ascii=False)
    path = write(tmp_path)
    path.write_bytes(f"\ufeff{line}\r\n{line}\r\n".encode())
    assert [question.text for question in load_questions(path, need_answers=False)] == [text, text]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    assert len(load_questions(write(tmp_path, GOOD, GOOD, "not JSON"), limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "set.jsonl:2: Invalid JSON"),
        ("[]", "set.jsonl:2: Input should be an object"),
        ('{"image": "a.png"}', "set.jsonl:2: question: Field required"),
        ('{"image": "a.png", "question": ""}', "set.jsonl:2: question: String should have at least 1 character"),
        ('{"image": "b.png", "question": "x", "answer": "y"}', "set.jsonl:2: image: no such file: .*b.png"),
        (UNANSWERED, "set.jsonl:2: answer: Field required"),
        ('{"image": "a.png", "question": "x", "answer": "y", "kind": "all"}', "set.jsonl:2: kind: must not be 'all'"),
    ],
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_questions(write(tmp_path, GOOD, line))


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl: cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DatasetError, match="at least 1 question"):
        load_questions(write(tmp_path, "", " "))


def test_the_description_counts_and_its_hash_follows_texts_and_pixels_not_paths(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    described = describe_questions(load_questions(write(first, GOOD, GOOD)))
    assert (described["num_questions"], described["num_images"], described["kinds"]) == (2, 1, {"reason": 2})
    questions = load_questions(write(second, GOOD, GOOD))
    assert describe_questions(questions) == described
    assert describe_questions(questions[:1])["sha256"] != described["sha256"]
    (second / "a.png").write_bytes(b"b")
    assert describe_questions(questions)["sha256"] != described["sha256"]
