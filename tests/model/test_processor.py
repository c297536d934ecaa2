"""Prompts of all three kinds into ids and tiles, and what is refused on the way."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from transformers import AutoProcessor
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.model.tiny_tokenizer import TinyTokens, save_tiny_processor
from tests.model_info import SMALL
from trimserve.api.info import ModelInfo
from trimserve.api.prompt import (
    ChatPrompt,
    CloserPrompt,
    ImageFile,
    Message,
    PlainPrompt,
    Prompt,
    RawPrompt,
    Region,
    Text,
    TokenPrompt,
)
from trimserve.errors import CheckpointError, InvalidRequest
from trimserve.imaging.decode import Pixels
from trimserve.model.processor import Processor

TILE = 28
MAX_MODEL_LEN = 128
MAX_IMAGES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> TinyTokens:
    return save_tiny_processor(folder, tile_size=TILE, max_tiles=4)


@pytest.fixture(scope="module")
def info(tokens: TinyTokens) -> ModelInfo:
    return dataclasses.replace(
        SMALL,
        vocab_size=tokens.vocab_size,
        image_token_id=tokens.image_token_id,
        max_model_len=MAX_MODEL_LEN,
        max_images=MAX_IMAGES,
        tile_size=TILE,
        generation_defaults=dataclasses.replace(SMALL.generation_defaults, eos_token_ids=tokens.eos_ids),
    )


def load(folder: Path, info: ModelInfo) -> Processor:
    return Processor.from_pretrained(folder, info, max_image_pixels=10_000, template_date="1 Feb 2025")


@pytest.fixture(scope="module")
def processor(folder: Path, info: ModelInfo) -> Processor:
    return load(folder, info)


def picture(width: int = TILE, height: int = TILE, color: str = "red", field: str = "image") -> ImageFile:
    buffer = io.BytesIO()
    PilImage.new("RGB", (width, height), color).save(buffer, "PNG")
    return ImageFile(buffer.getvalue(), field)


RAW_TEXTS = [
    "What is this?",
    "<|image|>What is this?",
    "<|image|><|image|> and this?",
    "<|image|><|begin_of_text|>What is this?",
    "<|begin_of_text|><|image|>What is this?",
    "Before <|image|> after",
    " <|image|>",
]


@pytest.mark.parametrize("text", RAW_TEXTS)
def test_raw_prompt_encodes_as_transformers_does(processor: Processor, folder: Path, text: str) -> None:
    num_images = text.count("<|image|>")
    peer = AutoProcessor.from_pretrained(folder)
    images = [PilImage.new("RGB", (TILE, TILE))] * num_images or None
    theirs = peer(text=text, images=images, add_special_tokens=False)["input_ids"][0]
    prepared = processor.prepare(RawPrompt(text, (picture(),) * num_images))
    assert list(prepared.token_ids) == theirs
    assert prepared.token_ids.count(processor.tokenizer.token_to_id("<|begin_of_text|>")) == 1


def test_tokenizer_without_begin_of_text_adds_none(folder: Path, info: ModelInfo, tmp_path: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    del config["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    prepared = load(tmp_path, info).prepare(RawPrompt("What is this?"))
    assert prepared.token_ids == tuple(load(folder, info).prepare(RawPrompt("What is this?")).token_ids[1:])


def test_token_ids_are_taken_as_they_are(processor: Processor, tokens: TinyTokens) -> None:
    ids = (5, tokens.image_token_id, 7, 7)
    prepared = processor.prepare(TokenPrompt(ids, (picture(),)))
    assert prepared.token_ids == ids


def test_images_are_prepared_in_the_order_of_their_tokens(processor: Processor, folder: Path) -> None:
    first, second = picture(2 * TILE, TILE, "red"), picture(TILE, 3 * TILE, "blue")
    chat = ChatPrompt(
        (
            Message("user", (first, Text("What is this?"))),
            Message("assistant", (Text("A box."),)),
            Message("user", (Text("And"), second, Text("this?"))),
        )
    )
    prepared = processor.prepare(chat)
    assert [(image.tiles_high, image.tiles_wide) for image in prepared.images] == [(1, 2), (3, 1)]

    theirs = MllamaImageProcessorPil.from_pretrained(folder)
    for ours, source in zip(prepared.images, (first, second), strict=True):
        expected = theirs(PilImage.open(io.BytesIO(source.data)), return_tensors="pt")
        assert torch.equal(ours.pixel_values, expected["pixel_values"][0, 0])
        assert ours.aspect_ratio_id == expected["aspect_ratio_ids"].item()
        assert ours.num_tiles == expected["aspect_ratio_mask"].sum().item()


BAD_PROMPTS: list[tuple[Prompt, str, str]] = [
    (RawPrompt(""), "raw_prompt", "must not be empty"),
    (TokenPrompt(()), "prompt_token_ids", "must have at least 1 token, got 0"),
    (ChatPrompt(()), "chat.messages", "must have at least one message, got 0"),
    (
        RawPrompt("z" * 130),
        "raw_prompt",
        "must have at most 127 tokens (the context less one new token), got 131",
    ),
    (
        TokenPrompt((1,) * 128),
        "prompt_token_ids",
        "must have at most 127 tokens (the context less one new token), got 128",
    ),
    (
        TokenPrompt((1, 329)),
        "prompt_token_ids",
        "token ids must be in [0, 328) or the image token 328, got 329 at position 1",
    ),
    (
        TokenPrompt((-1,)),
        "prompt_token_ids",
        "token ids must be in [0, 328) or the image token 328, got -1 at position 0",
    ),
    (RawPrompt("hi", (picture(),)), "images", "must be as many as the prompt's image tokens, 0, got 1"),
    (
        RawPrompt("<|image|><|image|>hi", (picture(),)),
        "images",
        "must be as many as the prompt's image tokens, 2, got 1",
    ),
    (
        RawPrompt("<|image|>" * 4, (picture(),) * 4),
        "images",
        "must have at most 3 images, got 4",
    ),
    (
        ChatPrompt((Message("user", (picture(),) * 4),)),
        "chat.messages",
        "must have at most 3 images, got 4",
    ),
    (
        ChatPrompt((Message("system", (picture(),)), Message("user", (Text("Hi"),)))),
        "chat.messages",
        "the chat template takes text alone where they have an image",
    ),
    (
        RawPrompt("<|image|>", (ImageFile(b"no image at all", "images[0]"),) * 2),
        "images",
        "must be as many as the prompt's image tokens, 1, got 2",
    ),
]


@pytest.mark.parametrize(("prompt", "field", "message"), BAD_PROMPTS)
def test_prompts_are_refused_by_field_value_and_bound_before_an_image_is_opened(
    processor: Processor, prompt: Prompt, field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        processor.tokenize(prompt)
    assert (caught.value.field, caught.value.message) == (field, message)


def test_broken_pixels_are_refused_when_their_image_is_decoded(processor: Processor) -> None:
    cut = ImageFile(picture(90, 90).data[:-30], "images[1]")
    first, second = processor.tokenize(RawPrompt("<|image|><|image|>", (picture(), cut))).images
    prepared = processor.prepare_images([first, second])
    assert next(prepared).num_tiles == 1
    with pytest.raises(InvalidRequest, match="must be a complete, readable PNG image") as caught:
        next(prepared)
    assert caught.value.field == "images[1]"


BAD_IMAGES = [
    ((picture(), ImageFile(b"", "images[1]")), "images[1]", "must be an image file, got 0 bytes"),
    (
        (picture(200, 100, field="chat.messages[0].parts[1].image"),),
        "chat.messages[0].parts[1].image",
        "must have at most 10000 pixels, got 200 x 100 = 20000",
    ),
    (
        (picture(100, 70), picture(100, 70), picture(100, 70, field="images[2]")),
        "images[2]",
        "with the images before it must have at most 20000 pixels, got 21000",
    ),
]


@pytest.mark.parametrize(("images", "field", "message"), BAD_IMAGES)
def test_images_are_refused_by_field_value_and_bound(
    processor: Processor, images: tuple[ImageFile, ...], field: str, message: str
) -> None:
    prompt = RawPrompt("<|image|>" * len(images), images)
    assert processor.tokenize(prompt).images == images
    with pytest.raises(InvalidRequest) as caught:
        processor.prepare(prompt)
    assert (caught.value.field, caught.value.message) == (field, message)


def test_a_processor_can_have_its_images_decoded_elsewhere(folder: Path, info: ModelInfo) -> None:
    def decode(data: bytes, field: str) -> AbstractContextManager[Pixels]:
        assert (data, field) == (b"anything", "images[0]")
        return nullcontext(np.full((TILE, TILE, 3), 255, np.uint8))

    ours = Processor.from_pretrained(folder, info, max_image_pixels=10_000, template_date="", decode=decode)
    [prepared] = ours.prepare_images([ImageFile(b"anything", "images[0]")])
    [white] = load(folder, info).prepare_images([picture(color="white")])
    assert torch.equal(prepared.pixel_values, white.pixel_values)


def test_longest_prompt_leaves_room_for_one_token(processor: Processor) -> None:
    assert len(processor.prepare(TokenPrompt((1,) * (MAX_MODEL_LEN - 1))).token_ids) == MAX_MODEL_LEN - 1


@pytest.mark.parametrize(
    "make", [lambda text: RawPrompt(text), lambda text: ChatPrompt((Message("user", (Text(text),)),))]
)
def test_huge_text_is_refused_before_it_is_tokenised(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Prompt]
) -> None:
    monkeypatch.delattr(processor, "_tokenizer")
    monkeypatch.delattr(processor, "_chat")
    with pytest.raises(InvalidRequest, match="context of 128 tokens, got 2000000 characters"):
        processor.prepare(make("long word " * 200_000))


def test_ids_that_only_the_tokenizer_knows_are_refused(folder: Path, info: ModelInfo) -> None:
    smaller = dataclasses.replace(info, vocab_size=info.vocab_size - 1)  # <|python_tag|> has no logit now
    with pytest.raises(InvalidRequest, match=r"in \[0, 327\) or the image token 328, got 327 at position 2"):
        load(folder, smaller).prepare(RawPrompt("a<|python_tag|>"))


def test_preparing_in_many_threads_gives_the_same(processor: Processor) -> None:
    prompts = [
        ChatPrompt((Message("user", (picture(TILE * (1 + i % 4)), Text(f"<|eot_id|> {i}"))),)) for i in range(24)
    ]
    expected = [processor.prepare(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        for ours, alone in zip(pool.map(processor.prepare, prompts), expected, strict=True):
            assert ours.token_ids == alone.token_ids
            assert torch.equal(ours.images[0].pixel_values, alone.images[0].pixel_values)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "cannot load the tokenizer"),
        ("preprocessor_config.json", "cannot load the image processor"),
    ],
)
def test_missing_files_refuse_the_checkpoint(
    folder: Path, info: ModelInfo, tmp_path: Path, missing: str, message: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, info)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": [0.5]}, "takes no image: mean must have 3 elements"),
        ({"rescale_factor": None}, "takes no image: .*rescale_factor"),
        ({"resample": 99}, "takes no image: Unknown resampling filter"),
        ({"image_std": [0.0, 0.0, 0.0]}, r"must give finite pixels, got .*'image_std': .0\.0, 0\.0, 0\.0"),
    ],
)
def test_an_image_processor_that_works_for_no_image_refuses_the_checkpoint(
    folder: Path, info: ModelInfo, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, info)


def test_broken_tokenizer_refuses_the_checkpoint(folder: Path, info: ModelInfo, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load(tmp_path, info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_token_id": 999}, "image token 999 is not among the tokenizer's 329 tokens"),
        ({"tile_size": 56}, "up to 4 tiles of 28 x 28 pixels, the vision config takes 4 of 56 x 56"),
        ({"max_tiles": 2}, "up to 4 tiles of 28 x 28 pixels, the vision config takes 2 of 28 x 28"),
    ],
)
def test_disagreement_with_the_config_refuses_the_checkpoint(
    folder: Path, info: ModelInfo, change: dict[str, int], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(folder, dataclasses.replace(info, **change))  # type: ignore[arg-type]  # every change is an int


def test_chat_template_of_the_processor_is_found(folder: Path, info: ModelInfo, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    chat = ChatPrompt((Message("user", (Text("Hi"),)),))
    with pytest.raises(InvalidRequest, match="no chat template: send raw_prompt instead"):
        load(tmp_path, info).prepare(chat)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load(tmp_path, info).prepare(chat) == load(folder, info).prepare(chat)


@pytest.mark.parametrize("kind", ["chat", "raw", "tokens"])
def test_a_closer_look_is_the_region_of_the_original_pixels_right_behind_the_image(
    processor: Processor, tokens: TinyTokens, kind: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8)  # larger than its tiles
    whole, part = _png(pixels), _png(pixels[25:75, 40:80])
    image_id = tokens.image_token_id

    def shown(*images: ImageFile) -> PlainPrompt:
        match kind:
            case "chat":
                return ChatPrompt((Message("user", (*images, Text("What is this?"))),))
            case "raw":
                return RawPrompt(f"Before {'<|image|>' * len(images)} after", images)
            case _:
                return TokenPrompt((5, *[image_id] * len(images), 6), images)

    closer = processor.prepare(CloserPrompt(shown(whole), Region(0.25, 0.5, 0.5, 0.5)))
    expected = processor.prepare(shown(whole, part))
    assert closer.token_ids == expected.token_ids
    assert [image.key for image in closer.images] == [image.key for image in expected.images]
    assert closer.images[0].key != closer.images[1].key


def _png(pixels: Pixels) -> ImageFile:
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, "PNG")
    return ImageFile(buffer.getvalue())
