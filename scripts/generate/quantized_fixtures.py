# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "auto-round==0.16.1", "bitsandbytes==0.50.2", "compressed-tensors==0.20.1", "safetensors==0.8.0", "torch==2.13.0",
# ]
# ///
"""Writes `tests/model/quantized/`: linear layers as each library stores them, and what it makes of them itself.

It runs in an environment of its own, `uv run scripts/generate/quantized_fixtures.py`; the tests need only the files.
Weights are drawn with a fixed seed, so that the same versions write the same files.
"""

import json
from pathlib import Path
from typing import Any

import torch
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from bitsandbytes import functional as bnb
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor, nn

_FOLDER = Path(__file__).parents[2] / "tests/model/quantized"
_LAYER = "layer."


def _weight(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Rows of different sizes, not around 0."""
    torch.manual_seed(0)
    return ((torch.randn(outputs, inputs) + 0.25) * torch.linspace(0.05, 2, outputs)[:, None]).to(dtype)


def _write(name: str, parts: dict[str, Tensor], expected: Tensor, config: dict[str, Any]) -> None:
    tensors = {_LAYER + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(
        {**tensors, "expected": expected.contiguous()}, _FOLDER / f"{name}.safetensors", {"config": json.dumps(config)}
    )


def _bitsandbytes() -> None:
    config = {"quant_method": "bitsandbytes"}
    settings: dict[str, dict[str, Any]] = {
        "bnb_nf4": {},
        "bnb_nf4_nested": {"compress_statistics": True},
        "bnb_fp4_nested": {"quant_type": "fp4", "compress_statistics": True},
        "bnb_nf4_blocks_of_128": {"blocksize": 128},
        "bnb_nf4_stored_as_bfloat16": {"quant_storage": torch.bfloat16, "compress_statistics": True},
        "bnb_nf4_stored_as_float32": {"quant_storage": torch.float32},
    }
    for name, knobs in settings.items():
        dtype = torch.float16 if "fp4" in name else torch.bfloat16
        weight = _weight(66, 264, dtype)  # rows that are no whole blocks, more blocks than one nested block
        packed, state = bnb.quantize_4bit(weight, **{"quant_type": "nf4", **knobs})
        parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        _write(name, {"weight": packed, **parts}, bnb.dequantize_4bit(packed, state), config)
    weight, magnitudes, _ = bnb.int8_vectorwise_quant(_weight(24, 40, torch.float16))
    parts = {"weight": weight, "SCB": magnitudes, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    _write("bnb_int8", parts, bnb.int8_vectorwise_dequant(weight, magnitudes), config)


def _compressed_tensors() -> None:
    settings: dict[str, dict[str, Any]] = {
        "fp8_per_output": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "fp8_per_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "w8a8": {"num_bits": 8, "type": "int", "strategy": "channel"},
        "w8a8_per_tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
        "w8a8_asymmetric": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
        "w4a16": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        "w4a16_asymmetric": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
        "w4a16_per_output": {"num_bits": 4, "type": "int", "strategy": "channel"},
        "w8a16": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32},
        "w8a16_asymmetric": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    }
    for name, knobs in settings.items():
        args = QuantizationArgs(**knobs)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = _weight(20, 96, torch.bfloat16)  # the last word of zero points is not full
        scale, zero_point = _parameters(weight, args)
        stored = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            stored["weight_zero_point"] = zero_point
        compressor = PackedQuantizationCompressor if "a16" in name else NaiveQuantizationCompressor
        parts = compressor.compress(stored, scheme)
        expected = compressor.decompress(dict(parts), scheme)["weight"]
        _write(name, parts, expected, {"quant_method": "compressed-tensors"})


def _parameters(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a strategy."""
    if args.strategy == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    else:
        grouped = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
    scale, zero_point = calculate_qparams(low, high, args)
    return scale, zero_point


def _gptq() -> None:
    v1, v2 = (
        {"quant_method": "gptq", "checkpoint_format": "gptq"},
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    )
    round_v1 = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    round_v2 = {"quant_method": "auto-round", "packing_format": "auto_round"}
    for name, module, bits, is_symmetric, is_shuffled, config in (
        ("gptq_symmetric", qlinear_torch_zp, 4, True, False, v1),
        ("gptq_asymmetric", qlinear_torch_zp, 4, False, False, v1),
        ("gptq_act_order", qlinear_torch_zp, 4, False, True, v1),
        ("gptq_8_bits", qlinear_torch_zp, 8, False, False, v1),
        ("gptq_v2", qlinear_torch, 4, False, False, v2),
        ("auto_round", qlinear_torch, 4, True, False, round_v2),
        ("auto_round_gptq", qlinear_torch_zp, 4, False, False, round_v1),
    ):
        outputs, inputs, group = 32, 64, 32
        linear = nn.Linear(inputs, outputs, bias=False)
        linear.weight.data = _weight(outputs, inputs, torch.float32)
        grouped = linear.weight.data.unflatten(1, (-1, group))
        scales = (grouped.amax(2) - grouped.amin(2)) / (2**bits - 1)
        zeros = (-grouped.amin(2) / scales).round().clamp(1, 2**bits - 1)
        if is_symmetric:
            scales, zeros = grouped.abs().amax(2) / 2 ** (bits - 1), 2 ** (bits - 1)
        packed = module.QuantLinear(bits, group, inputs, outputs, bias=False, g_idx=is_shuffled)
        packed.device = "cpu"
        packed.pack(linear, scales, zeros, device="cpu")
        parts = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
        if is_shuffled:
            packed.g_idx = packed.g_idx[torch.randperm(inputs)]
            parts["g_idx"] = packed.g_idx
        _write(name, parts, packed(torch.eye(inputs, dtype=torch.float16)).T, config)


if __name__ == "__main__":
    _FOLDER.mkdir(exist_ok=True)
    with torch.no_grad():
        _bitsandbytes()
        _compressed_tensors()
        _gptq()
