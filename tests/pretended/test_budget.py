"""What a step and a prefill may cost on a GPU, in kernels, waits and copies: `csrc/cuda/step_budget.json`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.stepping import make_engine, start
from tests.model.test_mllama import noise, raw
from tests.pretended.device import Counts, Device
from tests.tolerances import LOGITS_BFLOAT16
from trimserve import ops
from trimserve.api.chunks import GenerationChunk, TokenDelta
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.engine.warm_up import warm_up
from trimserve.errors import TrimserveError
from trimserve.evaluation.pages import OwnPages
from trimserve.executor.sampling import SamplingState, sample
from trimserve.model import decoder_layers, key_values, mllama
from trimserve.model.bucketed_decode import CudaGraphs, Step
from trimserve.model.decoder_layers import RmsNorm
from trimserve.model.interruptible import run_through
from trimserve.model.mllama import Mllama
from trimserve.trimming import merging
from trimserve.trimming.plan import TrimPlan

ROOT = Path(__file__).parents[2]
BUDGET: dict[str, int] = json.loads((ROOT / "csrc/cuda/step_budget.json").read_text())
GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
TOP_P = SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=0.8, top_p=0.9, seed=1)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As the package computes."""
    with torch.inference_mode():
        yield


def total(*counters: "dict[str, int]") -> int:
    return sum(sum(counter.values()) for counter in counters)


def prefill(model: Mllama, gpu: Device, merge_ratio: float = 0.0) -> Counts:
    """Of a prompt about one image."""
    return prefilled(model, gpu, merge_ratio)[1]


def prefilled(model: Mllama, gpu: Device, merge_ratio: float = 0.0) -> tuple[Tensor, Counts]:
    """The logits, and what they cost."""
    pool = OwnPages(model.info, 2**22)
    prompt = model.prepare(raw("an image<|image|>and words", [noise((2, 2), model.info.tile_size)]))
    trim = TrimPlan.of(TrimRequest(k_ratio=0.1, merge_ratio=merge_ratio))
    [image] = prompt.images
    kv = pool.key_values(len(prompt.token_ids) + 8, image.num_tiles * model.info.features_per_tile)
    with gpu.counting() as counts:
        encoded = run_through(model.encode_image(image, trim.needs))
        result = run_through(model.prefill(prompt, [encoded], trim, kv))
    return result.logits.cpu(), counts


def test_a_captured_step_has_few_kernels(model: Mllama, gpu: Device) -> None:
    counted: list[Counts] = []

    def capture(step: Step) -> Step:
        with gpu.counting() as counts, gpu.capturing():
            step()
        counted.append(counts)
        return step

    model.warm_up_decode(OwnPages(model.info, 2**22).pages, 1, capture)
    with_images, text_only = (total(counts.kernels) for counts in counted)
    beside = BUDGET["kernels_of_a_step_beside"]
    of_text = model.info.num_self_attention_layers * BUDGET["kernels_of_a_self_attention_layer"] + beside
    of_images = model.info.num_cross_attention_layers * BUDGET["kernels_of_a_cross_attention_layer"]
    assert text_only <= of_text, counted[1].kernels
    assert with_images <= of_text + of_images, counted[0].kernels


