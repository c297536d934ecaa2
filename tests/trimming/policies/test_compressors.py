"""What a compressor makes of an image is the formula of its policy, read literally: one row after the other."""

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.trimming.policies.trained import drawn_modules
from trimserve.trimming.compressor import Compressor
from trimserve.trimming.policies.flashsloth import FlashSlothRows
from trimserve.trimming.policies.quecc import QueCCRows
from trimserve.trimming.policies.registers import RegistersRows
from trimserve.trimming.policies.tokenpacker import TokenPackerRows
from trimserve.trimming.policies.wico import WiCoRows
from trimserve.trimming.trained import Shape

TILES, SIDE, WIDTH, ROWS = 2, 4, 12, 5
SIZE = 1 + SIDE * SIDE
MODULES = drawn_modules(Shape(WIDTH, SIZE, 2, ROWS))
TEXT = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))


def softmax(logits: list[Tensor]) -> list[Tensor]:
    return [*torch.stack(logits).softmax(dim=0)]


def total(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(dim=0)


def tokenpacker(module: TokenPackerRows, f: list[Tensor], region: list[int], _: int) -> tuple[Tensor, Tensor]:
    mean = torch.stack([f[n] for n in region]).mean(dim=0)
    q = module.query(module.coarse_norm(mean))
    k, v = ([of(module.fine_norm(f[n])) for n in region] for of in (module.key, module.value))
    weights = softmax([q @ each / math.sqrt(module.inside) for each in k])
    return mean, F.gelu(module.mixed(torch.cat([q, total(weights, v)])))


def flashsloth(module: FlashSlothRows, f: list[Tensor], region: list[int], _: int) -> tuple[Tensor, Tensor]:
    v, k = ([of(module.norm(each)) for each in f] for of in (module.value, module.key))
    a = softmax([module.saliency(module.norm(f[n]))[0] for n in region])
    parts = [total(a, [v[n] for n in region])]
    for e in module.queries:
        query = module.query(F.gelu(e + module.text(module.text_norm(TEXT))))
        parts.append(total(softmax([query @ each / math.sqrt(module.inside) for each in k]), v))
    return total(a, [f[n] for n in region]), F.gelu(module.joined(torch.cat(parts)))


def quecc(module: QueCCRows, f: list[Tensor], region: list[int], _: int) -> tuple[Tensor, Tensor]:
    text = module.text(module.text_norm(TEXT))
    x = [F.gelu(module.features(module.norm(each)) + text) for each in f]
    q = module.query(torch.stack([module.kernel[n % (SIZE - 1)] * x[n] for n in region]).mean(dim=0))
    a = softmax([q @ module.key(x[n]) / math.sqrt(module.inside) for n in region])
    seen = total(a, [module.value(module.norm(f[n])) for n in region])
    return total(a, [f[n] for n in region]), F.gelu(module.joined(torch.cat([seen, text])))


def registers(module: RegistersRows, f: list[Tensor], region: list[int], row: int) -> tuple[Tensor, Tensor]:
    k, v = ([of(module.norm(each)) for each in f] for of in (module.key, module.value))
    register, home = module.registers[row % (ROWS - 1)], module.home[row % (ROWS - 1), 0]
    u = torch.stack([v[n] for n in region]).mean(dim=0)
    a: list[Tensor] = []
    for _ in range(2):
        query = module.query(F.gelu(register + u))
        a = softmax([query @ k[n] / math.sqrt(module.inside) + home * (n in region) for n in range(len(f))])
        u = total(a, v)
    return total(a, f), F.gelu(register + u)


def wico(module: WiCoRows, f: list[Tensor], region: list[int], _: int) -> tuple[Tensor, Tensor]:
    joined = module.joined(torch.cat([module.norm(f[n]) for n in region]))
    return torch.stack([f[n] for n in region]).mean(dim=0), F.gelu(joined)


LITERAL: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "tokenpacker": tokenpacker,
    "wico": wico,
    "flashsloth": flashsloth,
    "quecc": quecc,
    "registers": registers,
}


@pytest.mark.parametrize("method", LITERAL)
@torch.no_grad()
def test_rows_are_the_literal_formula(method: str) -> None:
    module = MODULES[method]
    assert isinstance(module, Compressor)
    tiles = 3 * torch.randn(1, TILES, SIZE, WIDTH, generator=torch.Generator().manual_seed(2))
    (rows,), (group,) = module(tiles, TEXT[None])
    patches, output = tiles[0, :, 1:].flatten(0, 1), module.get_submodule("output")
    assert len(rows) == TILES * (ROWS - 1)
    for row, made in enumerate(rows):
        region = (group == row).nonzero()[:, 0].tolist()
        mean, change = LITERAL[method](module, [*patches], region, row)
        size = patches.square().mean().sqrt()
        torch.testing.assert_close(made, mean + size * output(change), atol=1e-5, rtol=1e-5)


def test_windows_are_the_squares_of_a_tile() -> None:
    module = MODULES["wico"]
    assert isinstance(module, Compressor)
    (group,) = module.group(torch.zeros(1, TILES * (SIZE - 1), WIDTH), TILES * (ROWS - 1))
    first = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert group.view(TILES, SIDE, SIDE).tolist() == [first, [[4 + n for n in line] for line in first]]
