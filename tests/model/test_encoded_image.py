"""What an image remembers, and what the encoder notes of it on the way."""

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import ONE, noise, raw
from tests.tolerances import ATTENTION, LOGITS
from trimserve.api.trim import FixedRatio, TrimRequest
from trimserve.model.interruptible import run_through
from trimserve.model.vision_observer import patch_entropy
from trimserve.trimming.encoded_image import MAX_CHOICES, Choice, EncodedImage, Observation
from trimserve.trimming.plan import TrimPlan, choose_from_image


def test_a_choice_is_made_once_for_each_of_the_last_few_keys() -> None:
    image = EncodedImage(torch.zeros(5, 2), 5)
    made: list[int] = []

    def choice(key: int) -> Choice:
        def choose() -> Choice:
            made.append(key)
            return Choice(torch.tensor([key]))

        return image.remembered(key, choose)

    for key in (*range(MAX_CHOICES), 0, MAX_CHOICES, 0, 1):
        assert choice(key).kept.tolist() == [key]
    assert made == [*range(MAX_CHOICES), MAX_CHOICES, 1]  # 1 was the one used longest ago


def test_policy_parameters_budget_cap_and_merging_are_the_key() -> None:
    image = EncodedImage(torch.randn(10, 2), 10, 2, {"class_attention": torch.rand(3, 10)})
    cls = TrimPlan.of(TrimRequest(policy="cls", budget=FixedRatio(0.5)))
    first = choose_from_image(image, cls)
    assert (
        choose_from_image(image, TrimPlan.of(TrimRequest(policy="cls", k_ratio=0.1))) is first
    )  # k_ratio is not asked
    for other in (
        TrimPlan.of(TrimRequest(policy="cls", budget=FixedRatio(0.4))),
        TrimPlan.of(TrimRequest(policy="cls", parameters={"num_layers": 1})),
        TrimPlan.of(TrimRequest(policy="cls", max_kept_fraction=0.3)),
        TrimPlan.of(TrimRequest(policy="cls", merge_ratio=0.2)),
        TrimPlan.of(TrimRequest(policy="divprune")),
    ):
        assert choose_from_image(image, other) is not first


