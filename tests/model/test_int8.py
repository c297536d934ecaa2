"""Weight-only int8: rounding by hand, products beside exact ones, and what a model of it holds and answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.model.test_mllama import ONE, noise, raw
from tests.tolerances import LOGITS_INT8
from trimserve import ops
from trimserve.config import EngineConfig, ModelConfig
from trimserve.model.int8 import to_int8
from trimserve.model.loading import describe_model, load_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_largest_magnitude_of_a_row_becomes_127() -> None:
    weights, scales = to_int8(torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.126]]))
    assert weights.tolist() == [[127, -1, 0], [0, 0, 0], [-127, 64, 32]]
    torch.testing.assert_close(scales[[0, 2]], torch.tensor([1.0, 0.5 / 127]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_off_by_half_a_scale_at_most(dtype: torch.dtype) -> None:
    exact = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights, scales = to_int8(exact)
    assert ((weights * scales[:, None] - exact.float()).abs() <= 0.5001 * scales[:, None]).all()


def test_weights_that_are_not_finite_do_not_pass_for_numbers() -> None:
    weights, scales = to_int8(torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [1.0, 1.0]]))
    assert ops.linear(torch.ones(1, 2), weights, scales).isfinite().tolist() == [[False, False, True]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_logits_follow_float32(make_pair: Callable[..., Pair], dtype: str) -> None:
    pair = make_pair(Geometry(), dtype=dtype, quantize="int8")
    image = noise((1, 1), pair.ours.info.tile_size)
    prompt = raw(ONE, [image])
    expected = pair.peer.logits(list(pair.ours.prepare(prompt).token_ids), [image])
    logits, kv = pair.logits(prompt)
    assert kv.pages.dtype == getattr(torch, dtype)
    assert 0 < (logits - expected).std() < LOGITS_INT8 * expected.std()


def test_only_the_decoders_linear_layers_shrink(tmp_path: Path) -> None:
    save_random_checkpoint(tmp_path, Geometry())
    config = ModelConfig(model=str(tmp_path), quantize="int8")
    info = load_model(config, EngineConfig()).info
    assert describe_model(config, EngineConfig()) == info
    exact = describe_model(ModelConfig(model=str(tmp_path)), EngineConfig())
    assert info.quantization == "int8"
    assert info.num_parameters == exact.num_parameters
    assert info.kv_bytes_per_position == exact.kv_bytes_per_position
    assert info.weight_bytes < exact.weight_bytes == 4 * exact.num_parameters
