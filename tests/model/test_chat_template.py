"""Where the chat template is found, as transformers' processor finds it, and the form that it is given messages in."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from tests.model.tiny_tokenizer import CHAT_TEMPLATE, save_tiny_processor
from trimserve.errors import CheckpointError, InvalidRequest
from trimserve.model.chat_template import ChatTemplate, TemplateMessage

DATE = "1 Feb 2025"
IMAGE = {"type": "image"}

# Writes a role and what was said, in the way that a case names.
TURN = "{{% for m in messages %}}<{{{{ m['role'] }}}}>{}{{% endfor %}}"
STRINGS = TURN.format("{{ m['content'] + '' }}")
PARTS = TURN.format(
    "{% for p in m['content'] %}{{ '<|image|>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
)  # raises nothing with a string, whose characters have no text
EITHER = TURN.format(
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ '<|image|>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
)
SYSTEM_AS_STRING = PARTS.replace(
    "{% for p", "{% if m['role'] == 'system' %}{{ m['content'] | trim }}{% else %}{% for p"
)
SYSTEM_AS_STRING = SYSTEM_AS_STRING.replace("{% endfor %}{% endfor %}", "{% endfor %}{% endif %}{% endfor %}")
PARTS_BESIDE_IMAGES = (  # parts in every message as soon as one has an image, strings else
    "{% set ns = namespace(images=false) %}{% for m in messages %}{% for p in m['content'] if p is mapping %}"
    "{% if p['type'] == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}{% endfor %}"
    "{% if ns.images %}" + PARTS + "{% else %}" + STRINGS + "{% endif %}"
)
NEEDS_A_SYSTEM_MESSAGE = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with system') }}{% endif %}"
WRITES_PARTS_OUT = TURN.format("{{ m['content'] }}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small files of a checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_processor(folder, tile_size=28, max_tiles=4)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def turn(role: str, *parts: str | dict[str, str]) -> TemplateMessage:
    """A message whose texts are given as themselves."""
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return TemplateMessage(role, tuple(texts))


TEXTS = (turn("user", "FIRST"), turn("assistant", "SECOND"), turn("user", "THIRD"))
WITH_IMAGE = (turn("user", IMAGE, "FIRST"), turn("assistant", "SECOND"), turn("user", "THIRD"))
WITH_SYSTEM = (turn("system", "ZEROTH"), *WITH_IMAGE)


@pytest.mark.parametrize(
    ("template", "conversation", "expected"),
    [
        (STRINGS, TEXTS, "<user>FIRST<assistant>SECOND<user>THIRD"),
        (PARTS, TEXTS, "<user>FIRST<assistant>SECOND<user>THIRD"),
        (EITHER, TEXTS, "<user>FIRST<assistant>SECOND<user>THIRD"),
        (PARTS, WITH_IMAGE, "<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (EITHER, WITH_IMAGE, "<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (PARTS, WITH_SYSTEM, "<system>ZEROTH<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (SYSTEM_AS_STRING, WITH_SYSTEM, "<system>ZEROTH<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (PARTS_BESIDE_IMAGES, TEXTS, "<user>FIRST<assistant>SECOND<user>THIRD"),
        (PARTS_BESIDE_IMAGES, WITH_IMAGE, "<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (NEEDS_A_SYSTEM_MESSAGE + PARTS, WITH_SYSTEM, "<system>ZEROTH<user><|image|>FIRST<assistant>SECOND<user>THIRD"),
        (STRINGS, (turn("user", "one", "two"),), "<user>onetwo"),
        (WRITES_PARTS_OUT, TEXTS, "<user>FIRST<assistant>SECOND<user>THIRD"),
        (TURN.format("{{ m['content'] | trim }}"), (turn("user", "  "), turn("user", " x ")), "<user><user>x"),
        (TURN.format("{{ strftime_now('') }}{{ m['content'] }}"), (turn("user", "x"),), "<user>x"),
    ],
)
def test_every_text_arrives_in_the_form_that_the_template_reads(
    tokenizer: PreTrainedTokenizerBase, template: str, conversation: tuple[TemplateMessage, ...], expected: str
) -> None:
    assert ChatTemplate(tokenizer, "test", template, DATE).render(conversation) == expected


def test_a_message_of_text_is_a_string_where_the_template_reads_both(tokenizer: PreTrainedTokenizerBase) -> None:
    told = ChatTemplate(tokenizer, "test", EITHER + "{{ messages[0]['content'] is string }}", DATE)
    assert told.render(TEXTS).endswith("True")


DROPS_ASSISTANTS = "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}"
SOMETIMES = "{% if messages | length == 2 %}{{ failing }}{% endif %}" + EITHER


@pytest.mark.parametrize(
    ("template", "conversation", "field", "message"),
    [
        (DROPS_ASSISTANTS, TEXTS, "chat.messages[1]", "drops what assistant says"),
        ("{{ messages[0]['content'] }}", TEXTS[1:], "chat.messages[1]", "drops what user says"),
        (STRINGS, WITH_IMAGE, "chat.messages", "can only concatenate list"),
        (WRITES_PARTS_OUT, WITH_IMAGE, "chat.messages", "takes text alone where they have an image"),
        (NEEDS_A_SYSTEM_MESSAGE + EITHER, TEXTS, "chat.messages", "begin with system"),
        *[
            (SOMETIMES.replace("failing", failing), TEXTS[:2], "chat.messages", message)
            for failing, message in (
                ("raise_exception('no two')", "no two"),  # TemplateError
                ("nothing.at.all", "'nothing' is undefined"),  # UndefinedError
                ("'a'.index('z')", "substring not found"),  # ValueError
                ("{}['key'] + 1", "has no attribute 'key'"),
                ("1 + 'a'", "unsupported operand"),  # TypeError
                ("1 // 0", "by zero"),  # ZeroDivisionError
                ("messages.append(1)", "is unsafe"),  # SecurityError
                ("range(10 ** 9)", "Range too big"),  # OverflowError
                ("messages | nofilter", "No filter named 'nofilter'"),  # at run time
            )
        ],
    ],
)
def test_what_a_template_does_not_take_is_the_requests_error(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversation: tuple[TemplateMessage, ...],
    field: str,
    message: str,
) -> None:
    loaded = ChatTemplate(tokenizer, "test", template, DATE)
    with pytest.raises(InvalidRequest) as caught:
        loaded.render(conversation)
    assert caught.value.field == field
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "drops what user says"),
        ("hello", "drops what user says"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].nothing.at_all }}", "has no attribute 'nothing'"),
        ("{{ messages[0]['content'].index('zzz') }}", "substring not found"),
        ("{{ raise_exception('never') }}", "never"),
    ],
)
def test_a_template_that_takes_no_conversation_is_refused_at_load(
    tokenizer: PreTrainedTokenizerBase, template: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match="some file: the chat template cannot be used: ") as caught:
        ChatTemplate(tokenizer, "some file", template, DATE)
    assert message in str(caught.value)


def named(name: str) -> str:
    """A template that tells which one it is."""
    return f"{{{{ '{name}: ' }}}}" + EITHER


def write(name: str, content: object) -> Callable[[Path], object]:
    """Writes a file of a checkpoint."""
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def in_tokenizer(template: object) -> Callable[[Path], object]:
    """Puts a template into `tokenizer_config.json`."""

    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))

    return change


def additional(folder: Path) -> None:
    """Puts a named template beside."""
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text(named("rag"))


RAW = write("chat_template.jinja", named("jinja"))
LEGACY = write("chat_template.json", {"chat_template": named("json")})
CONFIG = write("processor_config.json", {"processor_class": "MllamaProcessor", "chat_template": named("config")})
TOKENIZER = in_tokenizer(named("tokenizer"))
# transformers leaves the files of additional templates to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
NAMES = [{"name": "rag", "template": named("rag")}, {"name": "default", "template": named("named")}]


@pytest.fixture
def variant(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder without a template, and then what a case says."""

    def make(*changes: Callable[[Path], object]) -> Path:
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
        (tmp_path / "chat_template.jinja").unlink()
        for change in changes:
            change(tmp_path)
        return tmp_path

    return make


