"""What one request adds to the metrics, and how they are served."""

import asyncio
import http.client
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import grpc
import pytest

from tests.patience import PATIENCE_SECONDS, soon
from tests.server.conftest import Loopback
from tests.server.fakes import CONFIG, DELTAS, FINISHED, STARTED, FakeRunner, Pause, Script, chat_request
from trimserve.api.chunks import Started, TokenDelta
from trimserve.api.status import EngineStatus
from trimserve.errors import DeadlinePassed, EngineBusy, EngineStopped, RequestFailed
from trimserve.serve import make_server
from trimserve.server import lifecycle
from trimserve.server.loop_lag import INTERVAL_SECONDS
from trimserve.v1 import generation_pb2 as pb

TIMES = {
    "trimserve_request_duration_seconds",
    "trimserve_time_to_first_token_seconds",
    "trimserve_inter_token_latency_seconds",
    "trimserve_request_time_per_output_token_seconds",
    "grpc_server_handling_seconds",
}
"""Histograms of the clock: how much they observed is not known beforehand, how often is."""


def get(loopback: Loopback, path: str, accept: str = "text/plain") -> tuple[int, str]:
    """Status and body of an HTTP GET from the metrics port."""
    assert loopback.server.metrics_address is not None
    connection = http.client.HTTPConnection(loopback.server.metrics_address, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path, headers={"Accept": accept})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def parse(text: str) -> dict[str, float]:
    """Series -> value, buckets and the process's own left out."""

    def series() -> Iterator[tuple[str, float]]:
        for line in text.splitlines():
            name, _, value = line.rpartition(" ")
            if not line.startswith(("#", "process_")) and "_bucket{" not in line:
                yield name, float(value)

    return dict(series())


async def scrape(loopback: Loopback) -> dict[str, float]:
    status, text = await asyncio.to_thread(get, loopback, "/metrics")
    assert status == 200
    return parse(text)


async def added(loopback: Loopback, request: pb.GenerateRequest, *, is_streamed: bool = False) -> dict[str, float]:
    """What a request, which may fail, adds to every series; sums of times, and what goes by the clock, left out."""
    before = await scrape(loopback)
    call = loopback.generation.GenerateStream(request) if is_streamed else None
    try:
        if call is None:
            await loopback.generation.Generate(request)
        else:
            async for _ in call:
                pass
    except grpc.aio.AioRpcError:
        pass
    after = await scrape(loopback)
    assert after.keys() == before.keys()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    changed = {name: value for name, value in changed.items() if not name.startswith("trimserve_event_loop_lag")}
    return {name: value for name, value in changed.items() if re.split(r"_sum\b", name)[0] not in TIMES}


def rpc(method: str, code: str = "") -> str:
    """Labels of a `grpc_server_*` series."""
    kind = "server_stream" if method == "GenerateStream" else "unary"
    labels = {"grpc_method": method, "grpc_service": "trimserve.v1.GenerationService", "grpc_type": kind}
    labels |= {"grpc_code": code} if code else {}
    return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(labels.items())) + "}"


async def test_a_request_with_several_answers_counts_once_with_all_of_its_tokens(loopback: Loopback) -> None:
    request, deltas = chat_request(), [TokenDelta("a", (1, 2)), TokenDelta("b", (3,), choice=1)]
    request.num_choices = 2
    ends = [replace(FINISHED, choice=1, num_generated_tokens=1), replace(FINISHED, num_generated_tokens=2)]
    loopback.runner.script = (STARTED, *deltas, *ends)
    seen = await added(loopback, request, is_streamed=True)
    assert seen['trimserve_requests_total{finish_reason="stop",method="GenerateStream"}'] == 1
    assert seen["trimserve_generation_tokens_total"] == seen["trimserve_request_generation_tokens_sum"] == 3
    assert seen["trimserve_request_generation_tokens_count"] == 1
    assert seen['trimserve_inter_token_latency_seconds_count{trimming="on"}'] == 1
    assert seen['trimserve_cross_kv_bytes_saved_total{cause="trimming"}'] == 5120


