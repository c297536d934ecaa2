"""A model whose ranks hold a part each: logits and kept sets of the model in one process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, equip, save_random_checkpoint
from tests.model.ranks import ThreadRanks
from tests.model.test_mllama import THREE_MIXED, noise, raw
from tests.tolerances import LOGITS
from trimserve.api.trim import FixedRatio, TopP, TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.evaluation.pages import OwnPages
from trimserve.model import prompt_rows
from trimserve.model.interruptible import run_through
from trimserve.model.loading import describe_model, load_model
from trimserve.model.mllama import Mllama
from trimserve.model.prepared import PreparedPrompt
from trimserve.model.ranks import Shard
from trimserve.model.sharding import shares
from trimserve.trimming.plan import TrimPlan
from trimserve.trimming.policies.table import POLICIES
from trimserve.trimming.selection import KeptSets

CONTINUATION = [7, 3]


@dataclass(frozen=True)
class Both:
    """A checkpoint in one process and cut for several ranks."""

    config: ModelConfig
    whole: Mllama
    ranks: ThreadRanks
    parts: list[Mllama]

    def prompt(self) -> PreparedPrompt:
        """With three images, and rows that see none."""
        side = self.whole.info.tile_size
        most = self.whole.info.max_tiles
        images = [noise((1, n), side, n) for n in (min(2, most), 1, min(2, most))]
        return self.whole.prepare(raw("before " + THREE_MIXED, images))

    def read(self, trim: TrimRequest) -> "tuple[tuple[Tensor, KeptSets], tuple[Tensor, KeptSets]]":
        """What one process makes of the prompt, and what rank 0 does; all ranks keep the same."""
        prompt, plan = self.prompt(), TrimPlan.of(trim)
        alone = read(self.whole, prompt, plan)
        found = self.ranks.run(lambda rank: read(self.parts[rank], prompt, plan))
        for _, kept in found[1:]:
            assert_same_sets(kept, found[0][1])
        return alone, found[0]


def read(model: Mllama, prompt: PreparedPrompt, trim: TrimPlan) -> tuple[Tensor, KeptSets]:
    """Logits of the prompt's rows and of decoded ones, and what was kept."""
    images = [run_through(model.encode_image(image, trim.needs)) for image in prompt.images]
    num_rows = sum(image.num_features for image in images)
    kv = OwnPages(model.info, 2**23).key_values(len(prompt.token_ids) + len(CONTINUATION), num_rows)
    rows = model.prompt_rows(prompt, images, trim, kv)
    logits = [model.logits([rows], prompt.token_ids), *(model.decode([token], [kv]) for token in CONTINUATION)]
    assert rows.vision is not None
    return torch.cat(logits), rows.vision.kept_sets


def assert_same_sets(found: KeptSets, expected: KeptSets) -> None:
    assert found.left_after == expected.left_after
    assert len(found.sets) == len(expected.sets)
    for one, other in zip(found.sets, expected.sets, strict=True):
        assert (one.num_kept, one.num_groups) == (other.num_kept, other.num_groups)
        assert np.array_equal(one.kept, other.kept)
        for merged in "members", "sizes":
            ours, theirs = getattr(one, merged), getattr(other, merged)
            assert ours is theirs is None or np.array_equal(ours, theirs)


def are_same_sets(found: KeptSets, expected: KeptSets) -> bool:
    return [each.kept.tolist() for each in found.sets] == [each.kept.tolist() for each in expected.sets]


@pytest.fixture(scope="module")
def make_both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Both]]:
    """A checkpoint in one process and on so many ranks."""
    opened = []

    def make(folder: Path, size: int, **knobs: object) -> Both:
        other = tmp_path_factory.mktemp("ranks")
        config = equip(ModelConfig(model=str(folder)), other / "codebook.safetensors").model_copy(update=knobs)
        ranks = ThreadRanks(size, other)
        opened.append(ranks)
        return Both(config, load_model(config, EngineConfig()), ranks, ranks.load(config))

    yield make
    for ranks in opened:
        ranks.close()


@pytest.fixture(scope="module")
def two(pair: Pair, make_both: Callable[..., Both]) -> Both:
    """The usual geometry on two ranks."""
    return make_both(pair.folder, 2)


