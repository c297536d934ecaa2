"""Quantized decoders: what they hold and answer; the product of a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.model.conftest import Pair
from tests.model.random_checkpoint import Geometry, save_random_checkpoint
from tests.model.test_mllama import ONE, noise, raw
from tests.tolerances import LOGITS_INT4, LOGITS_INT8, PRODUCT_OF_A_GPU
from trimserve import ops
from trimserve.config import EngineConfig, ModelConfig, Quantize
from trimserve.model.int8 import to_int8
from trimserve.model.loading import describe_model, load_model
from trimserve.model.quantization import multiply_int8
from trimserve.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 100])
def test_the_product_of_a_gpu_equals_the_reference(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 72, generator=generator).to(dtype)
    stored = to_int8(torch.randn(80, 72, generator=generator))
    product = multiply_int8(rows, *stored)
    assert product.dtype == dtype
    torch.testing.assert_close(product, reference.linear(rows, *stored), **PRODUCT_OF_A_GPU[dtype])


@pytest.mark.parametrize("op", [multiply_int8, ops.linear])
def test_sums_before_the_scale_may_be_larger_than_float16_holds(op: Callable[..., torch.Tensor]) -> None:
    rows, weights = torch.full((1, 1024), 4.0, dtype=torch.float16), torch.full((1, 1024), 127, dtype=torch.int8)
    assert op(rows, weights, torch.tensor([1e-4])).item() == 52.03125  # 1024 * 4 * 127 * 1e-4, in float16


@pytest.mark.parametrize(("quantize", "tolerance"), [("int8", LOGITS_INT8), ("int4", LOGITS_INT4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_logits_follow_float32(
    make_pair: Callable[..., Pair], dtype: str, quantize: str, tolerance: float
) -> None:
    pair = make_pair(Geometry(), dtype=dtype, quantize=quantize)
    image = noise((1, 1), pair.ours.info.tile_size)
    prompt = raw(ONE, [image])
    expected = pair.peer.logits(list(pair.ours.prepare(prompt).token_ids), [image])
    logits, kv = pair.logits(prompt)
    assert kv.pages.dtype == getattr(torch, dtype)
    assert 0 < (logits - expected).std() < tolerance * expected.std()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_only_the_decoders_linear_layers_shrink(tmp_path: Path, quantize: Quantize) -> None:
    save_random_checkpoint(tmp_path, Geometry())
    config = ModelConfig(model=str(tmp_path), quantize=quantize)
    info = load_model(config, EngineConfig()).info
    assert describe_model(config, EngineConfig()) == info
    exact = describe_model(ModelConfig(model=str(tmp_path)), EngineConfig())
    assert info.quantization == quantize
    assert info.num_parameters == exact.num_parameters
    assert info.kv_bytes_per_position == exact.kv_bytes_per_position
    assert info.weight_bytes < exact.weight_bytes == 4 * exact.num_parameters