@leaves_files_open
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ((RAW,), "jinja"),
        ((RAW, TOKENIZER), "jinja"),
        ((LEGACY,), "json"),
        ((LEGACY, TOKENIZER), "json"),
        ((LEGACY, RAW, TOKENIZER), "json"),
        ((CONFIG, LEGACY, RAW, TOKENIZER), "config"),
        ((write("processor_config.json", {"chat_template": None}), RAW), "jinja"),
        ((RAW, additional), "jinja"),
    ],
)
def test_the_template_is_the_one_that_transformers_processor_takes(
    variant: Callable[..., Path], changes: tuple[Callable[[Path], object], ...], found: str
) -> None:
    folder = variant(*changes)
    conversation: list[dict[str, Any]] = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    expected = AutoProcessor.from_pretrained(folder).apply_chat_template(conversation, add_generation_prompt=True)
    assert expected.startswith(found)
    template = ChatTemplate.read(folder, AutoTokenizer.from_pretrained(folder), DATE)
    assert template is not None
    assert template.render([turn("user", IMAGE, "What?")]) == expected


@pytest.mark.parametrize(
    ("template", "found"), [(named("tokenizer"), "tokenizer"), (NAMES, "named"), (CHAT_TEMPLATE, "<|begin_of_text|>")]
)
def test_without_a_processors_template_the_tokenizers_is_taken(
    variant: Callable[..., Path], template: object, found: str
) -> None:
    folder = variant(in_tokenizer(template))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = ChatTemplate.read(folder, tokenizer, DATE)
    assert loaded is not None
    rendered = loaded.render(TEXTS)
    assert rendered.startswith(found)
    conversation = [{"role": message.role, "content": message.texts[0]} for message in TEXTS]
    theirs = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, date_string=DATE)
    assert rendered == theirs


