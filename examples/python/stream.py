"""Asks about an image and prints the answer as it comes, with nothing but stubs generated from protos/.

Usage: python stream.py HOST:PORT IMAGE QUESTION
"""

import sys
from pathlib import Path

import grpc
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status

from trimserve.v1 import generation_pb2 as pb
from trimserve.v1.generation_pb2_grpc import GenerationServiceStub


def ask(address: str, image: str, question: str) -> None:
    """Print the answer, and what it kept of the image."""
    parts = [pb.Part(image=pb.Image(data=Path(image).read_bytes())), pb.Part(text=question)]
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, parts=parts)]))
    with grpc.insecure_channel(address) as channel:
        for event in GenerationServiceStub(channel).GenerateStream(request, timeout=60):
            print(event.delta.text, end="", flush=True)
    usage = event.finished.usage.images[0]
    print(
        f"\nkept {usage.kept_features} of {usage.valid_features} visual features, {usage.merged_features} merged rows"
    )


def explain(error: grpc.RpcError) -> None:
    """Print the status, and the fields of the request that are to blame."""
    print(f"{error.code().name}: {error.details()}", file=sys.stderr)
    status = rpc_status.from_call(error)  # None unless the error is trimserve's own
    for detail in status.details if status else []:
        bad_request = BadRequest()
        if detail.Unpack(bad_request):
            for violation in bad_request.field_violations:
                print(f"field: {violation.field}", file=sys.stderr)


if __name__ == "__main__":
    try:
        ask(*sys.argv[1:])
    except grpc.RpcError as error:
        explain(error)
        sys.exit(1)
