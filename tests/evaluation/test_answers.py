"""Answers of a model in this process and of a server that serves it: to each other, and to the model's own logits."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.model.adapters import CONFIGS, save_adapter, save_merged
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest
from trimserve.client import Client
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import RequestFailed
from trimserve.evaluation.answers import UNTRIMMED, Answer
from trimserve.evaluation.dataset import DatasetError, Question
from trimserve.evaluation.in_process import InProcess
from trimserve.evaluation.pages import OwnPages
from trimserve.evaluation.served import Served
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prefilled import Prefilled
from trimserve.serve import in_process_server
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.table import POLICIES

TRIMS = [TrimRequest(policy=policy, k_ratio=0.2) for policy in ("trimmed", "random", "strided")]
MERGED = TrimRequest(k_ratio=0.1, merge_ratio=0.2)


def answered(model: Mllama, questions: list[Question], batch: int = 64) -> list[list[Answer]]:
    """Eight tokens each."""
    return list(InProcess(model, batch=batch).answers(questions, TRIMS, max_new_tokens=8))


def texts(answers: list[list[Answer]]) -> list[list[str]]:
    return [[answer.text for answer in row] for row in answers]


@pytest.fixture(scope="module")
def rows(model: Mllama, questions: list[Question]) -> list[list[Answer]]:
    """The usual answers."""
    return answered(model, questions)


def prefilled(model: Mllama, question: Question, trim: TrimRequest) -> Prefilled:
    """What the model makes of one question alone."""
    parts = (ImageFile(question.image.read_bytes()), Text(question.text))
    prompt = model.prepare(ChatPrompt((Message("user", parts),)))
    kv = OwnPages(model.info, 2**24).key_values(len(prompt.token_ids), 2**12)
    features = [run_through(model.encode_image(image)) for image in prompt.images]
    return run_through(model.prefill(prompt, features, TrimPlan.of(trim), kv))


def test_counts_and_divergences_are_those_of_the_model_alone(
    model: Mllama, questions: list[Question], rows: list[list[Answer]]
) -> None:
    for question, row in zip(questions, rows, strict=True):
        untrimmed = prefilled(model, question, UNTRIMMED)
        assert row[0].divergence == 0
        assert row[0].num_held == row[0].num_valid == sum(untrimmed.num_valid)
        for trim, answer in zip(TRIMS, row[1:], strict=True):
            alone = prefilled(model, question, trim)
            assert answer.num_held == sum(alone.num_held) < answer.num_valid
            p, q = (logits.double().log_softmax(-1) for logits in (untrimmed.logits, alone.logits))
            expected = F.kl_div(q, p, reduction="sum", log_target=True).item()
            assert answer.divergence == pytest.approx(expected, rel=1e-3)
            assert answer.divergence > 1e-3
            alike = torch.corrcoef(torch.stack([untrimmed.logits, alone.logits]).double())[0, 1].item()
            assert answer.similarity == pytest.approx(alike, rel=1e-5)


def test_merged_rows_count_as_held(model: Mllama, questions: list[Question]) -> None:
    for _, dropped, merged in InProcess(model).answers(questions, [replace(MERGED, merge_ratio=0.0), MERGED]):
        assert dropped.num_held < merged.num_held < merged.num_valid
        assert merged.divergence < dropped.divergence


def test_controls_keep_as_many_features_and_answer_otherwise(rows: list[list[Answer]]) -> None:
    for _, trimmed, *controls in rows:
        assert {control.num_held for control in controls} == {trimmed.num_held}
    assert len({tuple(column) for column in zip(*texts(rows), strict=True)}) == 1 + len(TRIMS)


@pytest.mark.parametrize("batch", [1, 8])
def test_answers_depend_neither_on_the_batch_nor_on_the_order_of_images(
    model: Mllama, questions: list[Question], rows: list[list[Answer]], batch: int
) -> None:
    order = [0, 3, 1, 4, 2, 5]  # the images take turns
    shuffled = answered(model, [questions[index] for index in order], batch)
    assert texts(shuffled) == [texts(rows)[index] for index in order]


def test_an_answer_ends_at_an_end_token_or_at_the_limit(model: Mllama, questions: list[Question]) -> None:
    [[one]] = InProcess(model).answers(questions[:1], [], max_new_tokens=1)
    [[many]] = InProcess(model).answers(questions[:1], [])
    assert many.text.startswith(one.text)
    assert len(many.text) > len(one.text)


def test_an_image_that_the_model_refuses_names_its_line(model: Mllama, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"set\.jsonl:3: must be an image file"):
        list(InProcess(model).answers([Question(image, "?", source="set.jsonl:3")], TRIMS))


def test_an_end_token_that_has_a_text_is_no_part_of_the_answer(model: Mllama, questions: list[Question]) -> None:
    answerer = InProcess(model)
    [[one]] = answerer.answers(questions[:1], [], max_new_tokens=1)
    logits = prefilled(model, questions[0], UNTRIMMED).logits
    answerer._end_token_ids = frozenset([int(logits.argmax())])
    [[ended]] = answerer.answers(questions[:1], [])
    assert one.text
    assert ended.text == ""


def test_logits_that_are_not_finite_are_an_error_and_no_divergence_of_zero(
    model: Mllama, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Mllama.logits
    monkeypatch.setattr(Mllama, "logits", lambda *prompts, **which: exact(*prompts, **which) * math.nan)
    with pytest.raises(RequestFailed, match=r"questions\.jsonl:1: the model's logits are not finite"):
        list(InProcess(model).answers(questions[:1], TRIMS))


@pytest.fixture(scope="module")
def client(checkpoint: Path) -> Iterator[Client]:
    """Of a server of the same checkpoint."""
    with in_process_server(ModelConfig(model=str(checkpoint))) as server, Client(server.address) as connected:
        yield connected


def test_a_server_gives_the_same_answers_and_lower_bounds_of_the_divergences(
    client: Client, model: Mllama, questions: list[Question]
) -> None:
    trims = [*TRIMS, MERGED]
    served = list(Served(client, concurrency=3).answers(questions, trims, max_new_tokens=8))
    exactly = list(InProcess(model).answers(questions, trims, max_new_tokens=8))
    assert texts(served) == texts(exactly)
    for theirs, ours in zip(served, exactly, strict=True):
        assert theirs[0].divergence == 0
        for answer, exact in zip(theirs, ours, strict=True):
            assert (answer.num_valid, answer.num_held) == (exact.num_valid, exact.num_held)
            assert answer.divergence <= exact.divergence + 1e-5
    assert all(answer.divergence > 0 for row in served for answer in row[1:])


def test_both_say_which_model_answered(client: Client, model: Mllama) -> None:
    ours, theirs = InProcess(model), Served(client)
    assert {**ours.describe(), "through": ""} == {**theirs.describe(), "through": ""}
    assert ours.describe()["through"] != theirs.describe()["through"]
    assert ours.policies == theirs.policies == tuple(name for name, each in POLICIES.items() if not each.knob)


def test_an_adapter_answers_as_the_merged_model_does_here_and_on_a_server(
    model: Mllama, checkpoint: Path, questions: list[Question], rows: list[list[Answer]], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", checkpoint, CONFIGS["vision"])
    merged = load_model(ModelConfig(model=str(save_merged(tmp_path / "merged", checkpoint, folder))), EngineConfig())
    expected = texts(answered(merged, questions))
    assert expected != texts(rows)
    here = InProcess(model, adapter=folder)
    assert texts(list(here.answers(questions, TRIMS, max_new_tokens=8))) == expected
    config = ModelConfig(model=str(checkpoint), adapter=(f"mine={folder}",))
    with in_process_server(config) as server, Client(server.address) as connected:
        there = Served(connected, adapter="mine")
        assert texts(list(there.answers(questions, TRIMS, max_new_tokens=8))) == expected
