"""The training's own attention is attention, forwards and backwards, up to bfloat16's rounding."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.attention import WRITTEN_OUT, register

ROUNDING = 0.01  # a bfloat16 has 8 bits; errors of many products average out


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize(("heads", "key_heads", "rows", "features"), [(4, 4, 9, 9), (6, 2, 5, 23)])
def test_outputs_and_gradients_are_those_of_torch(heads: int, key_heads: int, rows: int, features: int) -> None:
    torch.manual_seed(0)
    shapes = [(3, heads, rows, 24), (3, key_heads, features, 24), (3, key_heads, features, 24)]
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    mask = torch.zeros(3, 1, rows, features)
    mask[1, :, 2:, -4:] = -1e9
    grad = torch.randn(3, rows, heads, 24)

    register()
    ours, _ = ALL_ATTENTION_FUNCTIONS[WRITTEN_OUT](nn.Identity(), query, key, value, mask, 24**-0.5)
    own = torch.autograd.grad(ours, (query, key, value), grad)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    peers = torch.autograd.grad(expected, (query, key, value), grad)

    assert relative_error(ours, expected) < ROUNDING
    for actual, wanted in zip(own, peers, strict=True):
        assert relative_error(actual, wanted) < ROUNDING
