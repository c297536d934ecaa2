"""A packed batch shows the model what single prompts, as serving makes them, would show it."""

import random
from typing import Any

import pytest
import torch
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from training.batches import Batcher
from training.examples import example_rng, generate_example
from training.mended import mend
from training.model import encode_images, make_model
from training.patches import patch_labels
from training.scenes import COLOURS, SHAPES
from training.tokenizer import IMAGE_TOKEN, make_processor

PROCESSOR = make_processor()
IMAGE_ID = PROCESSOR.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def test_a_packed_question_gets_the_logits_of_the_same_question_alone() -> None:
    model = mend(make_model(3)).eval()
    batch = next(
        batch
        for batch in (Batcher(PROCESSOR).make(random.Random(seed), "train", 1) for seed in range(100))
        if batch.position_ids[0].tolist() != list(range(batch.position_ids.shape[1])) and "text_only" not in batch.kinds
    )
    mask = torch.zeros(batch.attention_mask.shape).masked_fill(~batch.attention_mask, -1e9)
    with torch.no_grad():
        features = encode_images(model, batch.pixel_values, batch.aspect_ratio_ids, batch.aspect_ratio_mask)
        packed = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=mask,
            cross_attention_states=features,
            cross_attention_mask=batch.cross_attention_mask,
        ).logits[0]
        prefix = int((batch.input_ids[0] == IMAGE_ID).nonzero()[0, 0]) + 1
        starts = (batch.position_ids[0] == prefix).nonzero()[:, 0].tolist()
        assert len(starts) == len(batch.kinds) > 1
        for start, end in zip(starts, [*starts[1:], batch.input_ids.shape[1]], strict=True):
            rows = [*range(prefix), *range(start, end)]
            alone = model(
                input_ids=batch.input_ids[:, rows],
                pixel_values=batch.pixel_values,
                aspect_ratio_ids=batch.aspect_ratio_ids,
                aspect_ratio_mask=batch.aspect_ratio_mask,
                cross_attention_mask=batch.cross_attention_mask[:, rows],
            ).logits[0]
            assert torch.allclose(packed[rows], alone, atol=1e-4)


def test_packed_prompt_is_the_chat_template_s() -> None:
    for seed in range(20):
        batch = Batcher(PROCESSOR, num_turns=1).make(random.Random(seed), "train", 1)
        if "text_only" in batch.kinds:
            continue
        ids, labels = batch.input_ids[0], batch.labels[0]
        begin = int((labels >= 0).nonzero()[0, 0]) + 1
        prompt = PROCESSOR.tokenizer.decode(ids[:begin])
        question = prompt.split(IMAGE_TOKEN)[1].split("<|eot_id|>")[0]
        chat: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        rendered = PROCESSOR.apply_chat_template(chat, add_generation_prompt=True)
        assert PROCESSOR.tokenizer(rendered, add_special_tokens=False).input_ids == ids[:begin].tolist()
        assert PROCESSOR.tokenizer.decode(labels[labels >= 0]).endswith("<|eot_id|>")


@pytest.mark.parametrize("num_images", [1, 2])
def test_rows_see_the_images_that_the_processor_says(num_images: int) -> None:
    found = set()
    for seed in range(30):
        batch = Batcher(PROCESSOR, num_turns=1).make(random.Random(seed), "train", 1, num_images)
        segments_in_line = batch.position_ids[0].tolist() == list(range(batch.position_ids.shape[1]))
        if "text_only" in batch.kinds or not segments_in_line:
            continue
        ids = batch.input_ids[0].tolist()
        tiles = batch.aspect_ratio_mask.sum(-1).tolist()
        dense = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(ids, IMAGE_ID)], tiles, 4, len(ids)
        )
        assert torch.equal(batch.cross_attention_mask, torch.from_numpy(dense))
        found.add(len({i for i, token in enumerate(ids) if token == IMAGE_ID}))
    assert found == {num_images}


def test_text_only_chat_sees_no_image() -> None:
    batch = next(
        batch
        for batch in (Batcher(PROCESSOR).make(random.Random(seed), "train", 1) for seed in range(100))
        if "text_only" in batch.kinds
    )
    own = (batch.position_ids[0] == 0).nonzero()[1, 0]  # its positions start again
    end = int((batch.turns[0] == batch.kinds.index("text_only")).nonzero()[-1, 0]) + 2
    assert not batch.cross_attention_mask[0, own:end].any()
    assert not batch.attention_mask[0, 0, own:end, :own].any()


def test_patch_labels_cover_the_things() -> None:
    for index in range(30):
        example = generate_example(example_rng("train", 3, index), "train")
        marks, colours = patch_labels(example)
        assert marks.shape == colours.shape
        assert set(marks[colours < 0].tolist()) <= {0}
        assert example.scene is not None
        for thing in example.scene.things:
            covered = marks == 1 + SHAPES.index(thing.shape)
            assert (colours[covered] == list(COLOURS).index(thing.colour)).any()
