"""Page pools of more elements than int32 counts: a sparse file, of which only the pages in use take memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.arrays import seeded
from tests.tolerances import PAGED_ATTENTION
from trimserve.ops import PAGE_POSITIONS, gather_kv, paged_attention, reference, write_kv

HEAD_DIM = 64
PAGE_ELEMENTS = 2 * PAGE_POSITIONS * HEAD_DIM
NUM_PAGES = 2**31 // PAGE_ELEMENTS + 2
LAST = NUM_PAGES - 1


@pytest.fixture
def pages(tmp_path: Path) -> Tensor:
    num_elements = NUM_PAGES * PAGE_ELEMENTS
    pool = torch.from_file(str(tmp_path / "pool"), shared=True, size=num_elements, dtype=torch.float16)
    return pool.view(NUM_PAGES, 1, 2, 1, PAGE_POSITIONS, HEAD_DIM)


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(PAGE_POSITIONS, 1, HEAD_DIM, generator=seeded(0)).half()


def test_rows_reach_the_last_page_of_a_large_pool(pages: Tensor, rows: Tensor) -> None:
    order = torch.arange(PAGE_POSITIONS)
    write_kv(pages, 0, rows, -rows, LAST * PAGE_POSITIONS + order)
    assert torch.equal(pages[LAST, 0, 0, 0], rows[:, 0])
    assert torch.equal(pages[LAST, 0, 1, 0], -rows[:, 0])
    gather_kv(pages, 0, rows, -rows, order.flip(0), LAST * PAGE_POSITIONS + order)
    assert torch.equal(pages[LAST, 0, 0, 0], rows[:, 0].flip(0))
    assert not pages[[0, 1, LAST - 1]].any()


def test_attention_reads_the_last_page_of_a_large_pool(pages: Tensor, rows: Tensor) -> None:
    pages[LAST, 0, :, 0] = rows[:, 0]
    tables = torch.tensor([[LAST]], dtype=torch.int32)
    arguments = (rows[:1], pages, 0, tables, torch.tensor([PAGE_POSITIONS], dtype=torch.int32), 1.0)
    expected = reference.paged_attention(*arguments)
    torch.testing.assert_close(paged_attention(*arguments), expected, **PAGED_ATTENTION[torch.float16])
