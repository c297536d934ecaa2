"""A tokenizer and processor in Llama 3.2 Vision's form, small enough to make in a test.

Byte-level BPE behind Llama 3's pre-tokenizer, its special tokens, a chat template with the same rules, and
`<|image|>` one past the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

__all__ = ["CHAT_TEMPLATE", "TinyTokens", "save_tiny_processor"]

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
END_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The rules of Llama 3.2 Vision's: a leading system message is trimmed and moves into a header with the date;
# with images there is no header, and a system message is an error; other messages are taken as they are.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- set system = "" %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- set ns = namespace(images=false) %}
{%- for message in messages %}
    {%- for part in message["content"] %}
        {%- if part["type"] == "image" %}{% set ns.images = true %}{% endif %}
    {%- endfor %}
{%- endfor %}
{%- if not ns.images %}
    {{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
    {{- "Today Date: " + date_string + "\\n\\n" + system + "<|eot_id|>" }}
{%- elif system != "" %}
    {{- raise_exception("Prompting with images is incompatible with system messages.") }}
{%- endif %}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
    {%- if message["content"] is string %}
        {{- message["content"] }}
    {%- else %}
        {%- for part in message["content"] %}
            {{- "<|image|>" if part["type"] == "image" else part["text"] }}
        {%- endfor %}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True)
class TinyTokens:
    """What a model config has to agree with."""

    vocab_size: int
    """Rows of the logits; all tokens but `<|image|>` are below."""
    image_token_id: int
    bos: int
    eos_ids: tuple[int, ...]


def save_tiny_processor(directory: Path, *, tile_size: int, max_tiles: int) -> TinyTokens:
    """Write tokenizer files and `preprocessor_config.json`, as `AutoTokenizer` and `AutoProcessor` read them.

    Args:
        directory: created if missing.
        tile_size: pixels along the side of one tile.
        max_tiles: tiles of one image.
    """
    tokenizer = _train_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        processor_class="MllamaProcessor",
    ).save_pretrained(directory)
    image_processor = MllamaImageProcessorPil(size={"height": tile_size, "width": tile_size}, max_image_tiles=max_tiles)
    image_processor.save_pretrained(directory)
    ids = tokenizer.get_vocab()
    return TinyTokens(
        vocab_size=ids["<|image|>"],
        image_token_id=ids["<|image|>"],
        bos=ids["<|begin_of_text|>"],
        eos_ids=tuple(ids[token] for token in END_TOKENS),
    )


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL_TOKENS, "<|image|>")])
    bos_id = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos_id)]
    )
    return tokenizer


def _sentences() -> Iterator[str]:
    for color in ("red", "green", "blue"):
        for shape in ("circle", "square", "triangle"):
            yield f"What is the color of the {shape}?\n\nThe {shape} is {color}."
            yield f"How many {color} {shape}s are there? There are 12 {color} {shape}s,\n345 in all."
            yield "Today Date: Cutting Knowledge: system user assistant"
