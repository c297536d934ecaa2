"""Keys and values as int8: decoded rows read what a prompt's rows read, and pages take the bytes accounted."""

from collections.abc import Callable

import pytest
import torch

from tests.model.conftest import NO_TRIM, Pair
from tests.model.random_checkpoint import Geometry
from tests.model.test_mllama import ONE, noise, raw
from tests.tolerances import LOGITS, LOGITS_INT8
from trimserve.api.prompt import Prompt
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig, ModelConfig
from trimserve.errors import CheckpointError
from trimserve.executor.page_memory import page_memory
from trimserve.model.interruptible import run_through
from trimserve.model.kv_format import row_bytes
from trimserve.model.loading import load_model
from trimserve.ops import PAGE_POSITIONS
from trimserve.trimming.plan import TrimPlan

MERGED = TrimPlan.of(TrimRequest(k_ratio=0.1, merge_ratio=0.1))


@pytest.fixture(scope="module")
def int8(make_pair: Callable[..., Pair]) -> Pair:
    """The usual checkpoint with keys and values in int8."""
    return make_pair(Geometry(), kv_dtype="int8")


def question(pair: Pair, text: str = "before " + ONE) -> Prompt:
    return raw(text, [noise((2, 2), pair.ours.info.tile_size, 2)])


def test_a_token_gets_the_same_logits_decoded_and_in_a_prompt(int8: Pair) -> None:
    prompt = question(int8)
    expected, _ = int8.logits(prompt)
    prepared = int8.ours.prepare(prompt)
    *seen, last = prepared.token_ids
    shorter = int8.ours.prepare(question(int8, "before " + ONE[:-1]))
    assert list(shorter.token_ids) == seen
    kv = int8.granted(prepared)
    run_through(int8.ours.prefill(shorter, int8.encoded(shorter), NO_TRIM, kv))
    torch.testing.assert_close(int8.ours.decode([last], [kv])[0], expected[-1], atol=LOGITS, rtol=0)


def test_logits_follow_those_of_exact_keys_and_values(int8: Pair) -> None:
    prompt = question(int8)
    expected = int8.peer.logits(list(int8.ours.prepare(prompt).token_ids), [noise((2, 2), int8.ours.info.tile_size, 2)])
    logits, kv = int8.logits(prompt)
    assert kv.pages.dtype == torch.int8
    assert LOGITS < (logits - expected).std() < LOGITS_INT8 * expected.std()


def test_a_preempted_prompt_gets_the_same_bits_again(int8: Pair) -> None:
    prepared = int8.ours.prepare(question(int8))
    first, again = (int8.granted(prepared, 1) for _ in range(2))
    found = run_through(int8.ours.prefill(prepared, int8.encoded(prepared), MERGED, first))
    stored = run_through(int8.ours.prefill(prepared, int8.encoded(prepared), MERGED, again, found.kept_sets))
    assert torch.equal(stored.logits, found.logits)
    assert torch.equal(int8.ours.decode([5], [first]).clone(), int8.ours.decode([5], [again]))


def test_pages_take_the_bytes_that_are_accounted(int8: Pair) -> None:
    info = int8.ours.info
    assert info.kv_dtype == "int8"
    assert info.kv_bytes_per_position == 2 * info.num_kv_heads * row_bytes("int8", info.head_dim)
    pages = page_memory(info, 3, 2)
    assert pages.nbytes == 4 * 2 * PAGE_POSITIONS * info.kv_bytes_per_position


def test_4_times_the_requests_of_transformers_fit_at_11b_geometry_with_45_percent_held() -> None:
    rows, num_kv_heads, head_dim, num_cross = 4 * 1601, 8, 128, 8
    transformers = rows * num_cross * 2 * num_kv_heads * row_bytes("bfloat16", head_dim)
    pages = -(-int(0.45 * rows) // PAGE_POSITIONS)
    ours = pages * PAGE_POSITIONS * num_cross * 2 * num_kv_heads * row_bytes("int8", head_dim)
    assert transformers >= 4 * ours


def test_a_gpu_refuses_int8(monkeypatch: pytest.MonkeyPatch, int8: Pair) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("trimserve.ops.has_cuda_ops", lambda: True)
    with pytest.raises(CheckpointError, match="kv_dtype int8 is for the CPU; take auto, or device cpu"):
        load_model(ModelConfig(model=str(int8.folder), device="cuda", kv_dtype="int8"), EngineConfig())
