"""Chat messages into token ids, by the checkpoint's own chat template.

What a message says is text and nothing else. The template is rendered with a placeholder for each message
text, special tokens are recognised only in what the template itself wrote, and only then do the texts come
back. Runs of text between two special tokens, the template's and the messages' together, are tokenised as
one, as transformers does: the ids are transformers' own unless a text contains a special token. It knows
nothing about pixels.
"""

import re
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trimserve.api.prompt import ImageFile, Message, Part
from trimserve.errors import InvalidRequest
from trimserve.model.chat_template import ROLES, ChatTemplate, TemplateMessage

__all__ = ["ChatEncoder"]

# Private-use characters around a number: nothing that a template trims, changes the case of or escapes. A
# user cannot forge one: of message text only white space enters the rendered string.
_OPEN, _CLOSE = "\ue000", "\ue001"


class ChatEncoder:
    """Renders and tokenises conversations; stateless after construction and thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, template: ChatTemplate | None) -> None:
        """Take the vocabulary of a tokenizer, and a chat template.

        Args:
            tokenizer: a fast tokenizer, read only.
            image_token_id: id of `<|image|>`, treated as a special token even if the tokenizer does not.
            template: None if the checkpoint has none; then every conversation is refused.
        """
        backend: Tokenizer = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        control = {id_: token for id_, token in added.items() if token.special or id_ == image_token_id}
        self._template = template
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

        Returns:
            Token ids, with exactly the special tokens that the template writes.
        Raises:
            InvalidRequest: no messages or parts, an unknown role, no chat template, or `ChatTemplate.render` refuses.
        """
        if not messages:
            raise InvalidRequest("chat.messages", "must have at least one message, got 0")
        if self._template is None:
            raise InvalidRequest("chat", "this checkpoint has no chat template: send raw_prompt instead")
        texts: list[str] = []
        conversation = [_to_template(index, message, texts) for index, message in enumerate(messages)]
        return self._tokenize(self._template.render(conversation), texts)

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


def _to_template(index: int, message: Message, texts: list[str]) -> TemplateMessage:
    """Give a message the template's form, its texts moved to the end of `texts`."""
    if message.role not in ROLES:
        expected = ", ".join(ROLES)
        field = f"chat.messages[{index}].role"
        raise InvalidRequest(field, f"must be one of {expected}, got {message.role!r}")
    if not message.parts:
        raise InvalidRequest(f"chat.messages[{index}].parts", "must have at least one part, got 0")
    return TemplateMessage(message.role, tuple(_part_to_template(part, texts) for part in message.parts))


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
