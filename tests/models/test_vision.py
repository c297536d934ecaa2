"""The vision encoder over several images at once; `test_mllama.py` compares one image's features with the peer's."""

from dataclasses import replace

import pytest
import torch

from tests.models.conftest import Pair
from tests.models.test_mllama import noise, raw
from tests.tolerances import LOGITS
from trimserve.models.encoded_image import EncodedImage, Observation
from trimserve.models.images import PreparedImage
from trimserve.models.interruptible import run_through

NEEDS: list[frozenset[Observation]] = [
    frozenset({"class_attention"}),
    frozenset(),
    frozenset({"vision_attention", "patch_entropy"}),
    frozenset({"class_attention"}),
]


@pytest.fixture(scope="module")
def images(pair: Pair) -> tuple[PreparedImage, ...]:
    """Of one, four, two and again one tile."""
    size = pair.ours.info.tile_size
    pictures = [noise(grid, size, seed) for seed, grid in enumerate([(1, 1), (2, 2), (1, 2), (1, 1)])]
    return pair.ours.prepare(raw("<|image|>" * len(pictures) + "What are these?", pictures)).images


def assert_same(together: EncodedImage, alone: EncodedImage) -> None:
    torch.testing.assert_close(together.features, alone.features, atol=LOGITS, rtol=0)
    assert together.observed.keys() == alone.observed.keys()
    for name, noted in alone.observed.items():
        torch.testing.assert_close(together.observed[name], noted, atol=LOGITS, rtol=0)


def test_images_encoded_together_equal_each_alone(pair: Pair, images: tuple[PreparedImage, ...]) -> None:
    together = run_through(pair.ours.encode_images(images, NEEDS))
    for encoded, image, needs in zip(together, images, NEEDS, strict=True):
        assert_same(encoded, run_through(pair.ours.encode_image(image, needs)))


def test_an_image_that_is_not_finite_spoils_no_other(pair: Pair, images: tuple[PreparedImage, ...]) -> None:
    broken = replace(images[1], pixel_values=torch.full_like(images[1].pixel_values, torch.nan))
    together = run_through(pair.ours.encode_images([images[0], broken, images[2]], NEEDS[:3]))
    assert together[1].features.isnan().all()
    for index in (0, 2):
        assert_same(together[index], run_through(pair.ours.encode_image(images[index], NEEDS[index])))


def test_images_encoded_together_share_no_memory(pair: Pair, images: tuple[PreparedImage, ...]) -> None:
    together = run_through(pair.ours.encode_images(images, NEEDS))
    tensors = [tensor for image in together for tensor in (image.features, *image.observed.values())]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)


def test_a_batch_pauses_as_often_as_one_image(pair: Pair, images: tuple[PreparedImage, ...]) -> None:
    pauses = [sum(1 for _ in pair.ours.encode_images(images[:n], NEEDS[:n])) for n in (1, 4)]
    assert pauses[0] == pauses[1] > 1
