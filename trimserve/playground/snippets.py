"""A request as a program in Python, and as a line for curl, to copy."""

import json
import mimetypes
import shlex
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from trimserve.connection import Connection
from trimserve.v1 import generation_pb2 as pb

__all__ = ["as_curl", "as_python"]

_IMAGE = "IMAGE HERE"
"""Stands for the image's content in JSON."""


def as_python(request: pb.GenerateRequest, connection: Connection, image_name: str | None) -> str:
    """A program that streams the answer.

    Args:
        request: a question, with an image at most.
        connection: with an address; a token is left to the environment.
        image_name: path of the image's file; None if there is none.
    """
    images = "" if image_name is None else f", [{image_name!r}]"
    arguments = [repr(connection.address)]
    if connection.tls is not None:
        files = (("ca", connection.tls.ca), ("certificate", connection.tls.certificate), ("key", connection.tls.key))
        told = ", ".join(f"{name}=Path({str(path)!r})" for name, path in files if path is not None)
        arguments.append(f"tls=Tls({told})")
    if connection.token is not None:
        arguments.append('token=os.environ["TRIMSERVE_TOKEN"]')
    return f"""\
{"import os" + chr(10) if connection.token else ""}{"from pathlib import Path" + chr(10) if connection.tls else ""}\
from trimserve.client import Client, {"Tls, " if connection.tls else ""}make_request
from trimserve.v1 import generation_pb2 as pb

request = make_request({_question(request)!r}{images})
request.sampling.CopyFrom({_constructed(request.sampling)})
request.trim.CopyFrom({_constructed(request.trim)})
with Client({", ".join(arguments)}) as client:
    for event in client.stream(request):
        print(event.delta.text, end="", flush=True)
print()
"""


def as_curl(
    request: pb.GenerateRequest, model_id: str, connection: Connection, http_address: str, image_name: str | None
) -> str:
    """A line for a shell, which asks the server's HTTP; the image goes through a pipe, for lines have an end.

    Args:
        request: a question, with an image at most.
        model_id: of the server.
        connection: with the same TLS and token; a token is left to the environment.
        http_address: HOST:PORT of HTTP.
        image_name: path of the image's file; None if there is none.
    """
    body = json.dumps(_body(request, model_id, image_name), ensure_ascii=False)
    if image_name is None:
        return f"printf %s {shlex.quote(body)} |\n  {_curl(connection, http_address)}"
    before, _, after = body.partition(_IMAGE)  # it comes before the question, which may say anything
    return f"""\
{{ printf %s {shlex.quote(before)}
  base64 < {shlex.quote(image_name)} | tr -d '\\n'
  printf %s {shlex.quote(after)}
}} | {_curl(connection, http_address)}"""


def _curl(connection: Connection, http_address: str) -> str:
    words = ["curl --silent --show-error --no-buffer --json @-"]
    if connection.token is not None:
        words.append('--header "Authorization: Bearer $TRIMSERVE_TOKEN"')
    tls = connection.tls
    if tls is not None:
        files = (("--cacert", tls.ca), ("--cert", tls.certificate), ("--key", tls.key))
        words += [f"{option} {shlex.quote(str(path))}" for option, path in files if path is not None]
    scheme = "http" if tls is None else "https"
    return " ".join([*words, shlex.quote(f"{scheme}://{http_address}/v1/chat/completions")]) + "\n"


def _body(request: pb.GenerateRequest, model_id: str, image_name: str | None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": _question(request)}]
    if image_name is not None:
        kind = mimetypes.guess_type(image_name)[0] or "image/png"  # the server looks at the content
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{_IMAGE}"}})
    sampling = request.sampling
    return {
        "model": model_id,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "stream": True,
        "trimserve": {"trim": MessageToDict(request.trim, preserving_proto_field_name=True)},
    }


def _question(request: pb.GenerateRequest) -> str:
    return request.chat.messages[-1].parts[-1].text


def _constructed(message: Message) -> str:
    """Python that makes a message of generation.proto."""
    fields = (f"{field.name}={_value(field, value)}" for field, value in message.ListFields())
    return f"pb.{message.DESCRIPTOR.name}({', '.join(fields)})"


def _value(field: FieldDescriptor, value: Any) -> str:
    if isinstance(value, Message):
        return _constructed(value)
    if field.enum_type is not None:
        return f"pb.{field.enum_type.values_by_number[value].name}"
    return repr(value)
