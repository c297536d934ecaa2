"""The tokenizer and processor: byte-level BPE with Llama 3's pre-tokenizer, special tokens and chat template.

The vocabulary is trained on text such as the generator's, so a question is a dozen tokens. That text is a
file, `tokenizer_text.txt`, and not the generator, because token ids are part of the checkpoint's format and
the generator may change. It has no digits and no words in capitals: numbers and printed words are read sign
by sign. Every byte is a token, so any text has a tokenisation.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MllamaImageProcessorPil, MllamaProcessor, PreTrainedTokenizerFast

from training.scenes import TILE_SIZE

__all__ = [
    "IMAGE_TOKEN",
    "NUM_TEXT_TOKENS",
    "SPECIAL_TOKENS",
    "VOCAB_SIZE",
    "make_processor",
    "make_tokenizer",
]

_FOLDER = Path(__file__).parent

_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's, as it stands in Meta's tokenizer.json."""

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_2|>",
    "<|reserved_special_token_3|>",
    "<|reserved_special_token_4|>",
    "<|reserved_special_token_5|>",
    "<|reserved_special_token_6|>",
)
"""In the order of Meta's checkpoints, after the text tokens."""

IMAGE_TOKEN = "<|image|>"
"""Its id is the vocabulary's size: in the embedding table, outside the logits."""

NUM_TEXT_TOKENS = 624
VOCAB_SIZE = NUM_TEXT_TOKENS + len(SPECIAL_TOKENS)
"""Rows of the logits."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same text gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TEXT_TOKENS, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([(_FOLDER / "tokenizer_text.txt").read_text()], trainer)
    if tokenizer.get_vocab_size() != NUM_TEXT_TOKENS:
        raise ValueError(f"the text gave {tokenizer.get_vocab_size()} tokens, wanted {NUM_TEXT_TOKENS}")
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (*SPECIAL_TOKENS, IMAGE_TOKEN)]
    )
    begin = ("<|begin_of_text|>", NUM_TEXT_TOKENS)
    template = processors.TemplateProcessing(
        single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]}:1 $B:1", special_tokens=[begin]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
    )


def make_processor() -> MllamaProcessor:
    """Tokenizer, chat template and image processor together, as serving loads them."""
    image_processor = MllamaImageProcessorPil(
        size={"height": TILE_SIZE, "width": TILE_SIZE},
        max_image_tiles=4,
        image_mean=[0.48145466, 0.4578275, 0.40821073],
        image_std=[0.26862954, 0.26130258, 0.27577711],
    )
    template = (_FOLDER / "chat_template.jinja").read_text()
    return MllamaProcessor(image_processor, make_tokenizer(), chat_template=template)
