"""Clients that die, stop reading or are in a hurry, a crash in a worker, too little memory: nobody else notices."""

import io
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from PIL import Image as PilImage
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from tests.forked import forked
from tests.imaging.files import empty_scans
from trimserve.client import Client, make_request
from trimserve.config import Config, EngineConfig, ServerConfig
from trimserve.imaging.decode import Pixels
from trimserve.model import processor
from trimserve.model.images import prepare_image
from trimserve.model.prepared import PreparedImage
from trimserve.process import read_page
from trimserve.serve import make_runner, make_server
from trimserve.server.running import InProcessServer
from trimserve.trimming.plan import scratch_bytes
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

MAX_BATCH = 4
LONG = 1900
"""Tokens that nearly fill the embedded model's context."""


def serve(**engine: object) -> InProcessServer:
    """The embedded model, with metrics, and one worker for images."""
    config = Config(
        engine=EngineConfig(max_batch=MAX_BATCH, num_preprocess_workers=1, **engine),  # type: ignore[arg-type]  # checked by pydantic
        server=ServerConfig(port=0, metrics_port=0),
    )
    return InProcessServer(make_server(make_runner(config), config))


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: InProcessServer) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


def picture(width: int = 128, height: int = 128, colour: str = "red") -> bytes:
    """An image file; of four tiles unless told otherwise."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def question(num_tokens: int, images: Sequence[bytes] = (), **sampling: object) -> pb.GenerateRequest:
    """A greedy request that generates so many tokens."""
    params = pb.SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True, **sampling)  # type: ignore[arg-type]  # names are checked by protobuf
    return make_request("What is this?", images, sampling=params)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so; fail when that takes longer than a test would."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def is_idle(client: Client) -> bool:
    status = client.status()
    return not (status.num_running or status.num_waiting or status.self_kv_bytes or status.cross_kv_bytes)


def num_cancelled(server: InProcessServer) -> int:
    """Requests whose clients went away, as the server counts them."""
    lines = read_page(f"http://{server.metrics_address}/metrics").decode().splitlines()
    [line] = (line for line in lines if line.startswith('trimserve_cancelled_requests_total{reason="client"'))
    return int(float(line.rsplit(" ", 1)[1]))


READS_UNTIL_KILLED = """
import sys
from trimserve.client import Client
from trimserve.v1 import generation_pb2 as pb

with Client(sys.argv[1]) as client:
    for event in client.stream(pb.GenerateRequest.FromString(bytes.fromhex(sys.argv[2]))):
        if event.WhichOneof("event") == "delta":
            print("reads", flush=True)
"""


def test_a_client_that_is_killed_frees_its_pages_and_harms_nobody(server: InProcessServer, client: Client) -> None:
    other = question(400, [picture(colour="green")])
    expected = client.generate(other).token_ids
    cancelled_before = num_cancelled(server)
    request = question(LONG, [picture()]).SerializeToString().hex()
    with forked(READS_UNTIL_KILLED, server.address, request) as process, ThreadPoolExecutor() as pool:
        assert process.stdout.readline() == "reads\n"
        answer = pool.submit(client.generate, other)
        process.send_signal(signal.SIGKILL)  # at once: a fast machine has the whole answer in a second
        assert answer.result().token_ids == expected
    until(lambda: is_idle(client))
    until(lambda: num_cancelled(server) == cancelled_before + 1)


SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 8192), ("grpc.http2.bdp_probe", 0)]
"""So that a reader's connection is full after some messages, not after some thousands."""


def test_a_reader_that_never_reads_holds_up_only_itself_and_misses_nothing(
    server: InProcessServer, client: Client
) -> None:
    num_tokens = 400
    wanted = question(num_tokens, num_top_logprobs=20)
    with grpc.insecure_channel(server.address, SMALL_WINDOW) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        streams = [stub.GenerateStream(wanted) for _ in range(MAX_BATCH)]
        for stream in streams:
            assert next(stream).HasField("started")
        assert client.generate(question(20)).token_ids
        # The engine is done with them: what is left of each answer waits, and holds no pages.
        until(lambda: is_idle(client))
        for stream in streams:
            *deltas, last = stream
            assert len(deltas) < num_tokens / 2  # what waited came together
            assert sum(len(event.delta.token_ids) for event in deltas) == num_tokens
            assert last.finished.usage.num_generated_tokens == num_tokens


