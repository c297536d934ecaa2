"""`trimserve generate`: one question, one answer."""

import json
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from trimserve.commands import question
from trimserve.commands.server import OWN_SERVER, asked_server
from trimserve.config import Config
from trimserve.connection import Connection, with_connection
from trimserve.image_files import named_files
from trimserve.knobs import adapter_of, with_knobs
from trimserve.v1 import generation_pb2 as pb

__all__ = ["generate"]


@with_knobs("model")
@with_connection(OWN_SERVER)
def generate(
    prompt: question.Prompt,
    image: question.ImageNames = None,
    system: question.System = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    policy: question.Policy = None,
    keep: question.Keep = None,
    k_ratio: question.KRatio = None,
    merge_ratio: question.MergeRatio = None,
    no_trim: question.NoTrim = False,
    look_again: question.LookAgain = None,
    max_new_tokens: question.MaxNewTokens = None,
    temperature: question.Temperature = None,
    seed: question.Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole messages as JSON.")] = False,
    adapter: question.Adapter = None,
    json_schema: question.JsonSchema = None,
    regex: question.Regex = None,
    choice: question.Choices = None,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Ask a question about images and print the answer."""
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    trim = question.trim_options(policy, keep, k_ratio, merge_ratio, no_trim=no_trim, look_again=look_again)
    name, config = adapter_of(adapter, config, is_served=connection.address is not None)
    request = question.ask(prompt, image or [], system, sampling, trim, name)
    question.constrain(request, json_schema, regex, choice)
    with asked_server(connection, config) as client, named_files(request, image or []):
        if stream:
            for event in client.stream(request):
                if as_json:
                    print(json.dumps(_to_dict(event)), flush=True)
                else:
                    print(event.delta.text, end="", flush=True)
            if not as_json:
                print()
            return
        response = client.generate(request)
        print(json.dumps(_to_dict(response), indent=2) if as_json else response.text)


def _to_dict(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> dict[str, Any]:
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document