def test_there_is_room_for_what_an_image_remembers() -> None:
    image = EncodedImage(torch.randn(40, 1), 20, 2, {"class_attention": torch.rand(3, 40)})
    before = image.nbytes
    held = 0
    for budget in (FixedRatio(0.1), FixedRatio(0.3), FixedRatio(0.6), FixedRatio(0.9)):
        choice = choose_from_image(image, TrimPlan.of(TrimRequest(policy="cls", budget=budget, merge_ratio=1.0)))
        assert choice.groups is not None
        held += choice.kept.nbytes + choice.groups.members.nbytes + choice.groups.sizes.nbytes
    assert image.features.nbytes + image.observed["class_attention"].nbytes + held <= before == image.nbytes


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2)])
def test_the_encoder_notes_the_attention_that_a_literal_reading_finds(pair: Pair, grid: tuple[int, int]) -> None:
    info = pair.ours.info
    image = noise(grid, info.tile_size)
    prompt = pair.ours.prepare(raw(ONE, [image]))
    num_tiles, size = grid[0] * grid[1], info.features_per_tile
    expected: list[Tensor] = []
    seen: list[Tensor] = []

    def literal(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        [hidden] = args[0]
        num_rows = len(hidden) // info.max_tiles  # of a tile, padded
        heads: int = module.num_heads  # type: ignore[assignment]  # torch's modules have attributes of any type
        projections: Any = (module.q_proj, module.k_proj)
        q, k = (project(hidden).view(len(hidden), heads, -1) for project in projections)
        weights = torch.einsum("thd,nhd->htn", q, k).div(q.shape[-1] ** 0.5).softmax(dim=-1)
        seen.append(
            torch.stack([rows.unflatten(0, (-1, num_rows))[:num_tiles, :size].flatten(0, 1) for rows in (q, k)])
        )
        of_class_tokens = weights[:, : num_tiles * num_rows : num_rows].mean(dim=(0, 1))
        expected.append(of_class_tokens.view(info.max_tiles, num_rows)[:num_tiles, :size].flatten())

    vision = pair.peer.model.model.vision_model
    layers = [*vision.transformer.layers, *vision.global_transformer.layers]
    hooks = [layer.self_attn.register_forward_pre_hook(literal) for layer in layers]
    try:
        pair.peer.logits(list(prompt.token_ids), [image])
    finally:
        for hook in hooks:
            hook.remove()
    needs = frozenset[Observation]({"class_attention", "vision_attention"})
    encoded = run_through(pair.ours.encode_image(prompt.images[0], needs))
    torch.testing.assert_close(encoded.observed["class_attention"], torch.stack(expected), **ATTENTION)
    assert encoded.num_local_layers == len(vision.transformer.layers)
    last_but_one = seen[encoded.num_local_layers - 2]
    torch.testing.assert_close(encoded.observed["vision_attention"], last_but_one, atol=LOGITS, rtol=0)
    assert not run_through(pair.ours.encode_image(prompt.images[0])).observed


def test_the_encoder_notes_what_enters_and_leaves_the_last_but_one_local_layer(pair: Pair) -> None:
    info = pair.ours.info
    image = noise((1, 2), info.tile_size)
    prompt = pair.ours.prepare(raw(ONE, [image]))
    expected: list[Tensor] = []

    def literal(_: nn.Module, _args: tuple[()], inputs: dict[str, Tensor], output: Tensor) -> None:
        entering = next(iter(inputs.values()))  # `hidden_states`, until transformers 5.23 `hidden_state`
        for [rows] in (entering, output):
            expected.append(rows.unflatten(0, (info.max_tiles, -1))[:2, : info.features_per_tile].flatten(0, 1))

    layer = pair.peer.model.model.vision_model.transformer.layers[-2]
    hook = layer.register_forward_hook(literal, with_kwargs=True)
    try:
        pair.peer.logits(list(prompt.token_ids), [image])
    finally:
        hook.remove()
    encoded = run_through(pair.ours.encode_image(prompt.images[0], frozenset({"vision_states"})))
    torch.testing.assert_close(encoded.observed["vision_states"], torch.stack(expected), atol=LOGITS, rtol=0)


def test_an_encoded_image_keeps_no_memory_beside_its_own_tensors(pair: Pair) -> None:
    [image] = pair.ours.prepare(raw(ONE, [noise((1, 2), pair.ours.info.tile_size)])).images
    needs = frozenset[Observation]({"class_attention", "vision_attention", "vision_states", "patch_entropy"})
    encoded = run_through(pair.ours.encode_image(image, needs))
    assert encoded.observed.keys() == needs
    for tensor in (encoded.features, *encoded.observed.values()):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_encoding_pauses_after_each_layer(pair: Pair) -> None:
    [image] = pair.ours.prepare(raw(ONE, [noise((1, 1), pair.ours.info.tile_size)])).images
    vision = pair.peer.model.model.vision_model
    num_layers = len(vision.transformer.layers) + len(vision.global_transformer.layers)
    assert sum(1 for _ in pair.ours.encode_image(image)) == num_layers


def test_patch_entropy_is_that_of_each_patch_of_each_tile() -> None:
    tile = torch.zeros(4, 4)
    tile[:2, 2:] = torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # four grey values, alike often
    tile[2, 0] = 3.0  # one of four differs
    entropies = [0.0, 0.0, math.log(4), 0.75 * math.log(4 / 3) + 0.25 * math.log(4), 0.0]
    found = patch_entropy(torch.stack([tile.expand(3, 4, 4), torch.zeros(3, 4, 4)]), 2)
    torch.testing.assert_close(found, torch.tensor([*entropies, *[0.0] * 5]))


def storages(tree: object) -> list[torch.UntypedStorage]:
    """Of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and still there."""

    def __init__(self) -> None:
        """Nothing is there yet."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self.now = self.peak = 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(storages((args, kwargs)))
        made = func(*args, **(kwargs or {}))
        for storage in storages(made):
            if storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._let_go, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _let_go(self, num_bytes: int) -> None:
        self.now -= num_bytes


@pytest.mark.parametrize("collected", [(0,), (0, 1, 2, 3, 4)])
def test_encoding_takes_no_more_than_is_told_and_hardly_less(
    make_pair: Callable[..., Pair], collected: tuple[int, ...]
) -> None:
    geometry = Geometry(patches_per_side=12, patch_size=2, vision_layers=5, intermediate_layers=collected)
    pair = make_pair(geometry)
    [image] = pair.ours.prepare(raw(ONE, [noise((2, 2), geometry.tile_size)])).images
    with LiveBytes() as live:
        features = run_through(pair.ours.encode_image(image)).features
    told = pair.ours.info.vision_scratch_bytes
    assert 0.8 * told < live.peak <= told + features.nbytes
