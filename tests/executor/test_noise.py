"""The noise is Gumbel's, and the documented function of seed, position and token id."""

import math

import pytest
import torch
from torch import Tensor

from trimserve.executor.noise import NOISE_RANGE, gumbel_noise, noise_keys


def noise(seed: int, position: int, num_tokens: int) -> Tensor:
    return gumbel_noise(noise_keys([seed], [position]), torch.arange(num_tokens))


def test_noise_differs_between_seeds_and_positions_and_is_gumbel() -> None:
    first = noise(7, 0, 20_000)
    assert torch.equal(first, noise(7, 0, 20_000))
    for other in (noise(8, 0, 20_000), noise(7, 1, 20_000)):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.03
    # Mean and standard deviation of the standard Gumbel distribution.
    assert first.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert first.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.03)


def test_noise_of_a_token_is_the_same_wherever_it_is_asked_for() -> None:
    seeds, positions = [0, 7, 2**64 - 1, 7], [3, 0, 9, 1]
    keys, token_ids = noise_keys(seeds, positions), torch.arange(301)
    batch = gumbel_noise(keys[:, None], token_ids)
    assert torch.equal(batch, torch.stack([noise(*row, 301) for row in zip(seeds, positions, strict=True)]))
    rows, ids = torch.tensor([3, 0, 0, 2, 1]), torch.tensor([300, 5, 0, 17, 5])
    assert torch.equal(gumbel_noise(keys[rows], ids), batch[rows, ids])
    assert torch.equal(token_ids, torch.arange(301))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (5, 1000), (2**63, 7), (2**64 - 1, 3)])
def test_noise_is_the_documented_splitmix64(seed: int, position: int) -> None:
    # Whoever sends a seed again gets the same tokens, whatever the version or device.
    def mix(bits: int) -> int:
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
        return bits ^ bits >> 31

    key = mix((mix(seed) + position) % 2**64)
    bits = [mix((key + token_id * 0x9E3779B97F4A7C15) % 2**64) >> 12 for token_id in range(6)]
    expected = [-math.log(-math.log((upper + 0.5) / 2**52)) for upper in bits]
    assert noise(seed, position, 6).tolist() == pytest.approx(expected)


def test_the_range_covers_every_draw() -> None:
    lowest, highest = (-math.log(-math.log(u)) for u in (2.0**-53, 1 - 2.0**-53))
    assert highest - lowest < NOISE_RANGE
