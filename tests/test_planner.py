"""`trimserve plan` beside a server of the same model, and beside what is known of Llama-3.2-Vision 11B."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ByteSize
from transformers import MllamaConfig
from typer.testing import CliRunner

from tests.engine.stepping import make_engine, start
from trimserve.api.prompt import ImageFile, RawPrompt
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.api.trim import TrimRequest
from trimserve.cli import app
from trimserve.client import Client, make_request
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.memory import kv_budget
from trimserve.model.loading import describe_model, embedded_model_folder, load_model
from trimserve.serve import in_process_server
from trimserve.v1 import generation_pb2 as pb

SCENE = embedded_model_folder().parent / "samples/scene.png"
POOL = "12MiB"
POOL_BYTES = 12 * 2**20
GIB = 2**30


def planned(*options: object, fits: bool = True) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", *map(str, options), "--json"])
    assert result.exit_code == (0 if fits else 1), result.output
    document: dict[str, Any] = json.loads(result.stdout)
    assert (document["limit"] is None) == fits
    return document


def refusal(*options: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, options)])
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


def test_a_plan_has_the_bytes_that_a_server_reports() -> None:
    request = make_request("?", [SCENE], trim=pb.TrimOptions(k_ratio=1))
    knobs = EngineConfig(kv_cache_bytes=ByteSize(POOL_BYTES))
    with in_process_server(engine=knobs) as server, Client(server.address) as client:
        answer, model, status = client.generate(request), client.model(), client.status()
    [image] = answer.usage.images
    tiles = image.valid_features // model.features_per_tile
    plan = planned("--memory", "2GiB", "--kv-cache-bytes", POOL, "--k-ratio", 1, "--tiles", tiles)
    assert plan["weight_bytes"] == model.weight_bytes
    assert 0 <= plan["kv_cache_bytes"] - plan["scratch_bytes"] - status.kv_capacity_bytes < 2**17  # part of a page
    assert plan["cross_kv_bytes_per_request"] == answer.cross_kv_bytes.held == answer.cross_kv_bytes.untrimmed


def test_as_many_requests_are_planned_as_an_engine_runs() -> None:
    model = load_model(ModelConfig(), EngineConfig())
    # An answer of a page at most has all of its pages from the begin.
    sampling, trim = SamplingParams(max_new_tokens=16, ignore_eos=True), TrimRequest(enabled=False)
    prompt = RawPrompt(
        "<|image|>" + "so long a prompt that text takes more than a page " * 6, (ImageFile(SCENE.read_bytes()),)
    )
    engine = make_engine(model, kv_cache_bytes=ByteSize(POOL_BYTES), max_batch=64, prefill_slice_seconds=1e9)
    sequences = [start(engine, GenerationRequest(str(i), prompt, sampling, trim))[0] for i in range(24)]
    tokens, tiles = sequences[0].max_positions, sequences[0].max_cross_rows // model.info.features_per_tile
    engine.step()
    num_running = sum(sequence.holds_pages for sequence in sequences)
    options = ("--memory", "2GiB", "--kv-cache-bytes", POOL, "--k-ratio", 1, "--tokens", tokens, "--tiles", tiles)
    assert 1 < num_running == planned(*options)["num_requests"] < len(sequences)
    refused = planned(*options, "--requests", num_running + 1, fits=False)
    assert (refused["num_fitting"], refused["limit"]) == (num_running, "the pages of keys and values")


@pytest.fixture(scope="module")
def llama_11b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with its config, which is transformers' default but for the image size, and no weights."""
    folder = tmp_path_factory.mktemp("11b")
    MllamaConfig(vision_config={"image_size": 560}, dtype="bfloat16").save_pretrained(folder)
    return folder


def test_llama_11b_has_its_published_size_and_its_keys_and_values(llama_11b: Path) -> None:
    plan = planned("--model", llama_11b, "--gpu-memory", "40GiB", "--k-ratio", 1, "--tokens", 1024, "--bandwidth", 2000)
    assert plan["weight_bytes"] == 2 * 10_670_220_835
    assert plan["self_kv_bytes_per_request"] == 1024 * 128 * 2**10  # 32 layers of 8 heads of 128
    assert plan["cross_kv_bytes_per_request"] == 401 * 16 * 32 * 2**10  # 4 tiles of 1601 features, in 8 layers
    held = plan["self_kv_bytes_per_request"] + plan["cross_kv_bytes_per_request"]
    assert plan["step_bytes"] - plan["step_bytes_alone"] == (plan["num_requests"] - 1) * held
    assert plan["floor_ms"] == plan["step_bytes"] / 2e9
    # The share of a GPU that a server takes is full but for a request.
    assert held > 0.9 * (40 * GIB - plan["weight_bytes"]) - plan["scratch_bytes"] - plan["num_requests"] * held >= 0


