"""What becomes of values that nobody checks, since looking at them would be waiting for the GPU: they are left out."""

from math import log, nan

import pytest
import torch

from trimserve.ops import PAGE_POSITIONS, gather_kv, headwise_scores, paged_attention, union_indices, write_kv


@pytest.fixture(autouse=True)
def unchecked(device: str) -> None:
    """Only devices whose values are not checked."""
    if device == "cpu":
        pytest.skip("values on the CPU are checked")


def test_picks_out_of_range_are_not_kept() -> None:
    kept, num_kept = union_indices(torch.tensor([[-1, 5, 2], [2**62, 0, -(2**62)]]), 5)
    assert kept.tolist() == [0, 2, -1, -1, -1]
    assert num_kept.item() == 2


def test_ranges_end_with_the_features() -> None:
    q, k = torch.ones(3, 1, 1), torch.tensor([0.0, log(3.0)]).view(2, 1, 1)
    ranges = torch.tensor([[-7, 9], [1, 0], [2, 5]], dtype=torch.int32)
    torch.testing.assert_close(headwise_scores(q, k, ranges, 1.0), torch.tensor([[0.25, 0.75]]))


@pytest.mark.parametrize("slot", [-1, 2 * PAGE_POSITIONS, 2**62])
def test_slots_out_of_range_are_not_written(slot: int) -> None:
    pages, rows = torch.zeros(2, 1, 2, 1, PAGE_POSITIONS, 4), torch.ones(2, 1, 4)
    write_kv(pages, 0, rows, rows, torch.tensor([slot, 3]))
    assert pages.nonzero()[:, [0, 4]].unique(dim=0).tolist() == [[0, 3]]


@pytest.mark.parametrize("index", [-1, 2, 2**62])
def test_kept_rows_out_of_range_are_not_written(index: int) -> None:
    pages, rows = torch.zeros(2, 1, 2, 1, PAGE_POSITIONS, 4), torch.ones(2, 1, 4)
    gather_kv(pages, 0, rows, rows, torch.tensor([index, 1]), torch.tensor([5, 3]))
    assert pages.nonzero()[:, [0, 4]].unique(dim=0).tolist() == [[0, 3]]


@pytest.mark.parametrize("page", [-1, 2, 2**31 - 1])
def test_pages_out_of_range_weigh_nothing(page: int) -> None:
    pages = torch.full((2, 1, 2, 1, PAGE_POSITIONS, 4), nan)
    pages[1] = 3.0
    tables, lengths = torch.tensor([[1, page]], dtype=torch.int32), torch.tensor([20], dtype=torch.int32)
    attended = paged_attention(torch.ones(1, 2, 4), pages, 0, tables, lengths, 1.0)
    torch.testing.assert_close(attended, torch.full_like(attended, 3.0))


@pytest.mark.parametrize(("length", "expected"), [(-5, 0.0), (33, 3.0), (2**31 - 1, 3.0)])
def test_lengths_end_with_the_tables(length: int, expected: float) -> None:
    pages = torch.full((2, 1, 2, 1, PAGE_POSITIONS, 4), 3.0)
    tables, lengths = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    attended = paged_attention(torch.ones(1, 2, 4), pages, 0, tables, lengths, 1.0)
    torch.testing.assert_close(attended, torch.full_like(attended, expected))
