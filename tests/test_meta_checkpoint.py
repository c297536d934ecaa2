"""The conversion from Meta's checkpoint format; `make verify-meta` runs Meta's code on what it makes."""

import pytest
import torch
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import apply_rotary_pos_emb

from scripts.verify.meta.checkpoint import MetaGeometry, by_aspect_ratio, halves_of_pairs


@pytest.mark.parametrize(
    ("n_layers", "num_cross", "expected"),
    [
        (32, 8, MllamaTextConfig().cross_attention_layers),  # 11B
        (80, 20, list(range(3, 100, 5))),  # 90B
        (7, 3, [0, 4, 8]),  # counted from the last layer
    ],
)
def test_cross_attention_layers_are_numbered_among_the_others(
    n_layers: int, num_cross: int, expected: list[int]
) -> None:
    geometry = MetaGeometry(n_layers=n_layers, vision_num_cross_attention_layers=num_cross)
    assert list(geometry.cross_attention_layers) == expected


def test_attention_scores_are_those_of_pairs_turned_in_place() -> None:
    heads, head_dim, width, rows = 3, 8, 12, 5
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=torch.float64)
    query, key = torch.randn(2, heads * head_dim, width, dtype=torch.float64)
    angles = torch.outer(torch.arange(rows), 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).double()

    def turned_pairs(weight: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((hidden @ weight.T).view(rows, heads, head_dim // 2, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    expected = torch.einsum("qhd,khd->hqk", turned_pairs(query), turned_pairs(key))
    q, k = ((hidden @ halves_of_pairs(w, heads).T).view(1, rows, heads, head_dim).transpose(1, 2) for w in (query, key))
    both = torch.cat([angles, angles], dim=1)[None]
    q, k = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    torch.testing.assert_close((q @ k.mT)[0], expected)
    unpermuted = torch.einsum("qd,kd->qk", hidden @ query[:head_dim].T, hidden @ key[:head_dim].T)
    assert (unpermuted - expected[0]).abs().max() > 0.1


def test_a_tile_has_the_embedding_of_its_place_in_each_grid() -> None:
    places = torch.arange(16.0).view(4, 4, 1, 1)  # row * 4 + column
    table = by_aspect_ratio(places)
    ids = {(1, 1): 1, (1, 4): 4, (2, 2): 6, (4, 1): 8}
    assert table[ids[1, 1]].tolist() == [0, 0, 0, 0]
    assert table[ids[1, 4]].tolist() == [0, 1, 2, 3]
    assert table[ids[2, 2]].tolist() == [0, 1, 4, 5]
    assert table[ids[4, 1]].tolist() == [0, 4, 8, 12]
