"""Ask a server a fixed list of questions and write down its answers, to compare two commits.

    python -m scripts.verify.replay answers.txt   # in each of two checkouts, then diff the files

Answers are the wire's own bytes as text, without what changes from run to run: times, request ids, the commit.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
from google.protobuf import text_format

from trimserve.client import Client
from trimserve.process import server_process
from trimserve.v1 import generation_pb2 as pb

__all__ = ["main"]

SAMPLES = Path(__file__).parents[2] / "trimserve/assets/samples"
LATER_LAYERS = {
    "sparsevlm": pb.PolicyParameters(cascade_ratio=0.7, recycle_ratio=0.3),
    "todre": pb.PolicyParameters(late_exit_threshold=0.5),
}
"""Parameters with which later cross-attention layers hold less."""


def _chat(text: str, *images: str) -> pb.GenerateRequest:
    parts = [pb.Part(image=pb.Image(data=(SAMPLES / name).read_bytes())) for name in images]
    message = pb.Message(role=pb.ROLE_USER, parts=[*parts, pb.Part(text=text)])
    return pb.GenerateRequest(chat=pb.Chat(messages=[message]), sampling=pb.SamplingParams(seed=7))


def requests(policies: Iterable[str]) -> Iterator[pb.GenerateRequest]:
    """The questions: text and images, every policy, sampling of every kind, and what is refused."""
    yield _chat("Hello")
    yield _chat("What do you see?", "scene.png")
    yield _chat("What do you see?", "wide.png", "digits.png")
    for policy in policies:
        for merge_ratio in (0.0, 0.1):
            asked = _chat("What colour is the star?", "mixed.png")
            asked.trim.policy, asked.trim.merge_ratio, asked.trim.return_selection = policy, merge_ratio, True
            yield asked
    for policy, parameters in LATER_LAYERS.items():
        asked = _chat("What colour is the star?", "mixed.png")
        asked.trim.policy = policy
        asked.trim.parameters.CopyFrom(parameters)
        yield asked
    for fields in (
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "num_top_logprobs": 3},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"max_new_tokens": 3, "ignore_eos": True, "num_top_logprobs": 0},
        {"stop_strings": ["e"], "min_new_tokens": 4},
    ):
        asked = _chat("Describe the picture.", "scene.png")
        asked.sampling.MergeFrom(pb.SamplingParams(**fields))
        yield asked
    for k_ratio in (-1.0, 0.05, 1.0):
        asked = _chat("What do you see?", "tall.png")
        asked.trim.k_ratio = k_ratio
        yield asked
    yield pb.GenerateRequest()
    yield pb.GenerateRequest(raw_prompt="<|image|>")


def _lines(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> str:
    for timed in [message] if isinstance(message, pb.GenerateResponse) else [message.started, message.finished]:
        for field in ("timings", "request_id"):
            if field in timed.DESCRIPTOR.fields_by_name:
                timed.ClearField(field)
    return text_format.MessageToString(message)


def answers(client: Client) -> Iterator[str]:
    """Of each request the unary answer, and the stream's text and last message."""
    available = [policy.name for policy in client.model().policy_details if policy.is_available]
    for number, request in enumerate(requests(available)):
        yield f"# {number}\n"
        try:
            yield _lines(client.generate(request))
            events = [*client.stream(request)]
            yield "".join(event.delta.text for event in events if event.WhichOneof("event") == "delta") + "\n"
            yield _lines(events[-1])
        except grpc.RpcError as error:
            yield f"{error.code()}: {error.details()}\n"


def main() -> None:
    """Write the answers of a server of this checkout."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    with server_process("--num-threads", "1") as server, Client(server.address) as client:
        out.write_text("".join(answers(client)))


if __name__ == "__main__":
    main()
