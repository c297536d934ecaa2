"""Chat messages into token ids, by the checkpoint's own chat template.

What a message says is text and nothing else. The template is rendered with a placeholder for each message
text, special tokens are recognised only in what the template itself wrote, and only then do the texts come
back. Runs of text between two special tokens, the template's and the messages' together, are tokenised as
one, as transformers does: the ids are transformers' own unless a text contains a special token. It knows
nothing about pixels.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trimserve.api.prompt import ImageFile, Message, Part
from trimserve.errors import InvalidRequest

__all__ = ["ROLES", "ChatEncoder"]

ROLES: Final = ("system", "user", "assistant")
"""Who can speak; the template has the last word on the order."""

# Private-use characters around a number: nothing that a template trims, changes the case of or escapes. A
# user cannot forge one: of message text only white space enters the rendered string.
_OPEN, _CLOSE = "\ue000", "\ue001"


class ChatEncoder:
    """Renders and tokenises conversations; stateless after construction and thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, template_date: str) -> None:
        """Take the chat template and the vocabulary of a tokenizer.

        Args:
            tokenizer: a fast tokenizer, read only.
            image_token_id: id of `<|image|>`, treated as a special token even if the tokenizer does not.
            template_date: what the template shows as today's date, such as `26 Jul 2024`.
        """
        backend: Tokenizer = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        control = {id_: token for id_, token in added.items() if token.special or id_ == image_token_id}
        self._template = tokenizer
        self._date = template_date
        self._control_ids = {token.content: id_ for id_, token in control.items()}
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        pieces = [rf"{_OPEN}\d+{_CLOSE}", *map(re.escape, longest_first)]
        self._pieces = re.compile(f"({'|'.join(pieces)})")

        # A copy, because whether special tokens are recognised is a property of the whole tokenizer.
        self._plain = Tokenizer.from_str(backend.to_str())
        self._plain.no_truncation()
        self._plain.no_padding()
        self._plain.add_special_tokens(list(control.values()))
        self._plain.encode_special_tokens = True

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Render the messages and the header of the answer to come.

        A message of text alone is given to the template as a string, one with images as a list of parts, as
        transformers' users do.

        Returns:
            Token ids, with exactly the special tokens that the template writes.
        Raises:
            InvalidRequest: no messages or parts, an unknown role, no chat template, or an error raised by it.
        """
        if not messages:
            raise InvalidRequest("chat.messages", "must have at least one message, got 0")
        if self._template.chat_template is None:
            raise InvalidRequest("chat", "this checkpoint has no chat template: send raw_prompt instead")
        texts: list[str] = []
        conversation = [_to_template(index, message, texts) for index, message in enumerate(messages)]
        try:
            rendered = self._template.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, date_string=self._date
            )
        except (TemplateError, TypeError) as error:  # TypeError: the template takes no list of parts
            raise InvalidRequest("chat.messages", f"the chat template refuses them: {error}") from error
        return self._tokenize(str(rendered), texts)

    def _tokenize(self, rendered: str, texts: Sequence[str]) -> list[int]:
        token_ids: list[int] = []
        run: list[str] = []
        for piece in self._pieces.split(rendered):
            if piece in self._control_ids:
                token_ids += self._encode_text("".join(run))
                token_ids.append(self._control_ids[piece])
                run.clear()
            elif piece.startswith(_OPEN):
                run.append(texts[int(piece.strip(_OPEN + _CLOSE))])
            else:
                run.append(piece)
        return token_ids + self._encode_text("".join(run))

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids


def _to_template(index: int, message: Message, texts: list[str]) -> dict[str, Any]:
    """Give a message the template's form, its texts moved to the end of `texts`."""
    if message.role not in ROLES:
        expected = ", ".join(ROLES)
        field = f"chat.messages[{index}].role"
        raise InvalidRequest(field, f"must be one of {expected}, got {message.role!r}")
    if not message.parts:
        raise InvalidRequest(f"chat.messages[{index}].parts", "must have at least one part, got 0")
    parts = [_part_to_template(part, texts) for part in message.parts]
    if any(part["type"] == "image" for part in parts):
        return {"role": message.role, "content": parts}
    return {"role": message.role, "content": "".join(part["text"] for part in parts)}


def _part_to_template(part: Part, texts: list[str]) -> dict[str, str]:
    if isinstance(part, ImageFile):
        return {"type": "image"}
    return {"type": "text", "text": _set_aside(part.text, texts)}


def _set_aside(text: str, texts: list[str]) -> str:
    # White space at the ends stays, so that a template can trim it; a text of nothing else stays empty to it.
    core = text.strip()
    if not core:
        return text
    texts.append(core)
    return text.replace(core, f"{_OPEN}{len(texts) - 1}{_CLOSE}", 1)
