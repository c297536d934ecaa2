"""What a student learns from is what a request gets: the same rows, weights and logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tolerances import LOGITS
from tests.trimming.policies.trained import drawn_modules
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.distillation.batches import batch_of, epoch_order
from trimserve.distillation.lessons import Lessons
from trimserve.distillation.students import CompressorStudent, RouterStudent, divergence, student_of
from trimserve.errors import CheckpointError
from trimserve.evaluation.dataset import Question
from trimserve.evaluation.in_process import prepare_question
from trimserve.evaluation.pages import OwnPages
from trimserve.model.interruptible import run_through
from trimserve.model.loading import load_model
from trimserve.model.mllama import Mllama
from trimserve.model.trained_file import shape_of
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.exit import Router
from trimserve.trimming.trained import Trained

CPU = torch.device("cpu")
UNTRIMMED = TrimRequest(enabled=False)
COMPRESSORS = ("tokenpacker", "wico", "flashsloth", "quecc", "registers")


@pytest.fixture
def trained(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> dict[str, Trained]:
    """Drawn modules, which the model serves with."""
    modules = drawn_modules(shape_of(model.info, 5))
    monkeypatch.setattr(model, "_trained", modules)
    return modules


def served(model: Mllama, question: Question, answer: list[int], trim: TrimRequest) -> Tensor:
    """Logits of every token of an answer, as a request gets them."""
    prompt, plan = prepare_question(model, question), TrimPlan.of(trim)
    image = run_through(model.encode_image(prompt.images[0]))
    kv = OwnPages(model.info, 2**23).key_values(len(prompt.token_ids) + len(answer), image.num_features)
    logits = [run_through(model.prefill(prompt, [image], plan, kv)).logits]
    return torch.stack([*logits, *(model.decode([token], [kv])[0].clone() for token in answer[:-1])])


@pytest.mark.parametrize("method", COMPRESSORS)
def test_a_compressors_loss_is_the_divergence_of_the_answers_that_requests_get(
    model: Mllama, questions: list[Question], lessons: Lessons, trained: dict[str, Trained], method: str
) -> None:
    module = trained[method]
    assert isinstance(module, Compressor)
    batch = batch_of(lessons, range(len(questions)), CPU)
    found = CompressorStudent(module, model.differentiable()).loss(batch)
    parts = []
    for question, lesson in zip(questions, lessons.lessons, strict=True):
        answer = [*lesson.token_ids[lesson.num_prompt :]]
        untrimmed = served(model, question, answer, UNTRIMMED).log_softmax(dim=-1)
        parts.append(divergence(untrimmed, served(model, question, answer, TrimRequest(policy=method))))
    expected = torch.cat(parts)
    assert expected.mean() > 100 * LOGITS
    torch.testing.assert_close(found, expected.mean(), atol=20 * LOGITS, rtol=0)  # lessons are float16


def test_lessons_are_the_greedy_answers_and_what_the_model_said(
    model: Mllama, questions: list[Question], lessons: Lessons
) -> None:
    for number, (question, lesson) in enumerate(zip(questions, lessons.lessons, strict=True)):
        answer = [*lesson.token_ids[lesson.num_prompt :]]
        logits = served(model, question, answer, UNTRIMMED)
        assert logits.argmax(dim=-1).tolist() == answer
        said = lessons.logprobs(number).float()
        torch.testing.assert_close(said, logits.log_softmax(dim=-1), atol=0, rtol=1e-3)  # float16


@pytest.mark.parametrize("method", COMPRESSORS)
def test_every_weight_of_a_compressor_learns_and_none_of_the_model(
    model: Mllama, lessons: Lessons, trained: dict[str, Trained], method: str
) -> None:
    module = trained[method].requires_grad_()
    assert isinstance(module, Compressor)
    CompressorStudent(module, model.differentiable()).loss(batch_of(lessons, [0, 3], CPU)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in model._model.parameters())


@pytest.mark.parametrize("method", COMPRESSORS)
def test_a_compressor_starts_as_a_mean_of_patches(model: Mllama, lessons: Lessons, method: str) -> None:
    student = student_of(method, 5, model)
    assert isinstance(student.module, Compressor)
    tiles = lessons.tiles(1)[None]
    patches, num_rows = tiles[:, :, 1:].flatten(1, 2), 4 * tiles.shape[1]
    rows, group = student.module(tiles, tiles[:, 0, 0])
    assert group.unique().tolist() == [*range(num_rows)]
    expected = torch.stack([patches[0, group[0] == number].mean(dim=0) for number in range(num_rows)])
    if method == "registers":  # which look a little further from the beginning on
        assert (rows[0] - expected).norm() < 0.2 * expected.norm()
    else:
        torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=0)


def test_a_router_learns_whether_leaving_changes_the_answer(
    model: Mllama, questions: list[Question], lessons: Lessons, trained: dict[str, Trained]
) -> None:
    module = trained["exit"]
    assert isinstance(module, Router)
    student = RouterStudent(module, model.differentiable())
    losses = []
    for number, (question, lesson) in enumerate(zip(questions, lessons.lessons, strict=True)):
        answer = [*lesson.token_ids[lesson.num_prompt :]]
        leaving = served(model, question, answer, TrimRequest(policy="exit", parameters={"certainty": 0.0}))
        stays = float(leaving.argmax(dim=-1).tolist() == answer)
        # What leaves at a certainty of p, and not just above it, is p sure.
        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            left = TrimRequest(policy="exit", parameters={"certainty": middle})
            is_same = torch.equal(served(model, question, answer, left), leaving)
            low, high = (middle, high) if is_same else (low, middle)
        sure = torch.tensor(low if stays else 1 - low)
        losses.append(-sure.log())
        found = student.loss(batch_of(lessons, [number], CPU))
        torch.testing.assert_close(found, losses[-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(
        student.loss(batch_of(lessons, range(6), CPU)), torch.stack(losses).mean(), atol=1e-3, rtol=0
    )


def test_quantized_weights_are_refused(checkpoint: Path) -> None:
    quantized = load_model(ModelConfig(model=str(checkpoint), quantize="int8"), EngineConfig())
    with pytest.raises(CheckpointError, match="weights that are not quantized"):
        student_of("quecc", 5, quantized)


def test_an_epoch_asks_every_lesson_once_in_an_order_of_its_own() -> None:
    lengths = {number: number % 7 for number in range(3, 45)}
    first, second = (epoch_order(lengths, 4, seed=0, epoch=epoch) for epoch in (0, 1))
    asked = [number for batch in first for number in batch]
    assert len(set(asked)) == len(asked) == 40
    assert set(asked) <= lengths.keys()
    assert first != second
    assert first == epoch_order(lengths, 4, seed=0, epoch=0)
    assert all(len({lengths[number] for number in batch}) <= 2 for batch in first)
