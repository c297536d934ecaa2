"""What memory there is and how much of it the pool takes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.fake_model import FakeModel
from trimserve.engine import memory
from trimserve.engine.memory import (
    activation_bytes,
    available_bytes,
    default_kv_cache_bytes,
    memory_by_kind,
    prefill_scratch_bytes,
    step_bytes,
)

INFO = FakeModel().info
# 4 images of 4 tiles of 5 features: 80 features of 2 float32 and one layer's keys and values, twice; and for one image
# at a time its likeness within tiles and what is made of its features three times.
SCRATCH = 2 * 80 * (2 * 4 + 8) + 4 * (4 * 5 * 5 + 3 * 20 * 2)


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 2000 kB\nMemFree: 100 kB\nMemAvailable:  1000 kB\nHugePages_Total: 0\n")
    return path


def test_available_is_what_the_kernel_says(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes("cpu", meminfo, tmp_path / "no cgroup") == 1000 * 1024


@pytest.mark.parametrize(("limit", "expected"), [("max", 1000 * 1024), ("5000", 3000), ("1000", 0)])
def test_the_limit_of_the_control_group_is_respected(meminfo: Path, tmp_path: Path, limit: str, expected: int) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert available_bytes("cpu", meminfo, tmp_path) == expected


def test_a_kernel_that_does_not_tell_what_is_available_tells_what_is_free_and_cached(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 2000 kB\nMemFree: 100 kB\nActive(file): 20 kB\nInactive(file): 3 kB\n")
    assert available_bytes("cpu", tmp_path / "meminfo", tmp_path / "no cgroup") == 123 * 1024


@pytest.mark.parametrize("text", [None, "", "MemAvailable:\nMemFree: much kB\n"])
def test_without_a_linux_kernel_s_account_all_memory_counts(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert available_bytes("cpu", tmp_path / "meminfo", tmp_path / "none") > 2**28


def test_what_the_allocator_of_a_gpu_holds_unused_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (1000, 9000), "memory_reserved": 700, "memory_allocated": 500}.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert available_bytes("cuda:0") == 1200
    # Of this cuBLAS takes its part before pages do.
    on_gpu = replace(INFO, device="cuda:0", max_model_len=2**40)
    assert default_kv_cache_bytes(on_gpu, 3, 32 * 2**20 + 10_000) == 9000
    assert default_kv_cache_bytes(on_gpu, 3, 10_000) == 0


def test_the_default_is_what_a_full_batch_can_use() -> None:
    # 128 positions are 8 pages in each of 2 groups of one layer; 80 features 5 pages in each of 3.
    pages = 3 * (2 * 8 + 3 * 5)
    assert default_kv_cache_bytes(INFO, 3, 2**40) == pages * 16 * 8 + SCRATCH
    assert prefill_scratch_bytes(INFO) == SCRATCH


def test_captured_steps_hold_what_they_read_and_what_the_largest_of_them_takes() -> None:
    info = replace(INFO, max_model_len=1000, vocab_size=7)  # 63 pages in each of 2 groups; 5 in each of 3
    tables, biases = 4 * (2 * 63 + 3 * 5), 4 * 3 * 5 * 16
    partials = 4 * 4 * 2 * (1 + 2)  # 1,000 positions in 4 pieces
    row = 4 * (5 * 2 + 4 * 1 + 3 * 6)
    assert step_bytes(info, 3) == 4 * (tables + biases + partials + 7 * 8 + row)  # a batch of 3 is padded to 4
    source = (Path(__file__).parents[2] / "csrc/cuda/paged_attention.cu").read_text()
    assert f"constexpr int kPiecePositions = {memory._PIECE_POSITIONS};" in source


def test_on_a_gpu_the_rows_of_the_longest_prompt_that_fits_count_and_what_steps_hold() -> None:
    info = replace(INFO, device="cuda:0", max_model_len=100)
    row = (5 * info.hidden_size + (info.num_heads + 2 * info.num_kv_heads) * info.head_dim) * 4
    in_mlp, steps = 3 * info.intermediate_size * 4, step_bytes(info, 3)
    assert activation_bytes(info, 3, 2**40) == 100 * (row + in_mlp) + steps
    few = 7 * (row + info.self_kv_bytes_per_token)  # the pool holds no more of a prompt
    assert activation_bytes(info, 3, few) == 7 * (row + in_mlp) + steps
    assert activation_bytes(INFO, 3, 2**40) == 0
    assert default_kv_cache_bytes(info, 3, 2**40) - activation_bytes(info, 3, 2**40) == default_kv_cache_bytes(
        replace(info, device="cpu"), 3, 2**40
    )


def test_of_several_ranks_each_sets_aside_what_rank_0_gathers() -> None:
    ranks = replace(INFO, tensor_parallel=2, num_heads=4, num_kv_heads=2, kv_bytes_per_position=16)
    # Features are whole on both, keys and values are cut; 80 gathered keys and the queries are there twice.
    assert prefill_scratch_bytes(ranks) == 2 * (SCRATCH + 80 * 16)
    query = 2 * 4 * ranks.head_dim * 4
    assert activation_bytes(ranks, 3, 2**40) == ranks.max_model_len * query
    few = 7 * (query + ranks.self_kv_bytes_per_token)  # the pool holds no more of a prompt
    assert activation_bytes(ranks, 3, few) == 7 * query
    on_gpus = replace(ranks, device="cuda:0", max_model_len=2**40)
    assert default_kv_cache_bytes(on_gpus, 3, 32 * 2**20 + 10_000) == 2 * 9000


def test_the_default_is_half_of_the_memory_where_that_is_less() -> None:
    assert default_kv_cache_bytes(replace(INFO, max_model_len=2**40), 3, 10_001) == 5000


def test_weights_adapters_the_pool_and_what_is_free_are_told_apart() -> None:
    kinds = memory_by_kind(replace(INFO, weight_bytes=20), 4096, 300)
    assert (kinds.pop("weights"), kinds.pop("kv"), kinds.pop("adapters")) == (20, 4096, 300)
    assert kinds.keys() == {"free"}
    assert kinds["free"] > 0
