"""From the wire to the engine: the budget and the parameters of a policy."""

from dataclasses import replace

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from tests.server.conftest import Field
from tests.server.fakes import CONFIG, INFO, chat_request, converted
from trimserve.api.bounds import Interval
from trimserve.api.trim import Budget, FixedCount, FixedRatio, Knee, LookAgain, TopP
from trimserve.errors import InvalidRequest
from trimserve.server.grpc.convert import to_generation_request
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.gprune import GPrune
from trimserve.v1 import generation_pb2 as pb

BUDGETS = [
    (pb.Budget(ratio=0.3), FixedRatio(0.3)),
    (pb.Budget(count=7), FixedCount(7)),
    (pb.Budget(top_p=0.9), TopP(0.9)),
    (pb.Budget(knee=pb.Knee()), Knee()),
    (pb.Budget(), None),
]


@pytest.mark.parametrize(("sent", "got"), BUDGETS)
def test_each_kind_of_budget_arrives(sent: pb.Budget, got: Budget | None) -> None:
    request = chat_request()
    request.trim.budget.CopyFrom(sent)
    assert converted(request).trim.budget == got


def test_parameters_of_the_policy_arrive_and_the_others_have_its_defaults() -> None:
    request = chat_request()
    request.trim.policy = "gprune"
    request.trim.parameters.hops = 3
    assert converted(request).trim.parameters == {"hops": 3}
    assert TrimPlan.of(converted(request).trim).policy == GPrune(hops=3)


def test_the_protos_tell_every_parameter_of_every_policy(said: dict[str, Field]) -> None:
    told = {path.partition(".")[2]: each for path, each in said.items() if path.startswith("PolicyParameters.")}
    taken = [(policy, each) for policy in INFO.policy_details for each in policy.parameters]
    assert told.keys() == {each.name for _, each in taken}
    for policy, each in taken:
        field, comment = told[each.name]
        bounds = Interval(each.low, each.high, each.is_low_open)
        assert f"`{policy.name}`" in comment.partition(":")[0], each.name
        assert f"Default: {each.default:g}. Range: {bounds}." in comment, each.name
        is_whole = field.type == FieldDescriptorProto.TYPE_UINT32
        assert is_whole == isinstance(each.default, int), each.name


def test_a_policy_that_lacks_its_knob_is_refused_with_the_option_that_sets_it() -> None:
    request = chat_request()
    request.trim.policy = "guided"
    assert converted(request).trim.policy == "guided"
    details = tuple(replace(each, is_available=not each.knob) for each in INFO.policy_details)
    with pytest.raises(InvalidRequest, match=r"^trim.policy: 'guided' needs .* started with --guide-model$"):
        to_generation_request(request, replace(INFO, policy_details=details), CONFIG.engine)


def test_looking_again_is_off_unless_asked_for_and_has_a_side_of_half_the_image() -> None:
    request = chat_request()
    assert converted(request).trim.look_again is None
    request.trim.look_again.SetInParent()
    assert converted(request).trim.look_again == LookAgain(0.5)
    request.trim.look_again.side_ratio = 0.25
    assert converted(request).trim.look_again == LookAgain(0.25)


@pytest.mark.parametrize("side_ratio", [0, -1, 1.01, float("nan")])
def test_a_side_outside_the_image_is_refused(side_ratio: float) -> None:
    request = chat_request()
    request.trim.look_again.side_ratio = side_ratio
    with pytest.raises(InvalidRequest, match=r"^trim.look_again.side_ratio: must be in \(0, 1\]"):
        converted(request)
