"""decode_layers: refusals. What it computes is held by tests/model/test_compiled_decode.py."""

from typing import Any

import pytest
import torch

from trimserve.ops import PAGE_POSITIONS, decode_layers

D, HEADS, KV_HEADS, HEAD_DIM, MLP = 8, 2, 1, 4, 6


def arguments() -> dict[str, Any]:
    """Two sequences, of which one sees features; a self- and a cross-attention layer."""
    norm, down = torch.ones(D), torch.ones(D, MLP)
    mlp = [norm, torch.ones(2 * MLP, D), down]
    own = [norm, torch.ones((HEADS + 2 * KV_HEADS) * HEAD_DIM, D), torch.ones(D, HEADS * HEAD_DIM), *mlp]
    query = [norm, torch.ones(HEADS * HEAD_DIM, D), torch.ones(HEAD_DIM), torch.ones(D, HEADS * HEAD_DIM)]
    table = torch.tensor([[[0], [1]]], dtype=torch.int32)
    return {
        "hidden": torch.ones(2, D),
        "pages": torch.zeros(3, 1, 2, KV_HEADS, PAGE_POSITIONS, HEAD_DIM),
        "weights": [*own, *query, *mlp],
        "scales": [],
        "cross_layers": [1],
        "gates": [0.5, 0.5],
        "cosines": torch.ones(2, HEAD_DIM // 2),
        "sines": torch.zeros(2, HEAD_DIM // 2),
        "text_tables": table,
        "text_lengths": torch.tensor([1, 1], dtype=torch.int32),
        "slots": torch.tensor([[0, PAGE_POSITIONS]]),
        "feature_tables": [table[0, :1] + 2],
        "feature_lengths": [torch.tensor([3], dtype=torch.int32)],
        "biases": [],
        "epsilon": 1e-5,
    }


def test_what_is_well_formed_runs() -> None:
    given = arguments()
    decode_layers(**given)
    assert given["hidden"].isfinite().all()
    assert not torch.equal(given["hidden"], torch.ones(2, D))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": arguments()["weights"][:-1]}, "weights must be six of each self-attention layer .* got 12"),
        ({"scales": [torch.ones(4)]}, "scales must be four of each of 2 layers, or none, got 1"),
        ({"gates": [0.5]}, "gates must be two of each of 1 cross-attention layers, got 1"),
        ({"cross_layers": [2]}, r"cross_layers must ascend within \[0, 2\), got 2 at 0"),
        ({"cross_layers": [-1]}, r"cross_layers must ascend within \[0, 2\), got -1 at 0"),
        ({"pages": torch.zeros(3, 1, 2, KV_HEADS, PAGE_POSITIONS, 0)}, "Dh must be at least 1, got 0"),
        ({"pages": torch.zeros(3, 1, 2, KV_HEADS, 8, HEAD_DIM)}, "pages must be"),
        ({"hidden": torch.ones(2, 1, D)}, r"hidden must be contiguous \[B, D\], got float32 \[2, 1, 8\]"),
        ({"hidden": torch.ones(D, 2).T}, "hidden must be contiguous"),
        ({"text_tables": torch.zeros(0, 2, 1, dtype=torch.int32)}, "text_tables must have 3 dimensions, .* 1 groups"),
        ({"slots": torch.tensor([0, 16])}, r"slots must have 2 dimensions, .* got int64 \[2\]"),
        ({"feature_tables": [torch.zeros(1, dtype=torch.int32)]}, r"tables must be int32 \[B, max_pages\]"),
        ({"feature_lengths": [torch.tensor(3, dtype=torch.int32)]}, "feature_lengths must be int32"),
        ({"feature_lengths": [torch.ones(3, dtype=torch.int32)]}, "feature_lengths must be .* S at most B=2, got"),
        ({"feature_lengths": []}, "feature_tables and feature_lengths must come together"),
        ({"feature_lengths": [torch.ones(1, dtype=torch.int32)] * 2}, "feature_lengths must be one of each of 1 cross"),
        (
            {"biases": [torch.zeros(1, 16)] * 2},
            "biases must be one of each of 1 cross-attention layers, or none, got 2",
        ),
        ({"cosines": torch.ones(2, 3)}, r"rotate: cosines must be float32 \[2, 2\]"),
    ],
)
def test_refusals_name_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_layers(**(arguments() | changes))
