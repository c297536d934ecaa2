"""The output of a batch survives what may happen to its process and to its file."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimserve.batch.journal import Journal, JournalError
from trimserve.batch.lines import Line

LINES = [Line(index, b"%d" % index) for index in range(4)]


def write(path: Path, lines: list[Line]) -> None:
    with Journal(path) as journal:
        for line in lines:
            journal.write(line, f"é{line.index}", {"response": {"text": "…"}})


def indices(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def test_what_is_written_is_done(tmp_path: Path) -> None:
    path = tmp_path / "new/out.jsonl"
    write(path, [LINES[2], LINES[0]])
    assert json.loads(path.read_text().splitlines()[0]) == {
        "index": 2,
        "id": "é2",
        "input": LINES[2].digest,
        "response": {"text": "…"},
    }
    with Journal(path) as journal:
        assert journal.compare(LINES) == (4, {1, 3})
        journal.write(LINES[1], None, {"error": {"code": "INTERNAL", "message": "bytes \udcff of a path"}})
        assert (len(journal), journal.num_errors) == (3, 1)
    with Journal(path) as journal:
        assert (len(journal), journal.num_errors) == (3, 1)
    assert "id" not in json.loads(path.read_text().splitlines()[-1])


@given(cut=st.integers(0))
def test_wherever_a_kill_cuts_the_file_each_line_is_whole_and_there_once(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "out.jsonl"
    write(path, LINES)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    with Journal(path) as journal:
        _, missing = journal.compare(LINES)
    write(path, [line for line in LINES if line.index in missing])
    assert sorted(indices(path)) == [0, 1, 2, 3]


def test_zeros_that_a_crash_left_behind_the_last_line_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, LINES[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(512))
    with Journal(path) as journal:
        assert len(journal) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"index": 0, "input": "x"}\nmy notes\n', "line 2 was not written by a batch"),
        ('{"prompt": "?"}\n', "line 1 was not written by a batch"),
        ('{"prompt": "?"}', "line 1 was not written by a batch"),
        ('{"index": 0, "input": "x"}\nmy notes', "line 2 was not written by a batch"),
        ("[]\n", "line 1 was not written by a batch"),
        ('{"index": 0, "input": "x"}\n' * 2, "line 2 is the second one with index 0"),
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(JournalError, match=f"{path}: {message}"):
        Journal(path)
    assert path.read_text() == content


def test_answers_to_another_input_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, LINES)
    with Journal(path) as journal:
        assert journal.compare([*LINES, Line(9, b"appended")]) == (5, {9})
        for lines in ([*LINES[:3], Line(3, b"edited")], LINES[:3]):
            with pytest.raises(JournalError, match="has an answer to another line 3"):
                journal.compare(lines)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Journal(path), pytest.raises(JournalError, match="another process writes it"):
        Journal(path)
    write(path, LINES)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="must be a regular file"):
        Journal(tmp_path)
