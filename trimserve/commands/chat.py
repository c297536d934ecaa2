"""`trimserve chat`: a conversation in the terminal."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final

import grpc

from trimserve.client import Client, make_request
from trimserve.commands import question
from trimserve.commands.server import OWN_SERVER, asked_server
from trimserve.config import Config
from trimserve.connection import Connection, with_connection
from trimserve.errors import InvalidRequest
from trimserve.image_files import named_files, read_image
from trimserve.knobs import adapter_of, with_knobs
from trimserve.refusal import Refusal
from trimserve.v1 import generation_pb2 as pb

__all__ = ["Conversation", "chat"]

_HELP: Final = """\
/image PATH   show this image with the next question; may be given again
/again        forget everything said and shown
/help         list these commands
/quit         end, as Ctrl-D does
Anything else is said to the model. Ctrl-C stops an answer."""


@with_knobs("model")
@with_connection(OWN_SERVER)
def chat(
    image: question.ImageNames = None,
    system: question.System = None,
    policy: question.Policy = None,
    keep: question.Keep = None,
    k_ratio: question.KRatio = None,
    merge_ratio: question.MergeRatio = None,
    no_trim: question.NoTrim = False,
    max_new_tokens: question.MaxNewTokens = None,
    temperature: question.Temperature = None,
    seed: question.Seed = None,
    adapter: question.Adapter = None,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Talk with the model in this terminal; /help lists what it understands beside questions."""
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    trim = question.trim_options(policy, keep, k_ratio, merge_ratio, no_trim=no_trim)
    name, config = adapter_of(adapter, config, is_served=connection.address is not None)
    with asked_server(connection, config) as client:
        conversation = Conversation(client, system, sampling, trim, name)
        for path in image or []:
            conversation.show(path)
        is_person = sys.stdin.isatty()
        if is_person:
            print("/help lists commands, Ctrl-D ends.", file=sys.stderr)
            with suppress(ImportError):
                import readline  # noqa: F401  # gives `input` history and editing
        for line in _lines("> " if is_person else ""):
            if not _turn(conversation, line):
                return


def _lines(sign: str) -> Iterator[str]:
    """What is typed, until it ends; Ctrl-C gives up a line."""
    while True:
        try:
            line = input(sign).strip()
        except EOFError:
            if sign:
                print()
            return
        except KeyboardInterrupt:
            print()
            if not sign:
                return
            continue
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                "standard input", f"must be UTF-8, got byte {error.object[error.start]:#04x}"
            ) from None
        if line:
            yield line


def _turn(conversation: "Conversation", line: str) -> bool:
    """Do what a line says; False ends the conversation."""
    command, _, rest = line.partition(" ")
    try:
        match command:
            case "/quit" | "/exit":
                return False
            case "/help":
                print(_HELP)
            case "/again":
                conversation.forget()
            case "/image":
                conversation.show(rest.strip())
            case _ if command.startswith("/") and command[1:].isalpha():
                print(f"{command} is no command; /help lists them", file=sys.stderr)
            case _:
                conversation.say(line, lambda text: print(text, end="", flush=True))
                print()
    except InvalidRequest as error:
        print(f"error: {error}", file=sys.stderr)
    except grpc.RpcError as error:
        refusal = Refusal.of(error)
        if not refusal.reason:  # the server cannot be reached
            raise
        print(refusal, file=sys.stderr)
    return True


class Conversation:
    """What was said and shown so far; a turn that fails leaves no trace."""

    def __init__(
        self,
        client: Client,
        system: str | None,
        sampling: pb.SamplingParams,
        trim: pb.TrimOptions,
        adapter: str | None = None,
    ) -> None:
        """Begin.

        Args:
            client: connected.
            system: text of a system message.
            sampling: of every answer.
            trim: of every answer.
            adapter: name of the one that answers; None is the base model.
        """
        self._client = client
        self._system = system
        self._sampling = sampling
        self._trim = trim
        self._adapter = adapter
        self._messages: list[pb.Message] = []
        self._names: list[str] = []
        self._shown: dict[str, bytes] = {}

    def forget(self) -> None:
        """Begin again."""
        self._messages, self._names, self._shown = [], [], {}

    def show(self, name: str) -> None:
        """Add an image to the next question.

        Args:
            name: path of its file.
        Raises:
            InvalidRequest: it cannot be read.
        """
        if not name:
            raise InvalidRequest("/image", "must be followed by the path of an image file")
        self._shown[name] = read_image(name)

    def say(self, text: str, on_text: Callable[[str], None]) -> None:
        """Ask, and remember the question with the answer.

        Args:
            text: the question.
            on_text: called with each piece of the answer. Ctrl-C stops it there, and what was said is remembered.
        Raises:
            InvalidRequest: the server refuses an image, which is shown no more.
            grpc.RpcError: any status but OK.
        """
        parts = [pb.Part(image=pb.Image(data=content)) for content in self._shown.values()]
        asked = pb.Message(role=pb.ROLE_USER, parts=[*parts, pb.Part(text=text)])
        names = [*self._names, *self._shown]
        self._shown = {}
        answer = self._answer([*self._messages, asked], names, on_text)
        if not answer:
            return
        replied = pb.Message(role=pb.ROLE_ASSISTANT, parts=[pb.Part(text=answer)])
        self._messages += [asked, replied]
        self._names = names

    def _answer(self, messages: Sequence[pb.Message], names: Sequence[str], on_text: Callable[[str], None]) -> str:
        request = make_request(
            messages, system=self._system, sampling=self._sampling, trim=self._trim, adapter=self._adapter
        )
        pieces: list[str] = []
        with suppress(KeyboardInterrupt), named_files(request, names):
            for event in self._client.stream(request):
                pieces.append(event.delta.text)
                on_text(event.delta.text)
        return "".join(pieces)
