"""A checkpoint's chat template: where it is found, and how a conversation has to be given to it.

Templates of Mllama checkpoints disagree on the content of a message: some read a string, some a list of parts, some
either, and one that gets the wrong form mostly writes nothing instead of failing. So a conversation is rendered in the
first form in which every text of it arrives, and the template is tried once at load. Tokens are not known here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

from transformers import MllamaProcessor, PreTrainedTokenizerBase

from trimserve.errors import CheckpointError, InvalidRequest
from trimserve.model.json_object import read_json

__all__ = ["ROLES", "TEMPLATE_DATE", "ChatTemplate", "TemplateMessage"]

ROLES: Final = ("system", "user", "assistant")
"""Who can speak; the template has the last word on the order."""

_FORMS: Final = tuple(product((True, False), repeat=len(ROLES)))
"""For each role, whether its messages of text alone are given as a string; strings first, as transformers' users do."""

TEMPLATE_DATE: Final = "26 Jul 2024"
"""What the template shows as today's date: what it shows by itself where nobody names one."""

_STRINGIFIED = re.compile(r"""["']type["']: ?["'](text|image)["']""")
"""What a list of parts looks like where a template takes it for a string."""

_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
"""Half of a surrogate pair, which escapes can write and no encoding of text has."""


@dataclass(frozen=True, slots=True)
class TemplateMessage:
    """A message in transformers' form."""

    role: str
    parts: tuple[Mapping[str, str], ...]
    """`{"type": "text", "text": ...}` or `{"type": "image"}`, at least one."""

    @property
    def texts(self) -> list[str]:
        """Of its parts, in order."""
        return [part["text"] for part in self.parts if part["type"] == "text"]

    @property
    def has_image(self) -> bool:
        """Whether there is an image among its parts."""
        return len(self.texts) < len(self.parts)

    def content(self, *, as_string: bool) -> str | list[dict[str, str]]:
        """What the template gets; with an image always parts."""
        if as_string and not self.has_image:
            return "".join(self.texts)
        return [dict(part) for part in self.parts]


def _conversation(*roles: str, with_image: bool = False) -> tuple[TemplateMessage, ...]:
    """One message of each role, each with a text of its own, and an image in the first."""
    texts = [{"type": "text", "text": f"\ue000{position}\ue001"} for position in range(len(roles))]
    image = ({"type": "image"},) if with_image else ()
    return tuple(
        TemplateMessage(role, (*(image if position == 0 else ()), text))
        for position, (role, text) in enumerate(zip(roles, texts, strict=True))
    )


_PROBES: Final = (
    _conversation("user"),
    _conversation("system", "user"),
    _conversation("user", "assistant", "user"),
    _conversation("user", with_image=True),
    _conversation("user", "assistant", "user", with_image=True),
)


class ChatTemplate:
    """Renders conversations; stateless after construction and thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, template: str, date: str) -> None:
        """Take a template and try it.

        Args:
            tokenizer: whose special tokens the template may name.
            source: where the template was found, for messages.
            template: in Jinja.
            date: what the template shows as today's date, such as `26 Jul 2024`.
        Raises:
            CheckpointError: it fails, or drops what is said, in each of a few plain conversations.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._date = date
        self._forms = sorted(_FORMS, key=self._failures)  # stable: strings stay first
        if self._failures(self._forms[0]) == len(_PROBES):
            try:
                self._render(_PROBES[0], self._forms[0])
            except InvalidRequest as error:
                raise CheckpointError(f"{source}: the chat template cannot be used: {error.message}") from error

    @classmethod
    def read(cls, folder: Path, tokenizer: PreTrainedTokenizerBase, date: str) -> "ChatTemplate | None":
        """Find a checkpoint's template where transformers' processor finds it, else where its tokenizer does.

        That is `chat_template` of `processor_config.json`, then `chat_template.json`, then `chat_template.jinja`, then
        `chat_template` of `tokenizer_config.json`.

        Args:
            folder: of the checkpoint.
            tokenizer: of the checkpoint.
            date: see the constructor.
        Returns:
            None if there is no template.
        Raises:
            CheckpointError: a file that cannot be read, several templates of which none is the default, or one that
                cannot be used.
        """
        try:
            found = MllamaProcessor.get_processor_dict(folder)[0]
        except Exception as error:  # transformers raises whatever it meets in a broken file
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder}: cannot read the chat template: {reason}") from error
        template = found.get("chat_template")
        source = _source(folder)
        if template is None:
            template, source = tokenizer.chat_template, folder / "tokenizer_config.json"
        if template is None:
            return None
        return cls(tokenizer, str(source), _default(source, template), date)

    def render(self, messages: Sequence[TemplateMessage]) -> str:
        """Render a conversation and the header of the answer to come.

        Args:
            messages: at least one; every text is in what comes back, but for white space at its ends.
        Raises:
            InvalidRequest: the template refuses the conversation, fails, or drops a text in each form.
        """
        roles = {message.role for message in messages if not message.has_image}
        errors: dict[tuple[bool, ...], InvalidRequest] = {}
        for form in self._forms:
            difference = tuple(as_string for role, as_string in zip(ROLES, form, strict=True) if role in roles)
            if difference not in errors:
                try:
                    return self._render(messages, form)
                except InvalidRequest as error:
                    errors[difference] = error
        raise next(iter(errors.values()))

    def _failures(self, form: tuple[bool, ...]) -> int:
        """How many of the probes do not arrive in a form."""
        failures = 0
        for probe in _PROBES:
            try:
                self._render(probe, form)
            except InvalidRequest:
                failures += 1
        return failures

    def _render(self, messages: Sequence[TemplateMessage], form: tuple[bool, ...]) -> str:
        as_string = dict(zip(ROLES, form, strict=True))
        conversation: list[dict[str, Any]] = [
            {"role": message.role, "content": message.content(as_string=as_string[message.role])}
            for message in messages
        ]
        try:
            rendered = str(
                self._tokenizer.apply_chat_template(
                    conversation,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=True,
                    date_string=self._date,
                )
            )
        except Exception as error:  # a template can raise whatever Python does
            raise InvalidRequest("chat.messages", f"the chat template refuses them: {error}") from error
        if half := _HALF_PAIR.search(rendered):
            written = f"\\u{ord(half[0]):x}"
            raise InvalidRequest("chat.messages", f"the chat template writes {written}, half of a surrogate pair")
        if _STRINGIFIED.search(rendered):
            raise InvalidRequest("chat.messages", "the chat template takes text alone where they have an image")
        position = 0
        for index, message in enumerate(messages):
            for text in map(str.strip, message.texts):
                position = max(rendered.find(text, position), rendered.find(text, 0, position))  # mostly in order
                if position < 0:
                    raise InvalidRequest(f"chat.messages[{index}]", f"the chat template drops what {message.role} says")
        return rendered


def _source(folder: Path) -> Path:
    """Which of the files that the processor reads holds the template; see `ChatTemplate.read`."""
    config, legacy = folder / "processor_config.json", folder / "chat_template.json"
    if config.exists() and read_json(config).get("chat_template") is not None:
        return config
    return legacy if legacy.exists() else folder / "chat_template.jinja"


def _default(source: Path, template: object) -> str:
    """The template for plain conversations, among named ones `default`."""
    if isinstance(template, Mapping):
        if "default" not in template:
            names = ", ".join(map(str, template))
            raise CheckpointError(f"{source}: one of several chat templates must be named default, got {names}")
        template = template["default"]
    if not isinstance(template, str):
        raise CheckpointError(f"{source}: chat_template must be a string, got {type(template).__name__}")
    return template