async def test_one_finished_request_adds_exactly_this(loopback: Loopback) -> None:
    request = chat_request()
    assert await added(loopback, request, is_streamed=True) == pytest.approx(
        {
            f"grpc_server_started_total{rpc('GenerateStream')}": 1,
            f"grpc_server_handled_total{rpc('GenerateStream', 'OK')}": 1,
            f"grpc_server_msg_received_total{rpc('GenerateStream')}": 1,
            f"grpc_server_msg_sent_total{rpc('GenerateStream')}": 5,
            f"grpc_server_handling_seconds_count{rpc('GenerateStream')}": 1,
            'trimserve_requests_total{finish_reason="stop",method="GenerateStream"}': 1,
            'trimserve_trim_requests_total{outcome="trimmed",policy="trimmed"}': 1,
            'trimserve_request_duration_seconds_count{method="GenerateStream",trimming="on"}': 1,
            'trimserve_time_to_first_token_seconds_count{trimming="on"}': 1,
            'trimserve_inter_token_latency_seconds_count{trimming="on"}': 2,
            'trimserve_request_time_per_output_token_seconds_count{trimming="on"}': 1,
            "trimserve_queue_time_seconds_count": 1,
            "trimserve_queue_time_seconds_sum": 0.001,
            'trimserve_stage_duration_seconds_count{stage="preprocess"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="preprocess"}': 0.002,
            'trimserve_stage_duration_seconds_count{stage="vision_encode"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="vision_encode"}': 0.003,
            'trimserve_stage_duration_seconds_count{stage="prefill"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="prefill"}': 0.004,
            'trimserve_stage_duration_seconds_count{stage="decode"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="decode"}': 0.005,
            'trimserve_stage_duration_seconds_count{stage="image_decode"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="image_decode"}': 0.0015,
            'trimserve_stage_duration_seconds_count{stage="trim_select"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="trim_select"}': 0.0025,
            'trimserve_stage_duration_seconds_count{stage="trim_gather"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="trim_gather"}': 0.0005,
            'trimserve_stage_duration_seconds_count{stage="detokenize"}': 1,
            'trimserve_stage_duration_seconds_sum{stage="detokenize"}': 0.0001,
            'trimserve_batch_size_count{phase="prefill"}': 1,
            'trimserve_batch_size_sum{phase="prefill"}': 1,
            "trimserve_prompt_tokens_total": 20,
            "trimserve_request_prompt_tokens_count": 1,
            "trimserve_request_prompt_tokens_sum": 20,
            "trimserve_generation_tokens_total": 3,
            "trimserve_request_generation_tokens_count": 1,
            "trimserve_request_generation_tokens_sum": 3,
            "trimserve_request_images_count": 1,
            "trimserve_request_images_sum": 1,
            'trimserve_visual_features_total{state="valid"}': 10,
            'trimserve_visual_features_total{state="kept"}': 4,
            'trimserve_visual_features_total{state="dropped"}': 6,
            'trimserve_visual_features_total{state="padding"}': 10,
            'trimserve_visual_features_total{state="merged"}': 1,
            'trimserve_kept_fraction_count{policy="trimmed"}': 1,
            'trimserve_kept_fraction_sum{policy="trimmed"}': 0.5,
            'trimserve_trim_select_seconds_count{policy="trimmed"}': 1,
            'trimserve_trim_select_seconds_sum{policy="trimmed"}': 0.0025,
            'trimserve_request_cross_kv_bytes_count{state="untrimmed"}': 1,
            'trimserve_request_cross_kv_bytes_sum{state="untrimmed"}': 8192,
            'trimserve_request_cross_kv_bytes_count{state="held"}': 1,
            'trimserve_request_cross_kv_bytes_sum{state="held"}': 2048,
            'trimserve_cross_kv_bytes_saved_total{cause="padding"}': 4096,
            'trimserve_cross_kv_bytes_saved_total{cause="trimming"}': 5120,
            'trimserve_cross_kv_bytes_saved_total{cause="visibility"}': 1024,
        }
    )


TEXT_ONLY = replace(STARTED, images=())
UNTRIMMED = replace(
    STARTED, images=tuple(replace(image, kept_features=10, merged_features=0) for image in STARTED.images)
)