def test_kept_features_make_room_for_more_requests_and_all_of_one_are_needed_to_join(llama_11b: Path) -> None:
    options = ("--model", llama_11b, "--gpu-memory", "40GiB")
    untrimmed, trimmed = planned(*options), planned(*options, "--kept-fraction", 0.5)
    assert trimmed["cross_kv_bytes_per_request"] == 201 * 16 * 32 * 2**10  # 3202 features
    assert trimmed["joining_kv_bytes"] == untrimmed["joining_kv_bytes"]
    assert trimmed["num_requests"] > untrimmed["num_requests"]


def test_trimmed_int8_pages_hold_four_times_the_requests_of_transformers(llama_11b: Path) -> None:
    options = ("--kv-dtype", "int8", "--kept-fraction", 0.45, "--tokens", 64)
    plan = planned("--model", llama_11b, "--memory", "40GiB", *options)
    bytes_of_row = 2 * 8 * 128 * 2  # a key and a value of 8 heads of 128 in bfloat16
    theirs = (8 * 4 * 1601 + 32 * 64) * bytes_of_row  # all features of 4 tiles in 8 layers, the text in 32
    assert theirs > 4 * (plan["self_kv_bytes_per_request"] + plan["cross_kv_bytes_per_request"])


def test_tensor_parallel_devices_divide_linear_layers_and_keys_and_values(llama_11b: Path) -> None:
    options = ("--model", llama_11b, "--gpu-memory")
    assert planned(*options, "18GiB", fits=False)["limit"] == "the weights are larger than the memory"
    rank, whole = planned(*options, "24GiB", "--tensor-parallel", 2), planned(*options, "40GiB")
    assert rank["weight_bytes"] == pytest.approx(12.0e9, rel=0.03)  # as measured of a sharded model
    assert rank["step_bytes_alone"] == pytest.approx(whole["step_bytes_alone"] / 2, rel=1e-3)  # norms are on both
    for name in ("self_kv_bytes_per_request", "cross_kv_bytes_per_request"):
        assert rank[name] == whole[name] // 2
    refused = CliRunner().invoke(app, ["plan", *map(str, options), "24GiB", "--tensor-parallel", "3"]).exception
    assert "must divide the 8 KV heads" in str(refused)


@pytest.mark.parametrize(("where", "memory", "num_devices"), [("cuda:0", "--gpu-memory", 2), ("cpu", "--memory", 1)])
def test_devices_or_processes_that_share_a_model_are_planned_as_their_server_sizes_its_pool(
    llama_11b: Path, monkeypatch: pytest.MonkeyPatch, where: str, memory: str, num_devices: int
) -> None:
    plan = planned("--model", llama_11b, memory, "48GiB", "--tensor-parallel", 2, "--image-cache-bytes", "100MiB")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    limits = EngineConfig(tensor_parallel=2, max_batch=plan["num_requests"])
    info = describe_model(ModelConfig(model=str(llama_11b)), limits, where)
    weights = info.weight_bytes // num_devices
    total, scratch = kv_budget(info, limits, limits.max_batch, 48 * GIB - weights)
    assert [plan[name] for name in ("weight_bytes", "kv_cache_bytes", "scratch_bytes")] == [
        weights,
        total // num_devices,
        scratch // num_devices,
    ]
    # Each process has a cache and an encoder of its own.
    assert plan["image_cache_bytes"] == 2 // num_devices * 100 * 2**20


def test_quantized_linear_layers_take_half(llama_11b: Path) -> None:
    plain, int8 = (
        planned("--model", llama_11b, "--memory", "64GiB", "--requests", 1, *more)
        for more in ((), ("--quantize", "int8"))
    )
    assert int8["step_bytes_alone"] == pytest.approx(plain["step_bytes_alone"] / 2, rel=0.02)


def test_what_is_left_must_hold_cached_images_and_the_encoder(llama_11b: Path) -> None:
    options = ("--model", llama_11b, "--gpu-memory", "40GiB", "--kv-cache-bytes", "20GiB")
    assert planned(*options, "--image-cache-bytes", 0, fits=False)["limit"].startswith("image_cache_bytes")
    assert planned(*options[:-1], "30GiB", fits=False)["limit"] == "kv_cache_bytes is more than the weights leave"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "must be given, or --memory for a CPU"),
        (("--gpu-memory", "1GiB", "--memory", "1GiB"), "not both"),
        (("--gpu-memory", "much"), "must be a size such as 24GiB, got 'much'"),
        (("--gpu-memory", "1GiB", "--device", "cpu"), "is not for --device cpu"),
        (("--memory", "1GiB", "--kept-fraction", 0), "must be in (0, 1], got 0.0"),
        (("--memory", "1GiB", "--bandwidth", 0), "must be above 0 and finite, got 0.0"),
        (("--memory", "1GiB", "--tokens", 9999), "--tokens: must be at most 2048, got 9999"),
        (("--memory", "1GiB", "--images", 9), "--images: must be at most 8, got 9"),
        (("--memory", "1GiB", "--tiles", 9), "--tiles: must be at most 4, got 9"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options: tuple[object, ...], words: str) -> None:
    assert words in refusal(*options)
