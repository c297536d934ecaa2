"""Every op of ours on CUDA can be captured in a graph, which then follows its inputs: nothing waits for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.arrays import seeded
from trimserve import ops
from trimserve.ops import PAGE_POSITIONS


@pytest.fixture(autouse=True)
def gpu(device: str) -> None:
    """Only a real one."""
    if device != "cuda":
        pytest.skip("of a GPU")


def assert_follows(call: Callable[..., Any], first: list[Tensor], second: list[Tensor]) -> None:
    """A graph captured with the first inputs gives what the call gives for the second, copied over them."""
    inputs = [tensor.clone() for tensor in first]
    call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for target, source in zip(inputs, second, strict=True):
        target.copy_(source)
    graph.replay()
    torch.testing.assert_close(captured, call(*(tensor.clone() for tensor in second)), rtol=0, atol=0)


def test_selection_follows_its_scores() -> None:
    first, second = torch.rand(2, 4, 100, generator=seeded(0))
    assert_follows(lambda scores: ops.headwise_topk(scores, [60, 40], [9, 4]), [first], [second])
    assert_follows(lambda scores: ops.select_features(scores, [60, 40], [9, 4]), [first], [second])
    picks = [ops.headwise_topk(scores, [60, 40], [9, 4]) for scores in (first, second)]
    assert_follows(lambda picks: ops.union_indices(picks, 100), picks[:1], picks[1:])


def test_scores_follow_queries_keys_and_ranges() -> None:
    q, k = torch.randn(2, 7, 4, 16, generator=seeded(0)), torch.randn(2, 90, 2, 16, generator=seeded(1))
    ranges = torch.tensor([[[0, 90]] * 7, [[5, 60]] * 7], dtype=torch.int32)
    assert_follows(
        lambda q, k, ranges: ops.headwise_scores(q, k, ranges, 0.25), [q[0], k[0], ranges[0]], [q[1], k[1], ranges[1]]
    )


def test_pages_follow_rows_and_slots() -> None:
    rows = torch.randn(2, 20, 2, 16, generator=seeded(0))
    slots = torch.stack([torch.randperm(64, generator=seeded(seed))[:20] for seed in (0, 1)])
    pages = torch.zeros(4, 1, 2, 2, PAGE_POSITIONS, 16)

    def write(pages: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
        ops.write_kv(pages.zero_(), 0, rows, -rows, slots)
        ops.gather_kv(pages, 0, rows, rows, slots % 20, slots)
        return pages

    assert_follows(write, [pages, rows[0], slots[0]], [pages, rows[1], slots[1]])


def test_attention_follows_lengths_and_tables() -> None:
    q, pages = torch.randn(2, 3, 4, 16, generator=seeded(0)), torch.randn(90, 1, 2, 2, PAGE_POSITIONS, 16)
    tables = torch.stack([torch.randperm(90, generator=seeded(seed)).view(3, 30) for seed in (0, 1)]).int()
    lengths = torch.tensor([[480, 17, 0], [1, 300, 260]], dtype=torch.int32)
    assert_follows(
        lambda q, tables, lengths: ops.paged_attention(q, pages, 0, tables, lengths, 0.25),
        [q[0], tables[0], lengths[0]],
        [q[1], tables[1], lengths[1]],
    )