def test_steps_are_captured_on_one_stream_for_which_cublas_keeps_one_workspace(
    model: Mllama,
    gpu: Device,  # noqa: ARG001 - of graphs
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[type] = []

    class Watched(torch.cuda.Stream):  # a pretended one
        def __init__(self) -> None:
            made.append(type(self))

    monkeypatch.setattr(torch.cuda, "Stream", Watched)
    model.warm_up_decode(OwnPages(model.info, 2**22).pages, 4, CudaGraphs())
    assert len(made) == 1


@pytest.mark.parametrize("sampling", [GREEDY, TOP_P], ids=["greedy", "top_p"])
def test_a_decode_step_waits_for_its_tokens_only(model: Mllama, gpu: Device, sampling: SamplingParams) -> None:
    engine = make_engine(model, max_batch=4, kv_cache_bytes=2**24)
    warm_up(engine)
    prompts = [raw("some words", []), raw("Look:<|image|>What?", [noise((2, 2), model.info.tile_size)])]
    outputs = [
        start(engine, GenerationRequest(str(row), prompt, sampling, TrimRequest(k_ratio=0.1)))[1]
        for row, prompt in enumerate(prompts)
    ]
    while any(len(output) < 3 for output in outputs):
        engine.step()
    with gpu.counting() as counts:
        engine.step()
    found = total(counts.waits, counts.blocking_copies) + counts.event_waits
    assert found <= BUDGET["waits_of_a_step"], counts
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("sampling", [GREEDY, TOP_P], ids=["greedy", "top_p"])
def test_the_next_step_is_launched_before_tokens_are_handed_out(
    model: Mllama, gpu: Device, sampling: SamplingParams
) -> None:
    engine = make_engine(model, max_batch=4, kv_cache_bytes=2**24)
    warm_up(engine)
    launched: list[int] = []

    def sink(chunk: GenerationChunk | TrimserveError) -> None:
        if isinstance(chunk, TokenDelta):
            launched.append(counts.replays)

    wanted = GenerationRequest("a", raw("some words", []), sampling, TrimRequest())
    with gpu.counting() as counts:
        engine.add(engine.prepare(wanted, sink, 0.0))
        while engine.has_work:
            engine.step()
    num_steps = len(launched) - 1  # the first token is the prompt's
    assert launched == [0, *range(2, num_steps + 1), num_steps]


def test_merging_waits_once_a_round(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    ordinary = merging._next_anchors

    def counted(*arguments: Any) -> Tensor:
        nonlocal rounds
        rounds += 1
        return ordinary(*arguments)

    monkeypatch.setattr(merging, "_next_anchors", counted)
    keys = torch.randn(2 * 200, 2, 16, generator=torch.Generator().manual_seed(0)).to("cuda")
    kept = torch.arange(0, 400, 10).to("cuda")
    with gpu.counting() as counts:
        merging.group_dropped(keys, kept, (400,), 200, 0.4)
    assert rounds > 4
    assert total(counts.waits, counts.blocking_copies) <= rounds + BUDGET["waits_of_merging_beside_its_rounds"], counts


def test_a_prefill_waits_for_what_was_selected_only(model: Mllama, gpu: Device) -> None:
    counts = prefill(model, gpu)
    found = total(counts.waits, counts.blocking_copies)
    assert found <= BUDGET["waits_and_blocking_copies_of_a_prefill"], (counts.waits, counts.blocking_copies)


def test_a_slice_of_a_prefill_waits_for_each_layer_but_the_last(model: Mllama, gpu: Device) -> None:
    engine = make_engine(model, max_batch=1, kv_cache_bytes=2**24)
    _, output = start(engine, GenerationRequest("text", raw("some words", []), GREEDY, TrimRequest()))
    with gpu.counting() as counts:
        while not output:
            engine.step()
    assert counts.event_waits >= model.info.num_self_attention_layers + model.info.num_cross_attention_layers - 1
    while engine.has_work:
        engine.step()


def test_a_long_prompt_goes_through_each_mlp_in_pieces(
    model: Mllama, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = prefilled(model, gpu)
    longest: list[int] = []
    gate = ops.silu_gate

    def watched(rows: Tensor, counts: Tensor | None) -> Tensor:
        longest.append(len(rows))
        return gate(rows, counts)

    monkeypatch.setattr(decoder_layers, "MLP_ROWS", 3)
    monkeypatch.setattr(ops, "silu_gate", watched)
    logits, _ = prefilled(model, gpu)
    assert max(longest) == 3
    torch.testing.assert_close(logits, expected, atol=LOGITS_BFLOAT16 * expected.std().item(), rtol=0)


def test_attention_is_by_kernels_for_any_shape_that_keep_no_logits(model: Mllama, gpu: Device) -> None:
    counts = prefill(model, gpu, merge_ratio=0.2)
    assert counts.kernels["aten::scaled_dot_product_attention"] > 0
    assert not counts.cudnn_attention
    assert not counts.large_attention


@pytest.mark.parametrize(
    ("sampling", "budget"), [(GREEDY, "kernels_of_greedy_sampling"), (TOP_P, "kernels_of_top_p_sampling")]
)
def test_sampling_has_few_kernels(gpu: Device, sampling: SamplingParams, budget: str) -> None:
    logits = (torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 5).to("cuda")
    states = [SamplingState(sampling, (1, 2), frozenset()) for _ in range(3)]
    with gpu.counting() as counts:
        sample(logits, states)
    assert total(counts.kernels) <= BUDGET[budget], counts.kernels


def test_an_item_in_the_step_fails(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_capture_fails(model, monkeypatch, lambda rows: rows * rows.amax().item(), "waits for the device")


def test_a_tensor_of_the_host_in_the_step_fails(model: Mllama, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_capture_fails(model, monkeypatch, lambda rows: rows + torch.tensor(1.0).cuda(), "copies from the host")


def assert_capture_fails(
    model: Mllama, monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[Tensor], Tensor], reason: str
) -> None:
    ordinary = RmsNorm.__call__
    monkeypatch.setattr(RmsNorm, "__call__", lambda norm, rows: ordinary(norm, spoilt(rows)))
    with pytest.raises(RuntimeError, match=reason):
        model.warm_up_decode(OwnPages(model.info, 2**22).pages, 1, CudaGraphs())


def test_uploads_that_are_waited_for_break_the_budget_of_a_prefill(
    model: Mllama, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_values, "upload", lambda values, device: torch.from_numpy(values).to(device))
    monkeypatch.setattr(mllama, "upload_ids", lambda ids, device: torch.tensor(list(ids), device=device))
    counts = prefill(model, gpu)
    assert total(counts.blocking_copies) == 2, counts.blocking_copies