class Crash(BaseException):
    """What a panic in compiled code arrives as."""


@pytest.mark.parametrize("error", [Crash("in the decoder"), SystemExit(1)], ids=["panic", "exit"])
def test_a_crash_in_the_image_worker_ends_its_request_alone(
    client: Client, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash_or_prepare(pixels: Pixels, image_processor: MllamaImageProcessorPil) -> PreparedImage:
        if tuple(pixels[0, 0]) == (255, 0, 0):
            raise error
        return prepare_image(pixels, image_processor)

    monkeypatch.setattr(processor, "prepare_image", crash_or_prepare)
    for _ in range(3):  # more than there are workers, and places for decoded images
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(question(1, [picture(colour="red")]), timeout_seconds=60)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "preparing request" in str(caught.value.details())
    assert client.generate(question(1, [picture(colour="green")])).token_ids
    assert is_idle(client)


def test_an_image_that_takes_too_long_costs_its_sender_an_error_and_one_process(
    server: InProcessServer, client: Client
) -> None:
    before = num_deaths(server)
    with pytest.raises(grpc.RpcError) as caught:
        client.generate(question(1, [picture(), empty_scans(500_000, side=256)]), timeout_seconds=60)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = r"parts\[1\].*must decode within 1 s of processor time and 0.25 s for each megapixel"
    assert re.search(expected, str(caught.value.details()))
    assert num_deaths(server) == before + 1
    assert client.generate(question(1, [picture()])).token_ids
    assert is_idle(client)


def num_deaths(server: InProcessServer) -> float:
    """Processes that took too long for an image."""
    page = read_page(f"http://{server.metrics_address}/metrics").decode()
    [line] = re.findall(r'^trimserve_decoder_deaths_total\{cause="processor_time"\} (.*)$', page, re.MULTILINE)
    return float(line)


def test_a_request_that_no_pool_of_this_size_can_hold_is_told_bytes_and_knob() -> None:
    positions, features = 16, 4 * 65  # a page, and an image of four tiles
    row_bytes = 3 * 384  # of the three layers of each kind
    pages = 10
    scratch = 2 * features * (192 * 4 + 384) + scratch_bytes(4, 65, 192)
    with (
        serve(max_images=1, kv_cache_bytes=scratch + pages * positions * row_bytes) as small,
        Client(small.address) as client,
    ):
        whole = question(1, [picture()])
        whole.trim.k_ratio = 0.5  # the heads together may pick every feature
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(whole)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        told = str(caught.value.details())
        of_images = -(-features // positions) * positions * row_bytes
        assert f"{of_images} of them for its images" in told
        assert f"the server has {pages * positions * row_bytes};" in told
        assert "trim.max_kept_fraction, or a larger kv_cache_bytes of the server, would make it fit" in told
        fitting = question(1, [picture()])
        fitting.trim.max_kept_fraction = 0.1
        assert client.generate(fitting).token_ids
        assert is_idle(client)


def test_calls_of_one_millisecond_leave_nothing_behind(client: Client) -> None:
    for timeout_seconds in [0.001] * 20 + [0.003, 0.01, 0.03]:
        with pytest.raises(grpc.RpcError) as caught:
            client.generate(question(LONG, [picture()]), timeout_seconds=timeout_seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: is_idle(client))
    assert client.generate(question(1, [picture()]), timeout_seconds=60).token_ids


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1)])
def test_an_image_of_one_pixel_by_ten_thousand_is_answered(client: Client, size: tuple[int, int]) -> None:
    response = client.generate(question(1, [picture(*size)]))
    assert response.token_ids
    # As long a grid of tiles as there is; the image covers a pixel of its width.
    assert response.usage.images[0].valid_features == 4 * 65
