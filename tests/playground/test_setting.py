"""What the controls say becomes the contract's options, which the server's own conversion understands."""

import pytest

from tests.server.fakes import CONFIG, INFO, converted
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.playground.setting import OFF, Question, Setting, policy_names
from trimserve.server.grpc.responses import model_response
from trimserve.v1.model_pb2 import GetModelResponse

MODEL = model_response(INFO, CONFIG.engine)
QUESTION = Question("What?", b"an image", max_new_tokens=7, temperature=0.5)


def trim(setting: Setting) -> TrimRequest:
    """As the server reads it."""
    return converted(QUESTION.request(setting, MODEL)).trim


def test_the_budget_is_k_ratio_for_a_policy_that_asks_heads() -> None:
    wanted = trim(Setting("trimmed", 0.3, 0.1))
    assert (wanted.policy, wanted.k_ratio, wanted.budget, wanted.merge_ratio) == ("trimmed", 0.3, None, 0.1)
    assert wanted.return_selection


def test_the_budget_is_the_images_for_a_policy_that_chooses_before_the_decoder() -> None:
    wanted = trim(Setting("cls", 0.3, 0.1))
    assert (wanted.policy, wanted.budget) == ("cls", FixedRatio(0.3))


@pytest.mark.parametrize("name", policy_names(MODEL))
def test_every_policy_that_can_be_chosen_is_taken(name: str) -> None:
    assert trim(Setting(name, 0.5, 0)).enabled == (name != OFF)


def test_off_still_asks_what_is_kept() -> None:
    assert trim(Setting(OFF, 0.5, 0.5)).return_selection


def test_policies_that_this_server_cannot_use_are_not_offered() -> None:
    model = GetModelResponse.FromString(MODEL.SerializeToString())
    model.policy_details[0].is_available = False
    assert policy_names(model) == policy_names(MODEL)[1:]


def test_a_question_without_an_image_is_text_only() -> None:
    request = Question("Why?", None, 7, 0.5).request(Setting(OFF, 1, 0), MODEL)
    assert [part.WhichOneof("content") for part in request.chat.messages[0].parts] == ["text"]
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (7, 0.5)
