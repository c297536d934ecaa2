"""Tensors of one call on different devices: refused by the name of the argument, before any memory is read."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trimserve.ops import PAGE_POSITIONS

ROWS, HEADS = torch.zeros(3, 4), torch.zeros(3, 2, 4)
PAGES = torch.zeros(2, 1, 2, 2, PAGE_POSITIONS, 4)
PLACES, COUNTS = torch.arange(3), torch.zeros(3, dtype=torch.int32)
RANGES = torch.zeros(3, 2, dtype=torch.int32)
ARGUMENTS: dict[str, list[Any]] = {
    "headwise_scores": [HEADS, HEADS, RANGES, 1.0, torch.zeros(2, 3)],
    "attention": [HEADS, HEADS, HEADS, RANGES, 1.0, torch.zeros(3)],
    "write_kv": [PAGES, 0, HEADS, HEADS, PLACES],
    "gather_kv": [PAGES, 0, HEADS, HEADS, PLACES, PLACES],
    "rotate_write_kv": [torch.zeros(3, 5, 4), torch.zeros(3, 2), torch.zeros(3, 2), PAGES, 0, PLACES],
    "silu_gate": [ROWS, COUNTS],
    "paged_attention": [HEADS, PAGES, 0, COUNTS[:, None], COUNTS, 1.0, torch.zeros(3, PAGE_POSITIONS)],
    "linear": [ROWS, torch.zeros(5, 4, dtype=torch.int8), torch.ones(5)],
    "rms_norm": [ROWS, torch.ones(4), 1e-5],
    "rotate": [HEADS, torch.zeros(3, 2), torch.zeros(3, 2)],
}
CASES = [
    (op, index)
    for op, arguments in ARGUMENTS.items()
    for index, each in enumerate(arguments)
    if isinstance(each, Tensor)
]


@pytest.mark.parametrize(("op", "index"), CASES)
def test_a_tensor_on_another_device_is_refused_by_name(op: str, index: int) -> None:
    overload = getattr(torch.ops.trimserve, op).default
    names = [argument.name for argument in overload._schema.arguments]
    arguments = list(ARGUMENTS[op])
    arguments[index] = arguments[index].to("meta")
    elsewhere = "a device that is neither cpu nor cuda"
    others = [name for name, each in zip(names, arguments, strict=True) if isinstance(each, Tensor)]
    first = others[0]
    refused, wanted, got = (names[index], "cpu", elsewhere) if index else (others[1], elsewhere, "cpu")
    # As the dispatcher calls the CPU's kernel; it would take another device's first.
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        overload.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)
    assert str(error.value) == f"{op}: {refused} must be on {wanted} like {first}, got {got}"
