"""Traces, as a real collector gets them over OTLP: who is whose parent, what a span says, and where its id is told."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.patience import PATIENCE_SECONDS, soon
from tests.server.conftest import Loopback
from tests.server.fakes import STARTED, FakeRunner, Pause, chat_request
from tests.server.test_metrics import get
from trimserve import config
from trimserve.client import make_request
from trimserve.config import Config, EngineConfig, ServerConfig
from trimserve.errors import RequestFailed
from trimserve.loopback import proxy_options
from trimserve.model.loading import embedded_model_folder
from trimserve.serve import make_runner, make_server
from trimserve.server.logs import configure_logging
from trimserve.server.running import running_server
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1 import generation_pb2_grpc

SAMPLES = sorted((embedded_model_folder().parent / "samples").glob("*.png"))

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    spans: list[Span] = field(default_factory=list)
    resource: dict[str, AnyValue] = field(default_factory=dict)

    async def Export(  # noqa: N802 the RPC's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, _context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for of_resource in request.resource_spans:
            self.resource = {pair.key: pair.value for pair in of_resource.resource.attributes}
            for scope in of_resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@dataclass
class Traced:
    """What became of one traced call."""

    spans: dict[str, Span]
    """By name."""
    exposition: str
    """Of `/metrics`, as OpenMetrics."""


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    """A collector and its endpoint."""
    collector = Collector()
    server = grpc.aio.server()
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server  # has no types
    add(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield collector, f"http://127.0.0.1:{port}"
    await server.stop(0)


async def call(
    collector: tuple[Collector, str],
    request: pb.GenerateRequest,
    metadata: tuple[tuple[str, str], ...] = SAMPLED,
    *script: object,
    cancel: bool = False,
) -> Traced:
    """Make one streamed call; the collector has all of its spans once the server has stopped."""
    taken, endpoint = collector
    runner = FakeRunner(script) if script else FakeRunner()  # type: ignore[arg-type]  # any script
    server_config = ServerConfig(port=0, metrics_port=0, tracing_endpoint=endpoint)
    async with (
        running_server(make_server(runner, Config(server=server_config))) as server,
        grpc.aio.insecure_channel(server.address, proxy_options(server.address)) as channel,
    ):
        loopback = Loopback(runner, server, channel)
        stream = loopback.generation.GenerateStream(request, metadata=metadata)
        if cancel:
            await soon(runner.paused.wait())
            stream.cancel()
            await soon(runner.cancelled.wait())
        else:
            try:
                async for _ in stream:
                    pass
            except grpc.aio.AioRpcError:
                pass
        _, exposition = await asyncio.to_thread(get, loopback, "/metrics", "application/openmetrics-text")
    return Traced({span.name: span for span in taken.spans}, exposition)


def attributes(span: Span) -> dict[str, object]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "") for pair in span.attributes}


NAME = "trimserve.v1.GenerationService/GenerateStream"


async def test_a_call_continues_its_callers_trace_and_has_a_span_for_each_stage(
    collector: tuple[Collector, str],
) -> None:
    request = chat_request()
    request.request_id = "mine"
    spans = (await call(collector, request)).spans
    assert spans.keys() == {NAME, "queue", "prefill", "decode"}
    rpc = spans.pop(NAME)
    assert (rpc.trace_id.hex(), rpc.parent_span_id.hex(), rpc.kind) == (TRACE, CALLER, Span.SPAN_KIND_SERVER)
    for stage in spans.values():
        assert (stage.trace_id.hex(), stage.parent_span_id) == (TRACE, rpc.span_id)
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(1e6, abs=1e4)
    assert prefill.start_time_unix_nano - queue.end_time_unix_nano == pytest.approx(3e6, abs=1e6)
    assert decode.start_time_unix_nano == pytest.approx(prefill.end_time_unix_nano, abs=1e6)
    said = attributes(rpc)
    assert said.pop("gen_ai.response.finish_reasons")
    assert said == {
        "rpc.system": "grpc",
        "rpc.service": "trimserve.v1.GenerationService",
        "rpc.method": "GenerateStream",
        "rpc.grpc.status_code": 0,
        "trimserve.request_id": "mine",
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 3,
    }
    assert collector[0].resource["service.name"].string_value == "trimserve"


async def test_a_collector_on_loopback_is_reached_as_its_endpoint_says_whatever_the_environment_says(
    collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_INSECURE", "false")
    assert NAME in (await call(collector, chat_request())).spans


async def test_opentelemetry_can_be_switched_off_by_its_own_variable(
    collector: tuple[Collector, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    traced = await call(collector, chat_request())
    assert not traced.spans
    assert 'grpc_code="OK"' in traced.exposition


async def test_every_stage_of_a_question_about_images_reaches_the_collector(collector: tuple[Collector, str]) -> None:
    taken, endpoint = collector
    own = Config(
        engine=EngineConfig(num_threads=1),
        server=ServerConfig(port=0, metrics_port=0, tracing_endpoint=endpoint),
    )
    request = make_request("What do you see?", SAMPLES[:2], sampling=pb.SamplingParams(max_new_tokens=2))
    async with (
        running_server(make_server(make_runner(own), own)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        assert (await stub.Generate(request, metadata=SAMPLED)).usage.images[1].kept_features
    rpc, *stages = sorted(taken.spans, key=lambda span: span.kind != Span.SPAN_KIND_SERVER)
    assert [stage.name for stage in sorted(stages, key=lambda stage: stage.start_time_unix_nano)] == [
        "queue",
        *["image_decode"] * 2,
        "vision_encode",
        "prefill",
        "trim_select",
        "trim_gather",
        "decode",
    ]
    assert {(stage.trace_id.hex(), stage.parent_span_id) for stage in stages} == {(TRACE, rpc.span_id)}


@pytest.mark.parametrize(
    ("request_", "script", "code", "status"),
    [
        (pb.GenerateRequest(), (), 3, Status.STATUS_CODE_UNSET),
        (chat_request(), (STARTED, RequestFailed("NaN")), 13, Status.STATUS_CODE_ERROR),
    ],
)
async def test_only_what_is_the_servers_fault_is_an_error(
    collector: tuple[Collector, str],
    request_: pb.GenerateRequest,
    script: tuple[object, ...],
    code: int,
    status: int,
) -> None:
    spans = (await call(collector, request_, (*SAMPLED, ("x-request-id", "of-header")), *script)).spans
    assert attributes(spans[NAME])["rpc.grpc.status_code"] == code
    assert attributes(spans[NAME])["trimserve.request_id"] == "of-header"
    assert int(spans[NAME].status.code) == status
    assert not spans[NAME].events
    assert ("decode" in spans) == bool(script)


async def test_a_call_whose_client_goes_shows_how_far_it_came(collector: tuple[Collector, str]) -> None:
    spans = (await call(collector, chat_request(), SAMPLED, STARTED, Pause.UNTIL_RELEASED, cancel=True)).spans
    assert spans.keys() == {NAME, "queue", "prefill", "decode"}
    assert attributes(spans[NAME])["rpc.grpc.status_code"] == 1


async def test_a_caller_that_keeps_no_trace_gets_none(collector: tuple[Collector, str]) -> None:
    traced = await call(collector, chat_request(), UNSAMPLED)
    assert not traced.spans
    assert TRACE not in traced.exposition


async def test_buckets_lead_to_a_trace(collector: tuple[Collector, str]) -> None:
    lines = (await call(collector, chat_request())).exposition.splitlines()
    leading = {line.partition("_bucket")[0] for line in lines if f'# {{trace_id="{TRACE}"}}' in line}
    assert leading == {"trimserve_time_to_first_token_seconds", "trimserve_request_duration_seconds"}


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Leaves the loggers as they were."""
    root, ours = logging.getLogger(), logging.getLogger("trimserve")
    handlers, levels = root.handlers, (root.level, ours.level)
    yield
    root.handlers = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.mark.usefixtures("own_logging")
async def test_log_lines_of_a_call_name_its_trace(
    collector: tuple[Collector, str], capsys: pytest.CaptureFixture[str]
) -> None:
    written = configure_logging("info")
    await call(collector, chat_request())
    assert written.drain(PATIENCE_SECONDS)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("trace_id") for line in lines if line["event"] == "rpc"] == [TRACE]
    assert [line.get("trace_id") for line in lines if line["event"] == "stopped"] == [None]


def test_an_endpoint_without_the_extra_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(config, "distribution", missing)
    with pytest.raises(ValueError, match=r"pip install 'trimserve\[tracing\]'"):
        ServerConfig(tracing_endpoint="http://localhost:4317")


def test_a_server_without_tracing_does_not_load_opentelemetry() -> None:
    program = "import sys, trimserve.serve; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
