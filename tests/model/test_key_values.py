"""Keys and values in pages: what is written to a sequence's pages comes back from them, and a bias with it."""

import numpy as np
import torch
from torch import Tensor

from trimserve.model.decode_batch import DecodeBatch
from trimserve.model.decode_rows import NewRows
from trimserve.model.key_values import FeatureTables, KeyValues, PromptSlots


def key_values(pages: Tensor, first: int, num_pages: int) -> KeyValues:
    """Of 4 self- and 2 cross-attention layers, 2 to a page; pages from `first` on, in no order."""
    ids = np.arange(first, first + 3 * num_pages, dtype=np.int32)[::-1]
    return KeyValues.empty(pages, ids[num_pages:].reshape(2, -1), ids[:num_pages].reshape(1, -1), 2)


def test_rows_come_back_from_the_pages_that_they_were_written_to() -> None:
    pages = torch.zeros(64, 2, 2, 2, 16, 3)
    torch.manual_seed(0)
    kvs = [key_values(pages, first, 3) for first in (0, 10)]
    written = []
    for kv, rows in zip(kvs, (33, 7), strict=True):
        keys, values = torch.randn(4, rows, 2, 3), torch.randn(4, rows, 2, 3)
        slots = PromptSlots.of(kv, rows)
        for layer in range(4):
            slots.write_text(layer, keys[layer], values[layer])
        kv.length = rows - 1  # the last row is taken for the new one
        written.append((keys, values))
    new = NewRows.of(kvs)
    tables = DecodeBatch(new).text(pages, [*new.positions])
    for layer in range(4):
        queries = torch.randn(2, 2, 3)
        attended = tables.attend(layer, queries, 0.5)
        for row, (keys, values) in enumerate(written):
            weights = torch.einsum("hd,nhd->hn", queries[row], keys[layer]).mul(0.5).softmax(-1)
            assert torch.allclose(attended[row], torch.einsum("hn,nhd->hd", weights, values[layer]), atol=1e-6)


def test_a_bias_reaches_the_rows_of_its_sequence_only() -> None:
    pages = torch.zeros(64, 2, 2, 1, 16, 2)
    kvs = [key_values(pages, first, 1) for first in (0, 10)]
    for kv, bias in zip(kvs, (None, np.array([0.0, 0.0, np.log(6.0)], dtype=np.float32)), strict=True):
        for layer in range(2):
            kv.hold_features(layer, 3, bias)
        values = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 2.0]]])
        PromptSlots.of(kv, 0).write_features(0, torch.zeros(3, 1, 2), values)
    attended = FeatureTables.of(kvs).attend(pages, 0, torch.ones(2, 1, 2), 1.0)
    # Equal logits: weights of one third each; 1, 1 and 6 parts of eight with the bias.
    assert torch.allclose(attended[:, 0], torch.tensor([[1 / 3, 1.0], [1 / 8, 13 / 8]]))