@pytest.mark.parametrize(
    ("started", "mode", "outcome"),
    [
        (STARTED, pb.TRIM_MODE_ON, "trimmed"),
        (UNTRIMMED, pb.TRIM_MODE_ON, "bypassed_no_gain"),
        (TEXT_ONLY, pb.TRIM_MODE_ON, "bypassed_text_only"),
        (UNTRIMMED, pb.TRIM_MODE_OFF, "disabled"),
    ],
)
async def test_what_trimming_did_is_told_apart(
    loopback: Loopback, started: Started, mode: pb.TrimMode, outcome: str
) -> None:
    request = chat_request()
    request.trim.mode, request.trim.policy = mode, "cls"
    loopback.runner.script = (started, *DELTAS, FINISHED)
    change = await added(loopback, request)
    is_asked = outcome in {"trimmed", "bypassed_no_gain"}
    policy = "cls" if is_asked else "none"
    assert change[f'trimserve_trim_requests_total{{outcome="{outcome}",policy="{policy}"}}'] == 1
    for name in ("kept_fraction", "trim_select_seconds"):
        assert (f'trimserve_{name}_count{{policy="cls"}}' in change) == is_asked
    assert ('trimserve_request_cross_kv_bytes_count{state="held"}' in change) == bool(started.images)
    trimming = "off" if outcome == "disabled" else "on"
    assert change[f'trimserve_time_to_first_token_seconds_count{{trimming="{trimming}"}}'] == 1


REJECTED = "trimserve_admission_rejections_total"
CUT = "trimserve_cancelled_requests_total"


@pytest.mark.parametrize(
    ("script", "finish_reason", "also"),
    [
        ((EngineBusy("full"),), "rejected", f'{REJECTED}{{reason="queue_full"}}'),
        ((EngineStopped("stopped"),), "rejected", f'{REJECTED}{{reason="stopped"}}'),
        ((DeadlinePassed("late"),), "deadline", f'{REJECTED}{{reason="deadline"}}'),
        ((STARTED, EngineStopped("stopped")), "cancelled", f'{CUT}{{reason="shutdown"}}'),
        ((STARTED, DeadlinePassed("late")), "deadline", f'{CUT}{{reason="deadline"}}'),
        ((STARTED, RequestFailed("NaN")), "error", 'trimserve_engine_errors_total{kind="model"}'),
        ((STARTED, ValueError("bug")), "error", 'trimserve_engine_errors_total{kind="internal"}'),
    ],
)
async def test_how_a_request_ended_is_told_apart(
    loopback: Loopback, script: Script, finish_reason: str, also: str
) -> None:
    loopback.runner.script = script
    change = await added(loopback, chat_request())
    families = ("trimserve_requests_total", REJECTED, CUT, "trimserve_engine_errors_total")
    assert {name: value for name, value in change.items() if name.startswith(families)} == {
        f'trimserve_requests_total{{finish_reason="{finish_reason}",method="Generate"}}': 1,
        also: 1,
    }


async def test_an_invalid_request_is_rejected_and_nothing_else(loopback: Loopback) -> None:
    change = await added(loopback, pb.GenerateRequest())
    assert change == {
        f"grpc_server_started_total{rpc('Generate')}": 1,
        f"grpc_server_handled_total{rpc('Generate', 'INVALID_ARGUMENT')}": 1,
        f"grpc_server_msg_received_total{rpc('Generate')}": 1,
        f"grpc_server_handling_seconds_count{rpc('Generate')}": 1,
        'trimserve_requests_total{finish_reason="rejected",method="Generate"}': 1,
    }


