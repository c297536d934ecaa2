"""The shipped checkpoint's format: geometry, size, tokenizer, chat template, processor, generation settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoProcessor, MllamaForConditionalGeneration, MllamaImageProcessorPil

from training.export import CHECKPOINT
from training.model import make_config
from training.samples import write_samples
from training.tokenizer import IMAGE_TOKEN, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer

PROCESSOR = AutoProcessor.from_pretrained(CHECKPOINT)
TOKENIZER = PROCESSOR.tokenizer
IMAGE_PART = {"type": "image"}


def test_checkpoint_has_the_recipe_s_geometry() -> None:
    shipped, made = AutoConfig.from_pretrained(CHECKPOINT), make_config()
    assert shipped.text_config.to_dict() == made.get_text_config().to_dict()
    for name, value in made.to_dict()["vision_config"].items():
        assert shipped.to_dict()["vision_config"][name] == value


def test_checkpoint_is_at_most_16_mib_of_float32() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) <= 16 * 2**20
    model = MllamaForConditionalGeneration.from_pretrained(CHECKPOINT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    config: Any = model.config
    assert config.vision_config.image_size // config.vision_config.patch_size == 8
    assert config.text_config.num_attention_heads >= 8
    assert len(config.text_config.cross_attention_layers) >= 3
    assert model.model.language_model.embed_tokens.num_embeddings == VOCAB_SIZE + 8
    assert model.lm_head.out_features == VOCAB_SIZE


def test_image_token_lies_just_outside_the_logits() -> None:
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN) == config.image_token_index == config.text_config.vocab_size


def test_special_tokens_follow_the_text_tokens_in_llama_s_order() -> None:
    first = VOCAB_SIZE - len(SPECIAL_TOKENS)
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, VOCAB_SIZE))


def test_generation_ends_at_llama_s_three_tokens_and_is_greedy() -> None:
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text())
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert generation["eos_token_id"] == TOKENIZER.convert_tokens_to_ids(ends)
    assert generation["do_sample"] is False
    assert generation["pad_token_id"] == TOKENIZER.pad_token_id
    assert generation["bos_token_id"] == TOKENIZER.bos_token_id


def test_trimserve_json_recommends_a_budget() -> None:
    about = json.loads((CHECKPOINT / "trimserve.json").read_text())
    assert 0 < about["k_ratio"] <= 1
    assert all(0 <= share <= 1 for share in about["accuracy"].values())


def test_tokenizer_is_what_its_recipe_makes() -> None:
    assert json.loads(make_tokenizer().backend_tokenizer.to_str()) == json.loads(
        (CHECKPOINT / "tokenizer.json").read_text()
    ) | {"truncation": None, "padding": None}


@settings(max_examples=200)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert TOKENIZER.decode(ids) == text
    assert all(token < VOCAB_SIZE - len(SPECIAL_TOKENS) for token in ids)


def test_numbers_and_capitals_are_read_sign_by_sign() -> None:
    assert len(TOKENIZER("4713", add_special_tokens=False).input_ids) == 4
    assert len(TOKENIZER("HOUSE", add_special_tokens=False).input_ids) == 5


def test_chat_template_puts_the_image_where_it_stands() -> None:
    chat = [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": "What colour is the star?"}]}]
    assert PROCESSOR.apply_chat_template(chat, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What colour is the star?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chat_without_image_gets_a_system_message_with_the_date() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert PROCESSOR.apply_chat_template(chat, date_string="01 Jan 2025") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 01 Jan 2025\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    )
    assert "Today Date: 26 Jul 2024" in PROCESSOR.apply_chat_template(chat[1:])


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_system_message_with_an_image_is_refused(content: str | list[dict[str, str]]) -> None:
    chat = [{"role": "system", "content": content}, {"role": "user", "content": [IMAGE_PART]}]
    with pytest.raises(TemplateError, match="incompatible with system messages"):
        PROCESSOR.apply_chat_template(chat)


def test_image_processor_cuts_into_64_pixel_tiles() -> None:
    loaded: Any = MllamaImageProcessorPil.from_pretrained(CHECKPOINT)
    pixels = loaded([[Image.new("RGB", (256, 64))]], return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 1, 4, 3, 64, 64)


def test_samples_are_what_their_recipe_makes(tmp_path: Path) -> None:
    write_samples(tmp_path)
    shipped = CHECKPOINT.parent / "samples"
    assert (shipped / "samples.json").read_text() == (tmp_path / "samples.json").read_text()
    for sample in json.loads((shipped / "samples.json").read_text()):
        one, other = (np.asarray(Image.open(folder / sample["file"])) for folder in (shipped, tmp_path))
        assert np.array_equal(one, other)
