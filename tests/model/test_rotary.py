"""Angles of the rotary embedding: of every position, as exact as float32 is."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaRotaryEmbedding

from benchmarks.models import ROPE
from trimserve.model.rotary import RotaryAngles
from trimserve.model.transformers_mllama import Rotary


class NoProducts(TorchDispatchMode):
    """Refuses what TF32 rounds on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not {"mm", "bmm", "addmm", "baddbmm", "matmul"} & {func.__name__.split(".")[0]}
        return func(*args, **kwargs or {})


def rotary() -> MllamaRotaryEmbedding:
    text = MllamaTextConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=ROPE
    )
    return MllamaRotaryEmbedding(text)


def test_angles_are_transformers_own_at_early_and_late_positions() -> None:
    peer, positions = rotary(), [0, 1, 300, 70_000, 131_071]
    expected = peer(torch.empty(0), torch.tensor([positions]))
    for ours, theirs in zip(
        RotaryAngles(Rotary(peer.inv_freq, peer.attention_scaling)).at(positions), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs[0, :, : ours.shape[1]], rtol=0, atol=2e-7)  # an ulp of a cosine


def test_no_matrix_product_which_a_gpu_may_round_is_behind_an_angle() -> None:
    peer = rotary()
    angles = RotaryAngles(Rotary(peer.inv_freq, peer.attention_scaling))
    with NoProducts():  # type: ignore[no-untyped-call]  # torch's own
        cosines, sines = angles.at([5, 131_071])
    assert isinstance(cosines, Tensor)
    assert cosines.dtype == sines.dtype == torch.float32
