"""huge_pages: tensors like torch's, and that the system is asked for huge pages."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.fake_model import FakeModel
from trimserve.executor.page_memory import page_memory
from trimserve.model import huge_pages
from trimserve.model.weights import fuse, fused_weight

CPU = torch.device("cpu")
HUGE_BYTES = 2 << 20
THP = Path("/sys/kernel/mm/transparent_hugepage")


def advised_bytes(address: int) -> int:
    """Bytes of the mapping that begins at an address, if huge pages were asked for in it, else 0."""
    mapping, size = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            mapping, size = begin == address, end - begin
        elif mapping and first == "VmFlags:":
            return size if "hg" in rest else 0
    return 0


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 5, 7), (3, 1 << 20), (1, (2 << 20) + 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_tensor_is_as_torch_makes_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, expected = huge_pages.empty(shape, dtype, CPU), torch.empty(shape, dtype=dtype)
    assert (tensor.shape, tensor.dtype, tensor.device) == (expected.shape, expected.dtype, expected.device)
    assert tensor.stride() == expected.stride()
    assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()
    assert tensor.data_ptr() % 64 == 0
    assert tensor.fill_(3).eq(3).all()


@pytest.mark.skipif(not THP.exists(), reason="a system without huge pages")
def test_whole_huge_pages_are_asked_for_and_given_back_with_the_tensor() -> None:
    tensor = huge_pages.empty((5 * HUGE_BYTES // 2,), torch.int8, CPU)
    assert tensor.data_ptr() % HUGE_BYTES == 0
    address = tensor.data_ptr()
    assert advised_bytes(address) == 2 * HUGE_BYTES
    view = tensor[:1]
    del tensor
    assert advised_bytes(address) == 2 * HUGE_BYTES
    del view
    assert advised_bytes(address) == 0


@pytest.mark.skipif(not THP.exists(), reason="a system without huge pages")
def test_weights_and_pages_of_kv_lie_on_them() -> None:
    linears = [nn.Linear(1024, 512, bias=False, device="meta") for _ in range(2)]
    fuse(linears, CPU)
    assert fused_weight(linears).data_ptr() % HUGE_BYTES == 0
    assert page_memory(FakeModel().info, 2 * HUGE_BYTES // 128, 1).data_ptr() % HUGE_BYTES == 0


def test_what_no_system_has_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        huge_pages.empty((1 << 60,), torch.int8, CPU)


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert huge_pages.empty((HUGE_BYTES,), torch.int8, CPU).fill_(1).sum() == HUGE_BYTES