TRIMS = [
    TrimRequest(enabled=False),
    *(TrimRequest(policy=name, k_ratio=0.1) for name in POLICIES),
    *(TrimRequest(policy=name, k_ratio=0.1, merge_ratio=0.2) for name in POLICIES),
    TrimRequest(policy="sparsevlm", budget=FixedRatio(0.5), parameters={"cascade_ratio": 0.5}),
    TrimRequest(policy="sparsevlm", budget=FixedRatio(0.4), parameters={"recycle_ratio": 1.0}),
    TrimRequest(policy="todre", budget=FixedRatio(0.5), parameters={"late_exit_threshold": 1.0}),
    TrimRequest(budget=TopP(0.7), max_kept_fraction=0.5),
]


@pytest.mark.parametrize("trim", TRIMS, ids=lambda trim: f"{trim.policy}-{trim.merge_ratio}")
def test_two_ranks_give_the_logits_and_the_kept_sets_of_one_process(two: Both, trim: TrimRequest) -> None:
    (expected, kept), (found, found_kept) = two.read(trim)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < LOGITS
    assert_same_sets(found_kept, kept)


def test_four_ranks_do_so_in_a_drawn_geometry(make_both: Callable[..., Both], tmp_path: Path) -> None:
    geometry = Geometry(num_kv_heads=4, heads_per_kv=3, head_dim=6, num_layers=6, cross_layers=(0, 2, 5))
    save_random_checkpoint(tmp_path, geometry, seed=3)
    four = make_both(tmp_path, 4)
    for trim in TrimRequest(k_ratio=0.1, merge_ratio=0.2), replace(TRIMS[-4], merge_ratio=0.1), TRIMS[0]:
        (expected, kept), (found, found_kept) = four.read(trim)
        assert (found - expected).abs().max() < LOGITS
        assert_same_sets(found_kept, kept)


@pytest.mark.parametrize("knob", ["quantize", "kv_dtype"])
def test_int8_has_the_scales_of_one_process(make_both: Callable[..., Both], pair: Pair, knob: str) -> None:
    int8 = make_both(pair.folder, 2, **{knob: "int8"})
    (expected, kept), (found, found_kept) = int8.read(TrimRequest(k_ratio=0.1))
    assert (found - expected).abs().max() < LOGITS
    assert_same_sets(found_kept, kept)


@pytest.mark.parametrize("merge_ratio", [0.0, 0.2])
def test_without_the_gather_rank_0_would_keep_something_else(
    two: Both, monkeypatch: pytest.MonkeyPatch, merge_ratio: float
) -> None:
    monkeypatch.setattr(prompt_rows, "_of_all_heads", lambda _ranks, part, dim: part)  # noqa: ARG005 - as the original
    (expected, kept), (found, found_kept) = two.read(TrimRequest(k_ratio=0.1, merge_ratio=merge_ratio))
    assert not are_same_sets(found_kept, kept)
    assert (found - expected).abs().max() > LOGITS


def test_each_rank_holds_exactly_its_part_of_weights_and_pages(two: Both) -> None:
    whole = dict(two.whole._model.named_parameters())
    for rank, part in enumerate(two.parts):
        cut = shares(two.whole._model, Shard(rank, 2))
        assert len(cut) > 30
        for name, parameter in part._model.named_parameters():
            share = cut.get(name.removesuffix(".weight"))
            assert torch.equal(parameter, whole[name] if share is None else whole[name][share])
            assert parameter.numel() * (1 if share is None else 2) == whole[name].numel()
        pages, all_pages = OwnPages(part.info, 2**20), OwnPages(two.whole.info, 2**20)
        assert pages.num_pages == all_pages.num_pages
        assert 2 * pages.pages.nbytes == all_pages.pages.nbytes
    assert sum(p.nbytes for part in two.parts for p in part._model.parameters()) == two.parts[0].info.weight_bytes


@pytest.mark.parametrize(
    ("size", "knobs", "words"),
    [
        (3, {}, "tensor_parallel must divide the 2 KV heads of .*, got 3"),
        (2, {"quantize": "int4"}, "tensor_parallel does not work with int4 weights"),
        (2, {"adapter": ("a=/nowhere",)}, r"tensor_parallel does not work with adapters \(adapter\)"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(pair: Pair, size: int, knobs: dict[str, object], words: str) -> None:
    config = ModelConfig(model=str(pair.folder), **knobs)  # type: ignore[arg-type]  # knobs of every type
    with pytest.raises(CheckpointError, match=words):
        describe_model(config, EngineConfig(tensor_parallel=size))