@pytest.mark.parametrize("rpc_name", ["Generate", "GenerateStream"])
@pytest.mark.parametrize(
    ("timeout_seconds", "reason", "code"),
    [(None, "client", "CANCELLED"), (1.0, "deadline", "DEADLINE_EXCEEDED")],
)
async def test_a_client_that_goes_is_told_apart_from_its_deadline(
    loopback: Loopback, rpc_name: str, timeout_seconds: float | None, reason: str, code: str
) -> None:
    loopback.runner.script = (STARTED, Pause.UNTIL_RELEASED)
    await loopback.channel.channel_ready()  # or the time to connect would count
    call = getattr(loopback.generation, rpc_name)(chat_request(), timeout=timeout_seconds)
    await soon(loopback.runner.paused.wait())
    if timeout_seconds is None:
        call.cancel()
    finish_reason = "cancelled" if reason == "client" else "deadline"
    wanted = (
        f'{CUT}{{reason="{reason}"}}',
        f'trimserve_requests_total{{finish_reason="{finish_reason}",method="{rpc_name}"}}',
        f"grpc_server_handled_total{rpc(rpc_name, code)}",
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        while [(await scrape(loopback))[name] for name in wanted] != [1, 1, 1]:  # noqa: ASYNC110  # as until() does
            await asyncio.sleep(0.02)


async def test_tokens_that_left_together_share_the_time_before_them(loopback: Loopback) -> None:
    tokens = (TokenDelta("a", (1,)), TokenDelta("bcd", (2, 3, 4)))
    loopback.runner.script = (STARTED, tokens[0], Pause.UNTIL_RELEASED, tokens[1], FINISHED)
    began = time.monotonic()
    call = asyncio.ensure_future(added(loopback, chat_request()))
    await soon(loopback.runner.paused.wait())
    await asyncio.sleep(0.3)
    loopback.runner.released.set()
    assert (await call)['trimserve_inter_token_latency_seconds_count{trimming="on"}'] == 3
    total = (await scrape(loopback))['trimserve_inter_token_latency_seconds_sum{trimming="on"}']
    assert 0.29 < total < time.monotonic() - began  # a share each: whole, the three would be more


async def test_gauges_show_the_engine_as_it_is(loopback: Loopback) -> None:
    loopback.runner.num_running = 5
    series = await scrape(loopback)
    loopback.runner.num_running = 0
    assert series["trimserve_requests_running"] == 5
    assert series["trimserve_requests_waiting"] == 2
    assert series['trimserve_kv_cache_used_bytes{kind="self"}'] == 1111
    assert series['trimserve_kv_cache_used_bytes{kind="cross"}'] == 2222
    assert series["trimserve_cross_kv_cache_untrimmed_bytes"] == 3333
    assert series["trimserve_kv_cache_capacity_bytes"] == 9999
    assert series["trimserve_kv_cache_usage_ratio"] == pytest.approx((1111 + 2222) / 9999)
    assert (series["trimserve_preemptions_total"], series["trimserve_recomputed_tokens_total"]) == (22, 11)
    assert series["trimserve_prefill_passes_total"] == 33
    assert (series["trimserve_proposed_tokens_total"], series["trimserve_accepted_tokens_total"]) == (99, 88)
    assert series["trimserve_pixel_bytes"] == 12345
    assert series["trimserve_image_cache_used_bytes"] == 777
    assert series["trimserve_image_cache_capacity_bytes"] == 8888
    assert (series["trimserve_image_cache_hits_total"], series["trimserve_image_cache_misses_total"]) == (66, 55)
    assert series["trimserve_image_cache_evictions_total"] == 44
    assert (series["trimserve_image_cache_kv_hits_total"], series["trimserve_image_cache_kv_bytes"]) == (33, 333)
    causes = ("processor_time", "wall_clock", "crash")
    assert [series[f'trimserve_decoder_deaths_total{{cause="{cause}"}}'] for cause in causes] == [33, 2, 1]
    kinds = ("weights", "kv", "free", "allocated")
    assert [series[f'trimserve_device_memory_bytes{{kind="{kind}"}}'] for kind in kinds] == [492, 9999, 123456, 0]
    assert series["trimserve_model_ready"] == 1
    (model,) = (name for name in series if name.startswith("trimserve_model_info"))
    assert 'model_id="fake"' in model
    assert 'revision="cafe"' in model


async def test_a_decode_step_shows_its_batch_and_its_seconds(loopback: Loopback) -> None:
    (listener,) = loopback.runner.step_listeners
    listener(3, 0.25)
    series = await scrape(loopback)
    assert series['trimserve_batch_size_count{phase="decode"}'] == 1
    assert series['trimserve_batch_size_sum{phase="decode"}'] == 3
    assert series['trimserve_stage_duration_seconds_sum{stage="decode_step"}'] == 0.25


@pytest.mark.parametrize(
    ("is_alive", "is_ready", "healthz", "readyz"),
    [(True, True, 200, 200), (True, False, 200, 503), (False, False, 503, 503)],
)
async def test_a_server_that_takes_no_requests_is_alive_until_its_engine_dies(
    loopback: Loopback, is_alive: bool, is_ready: bool, healthz: int, readyz: int
) -> None:
    loopback.runner.is_alive, loopback.runner.is_ready = is_alive, is_ready
    assert (await asyncio.to_thread(get, loopback, "/healthz"))[0] == healthz
    assert (await asyncio.to_thread(get, loopback, "/readyz"))[0] == readyz


async def test_other_paths_do_not_exist(loopback: Loopback) -> None:
    assert (await asyncio.to_thread(get, loopback, "/"))[0] == 404


async def test_an_event_loop_that_stalls_is_unavailable_and_its_metrics_say_so(
    loopback: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "STATUS_TIMEOUT_SECONDS", 0.1)
    with ThreadPoolExecutor() as thread:  # waiting for its answers is the stall

        def while_stalled(path: str) -> tuple[int, str]:
            return thread.submit(get, loopback, path).result(PATIENCE_SECONDS)

        assert while_stalled("/healthz")[0] == 503
        assert while_stalled("/readyz")[0] == 503
        thread.submit(time.sleep, 2 * INTERVAL_SECONDS).result()
        status, text = while_stalled("/metrics")
    assert status == 200
    assert parse(text)["trimserve_event_loop_stalled_seconds"] > 0
    assert parse(text)["trimserve_model_ready"] == 0
    assert (await scrape(loopback))["trimserve_model_ready"] == 1


def test_the_status_of_a_closed_event_loop_cannot_be_read() -> None:
    async def reader() -> Callable[[], Awaitable[EngineStatus]]:
        server = make_server(FakeRunner(), CONFIG)
        await server.stop(0)
        return server._status_reader()

    async def read(reader: Callable[[], Awaitable[EngineStatus]]) -> None:
        await reader()

    with pytest.raises(EngineStopped, match="event loop"):
        asyncio.run(read(asyncio.run(reader())))


async def test_openmetrics_is_served_to_who_asks(loopback: Loopback) -> None:
    _, text = await asyncio.to_thread(get, loopback, "/metrics", "application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


@pytest.mark.parametrize("version", ["next", '"1.0.0"', "1.0.0-rc", "0.0.1", "1.0.0;escaping=none", "9" * 5000])
async def test_any_version_that_a_scraper_asks_for_is_answered(loopback: Loopback, version: str) -> None:
    accept = f"application/openmetrics-text;version={version},text/plain;q=0"
    status, text = await asyncio.to_thread(get, loopback, "/metrics", accept)
    assert status == http.HTTPStatus.OK
    assert text.endswith("# EOF\n") == (version != "0.0.1")  # which is older than OpenMetrics


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=1.0.0;\tQ=0.0, text/plain", "text/plain;\tversion=next"]
)
async def test_openmetrics_is_not_served_to_who_refuses_it(loopback: Loopback, accept: str) -> None:
    status, text = await asyncio.to_thread(get, loopback, "/metrics", accept)
    assert status == http.HTTPStatus.OK
    assert not text.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("encoding", "is_packed"),
    [("gzip", True), ("gzip;q=0, *", False), ("gzip;\tQ=0;x=1", False), ("br, gzip; q=0.1", True)],
)
async def test_metrics_are_packed_for_who_takes_it(loopback: Loopback, encoding: str, is_packed: bool) -> None:
    def asked() -> str | None:
        connection = http.client.HTTPConnection(str(loopback.server.metrics_address), timeout=PATIENCE_SECONDS)
        with closing(connection):
            connection.request("GET", "/metrics", headers={"Accept-Encoding": encoding})
            return connection.getresponse().headers["content-encoding"]

    assert await asyncio.to_thread(asked) == ("gzip" if is_packed else None)
