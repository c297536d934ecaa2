"""Tensors laid out the hard way: off alignment, strided, with sentinels around them; random numbers for them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimserve.ops import reference

__all__ = [
    "LAYOUTS",
    "AttentionInputs",
    "assert_same",
    "assert_writes_as_reference",
    "draw_attention",
    "misaligned",
    "seeded",
    "threads",
    "with_strided_columns",
    "with_strided_rows",
]


AttentionInputs = tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]
"""What `ops.attention` takes: q, k, v, visibility, scale, bias."""


def seeded(seed: int) -> torch.Generator:
    """Random numbers on the device where new tensors are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def draw_attention(
    num_rows: int,
    num_keys: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionInputs:
    """Random logits with a standard deviation of about 4, a random bias, and random ranges, some empty."""
    generator = seeded(seed)
    q = torch.randn(num_rows, num_heads, head_dim, generator=generator) * 4
    k = torch.randn(num_keys, num_kv_heads, head_dim, generator=generator)
    ends = torch.randint(0, num_keys + 1, (num_rows, 2), generator=generator, dtype=torch.int32)
    v = torch.randn(k.shape, generator=generator)
    bias = torch.randn(num_keys, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), ends.sort(dim=1).values, head_dim**-0.5, bias


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of an op, where tests have one otherwise."""
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def assert_same(tensor: Tensor, expected: Tensor) -> None:
    """Equal to the last bit; NaN equals NaN."""
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True)


def assert_writes_as_reference(op: Callable[..., None], inputs: tuple[Any, ...]) -> None:
    """An op that writes into its first input leaves there what its reference does."""
    expected = inputs[0].clone()
    getattr(reference, op.__name__)(expected, *inputs[1:])
    op(*inputs)
    assert_same(inputs[0], expected)


def misaligned(tensor: Tensor, offset: int, sentinel: float) -> tuple[Tensor, Tensor]:
    """Copy a tensor into the middle of a buffer full of `sentinel`, `offset` elements off its alignment.

    Returns:
        The copy, a view, and the buffer.
    """
    guard = 64
    buffer = tensor.new_full((2 * guard + tensor.numel() + offset,), sentinel)
    start = guard + offset
    view = buffer[start : start + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view, buffer


def with_strided_rows(tensor: Tensor) -> Tensor:
    """Give the same values with a gap behind every row, as a slice of a fused projection has."""
    wide = tensor.new_full((tensor.shape[0], 2 * tensor[:1].numel() + 3), 7)
    row_size = tensor.shape[1:].numel()
    view = wide[:, 2 : 2 + row_size].unflatten(1, tensor.shape[1:]) if tensor.dim() > 1 else wide[:, 2]
    view.copy_(tensor)
    return view


def with_strided_columns(tensor: Tensor) -> Tensor:
    """Give the same values with the dimensions stored in reverse order."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [with_strided_rows, with_strided_columns]