def test_a_checkpoint_may_have_no_template(variant: Callable[..., Path]) -> None:
    folder = variant()
    assert ChatTemplate.read(folder, AutoTokenizer.from_pretrained(folder), DATE) is None


@leaves_files_open
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((in_tokenizer(NAMES[:1]),), r"tokenizer_config\.json: .* must be named default, got rag"),
        ((in_tokenizer({"rag": named("rag")}),), r"tokenizer_config\.json: .* must be named default, got rag"),
        ((additional,), r"one of several chat templates must be named default, got rag"),
        ((write("processor_config.json", {"chat_template": 5}),), r"processor_config\.json: .* a string, got int"),
        ((write("chat_template.json", {}),), "cannot read the chat template: KeyError: 'chat_template'"),
        ((write("chat_template.json", "{"),), "cannot read the chat template: "),
        ((LEGACY, additional), "cannot read the chat template: .*conflicting files"),
        ((write("chat_template.json", {"chat_template": "{% if"}),), r"chat_template\.json: the chat template cannot"),
        ((write("chat_template.jinja", "{% if"),), r"chat_template\.jinja: the chat template cannot be used"),
        ((write("chat_template.jinja", EITHER + r'{{ "\ud83d" }}'),), r"writes \\ud83d, half of a surrogate pair"),
        ((write("chat_template.json", {"chat_template": EITHER + "\ude00"}),), r"writes \\ude00, half of a surrogate"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_its_file(
    variant: Callable[..., Path], changes: tuple[Callable[[Path], object], ...], message: str
) -> None:
    folder = variant(*changes)
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.read(folder, AutoTokenizer.from_pretrained(folder), DATE)
