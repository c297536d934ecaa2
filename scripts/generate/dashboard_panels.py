"""The panels of the Grafana dashboard, by row: what each asks Prometheus. `dashboards.py` draws them."""

from dataclasses import dataclass

from scripts.generate.dashboard_queries import mean, quantile, quantiles, rate, series, total

__all__ = ["ROWS", "Panel"]


@dataclass(frozen=True)
class Panel:
    """One panel, 24 columns in a row of them."""

    title: str
    unit: str
    """As Grafana names it."""
    queries: dict[str, str]
    """Legend -> PromQL."""
    text: str
    """What one sees, and what to make of it."""
    kind: str = "timeseries"
    """timeseries, stat or heatmap."""
    width: int = 8


CERTIFICATE_END = "trimserve_tls_certificate_expiry_timestamp_seconds"
FIRST_TOKEN, GAP = "trimserve_time_to_first_token_seconds", "trimserve_inter_token_latency_seconds"
HELD = total("trimserve_kv_cache_used_bytes", 'kind="cross"')
UNTRIMMED = total("trimserve_cross_kv_cache_untrimmed_bytes")
SAVED = f"1 - {HELD} / {UNTRIMMED}"
FAILED = rate("trimserve_requests_total", 'finish_reason="error"') + " / " + rate("trimserve_requests_total")
HITS, MISSES = rate("trimserve_image_cache_hits_total"), rate("trimserve_image_cache_misses_total")
IMAGES = total("trimserve_image_cache_used_bytes"), total("trimserve_image_cache_capacity_bytes")

ROWS: dict[str, tuple[Panel, ...]] = {
    "Overview": (
        Panel("Replicas ready", "short", {"": total("trimserve_model_ready")}, "Those that take requests.", "stat", 3),
        Panel("Requests", "reqps", {"": rate("trimserve_requests_total")}, "That ended, however.", "stat", 3),
        Panel("Tokens", "cps", {"": rate("trimserve_generation_tokens_total")}, "Sent.", "stat", 3),
        Panel("First token, p95", "s", {"": quantile(0.95, FIRST_TOKEN)}, "From a request's arrival.", "stat", 3),
        Panel("Between tokens, p95", "s", {"": quantile(0.95, GAP)}, "Of all streams.", "stat", 3),
        Panel("Failed", "percentunit", {"": FAILED}, "Through no fault of the client.", "stat", 3),
        Panel("Waiting", "short", {"": total("trimserve_requests_waiting")}, "In the queues.", "stat", 3),
        Panel("Cross KV saved now", "percentunit", {"": SAVED}, "Of what running requests would hold.", "stat", 3),
    ),
    "Latency": (
        Panel("First token", "s", quantiles(FIRST_TOKEN), "From a request's arrival until its first token."),
        Panel("Between tokens", "s", quantiles(GAP), "Prefill of other requests shows in the high quantiles."),
        Panel(
            "Per token, mean of a request",
            "s",
            quantiles("trimserve_request_time_per_output_token_seconds"),
            "What a reader of the stream feels.",
        ),
        Panel(
            "Whole request",
            "s",
            quantiles("trimserve_request_duration_seconds", "method"),
            "From arrival to the last message, of requests that finished.",
        ),
        Panel(
            "In the queue", "s", quantiles("trimserve_queue_time_seconds"), "Until the engine began. High: scale out."
        ),
        Panel(
            "First token: trimming on and off",
            "s",
            {"p95 {{trimming}}": quantile(0.95, FIRST_TOKEN, by="trimming")},
            "Requests choose, so compare the same kind of request.",
        ),
        Panel(
            "Stages, mean per request",
            "s",
            {"{{stage}}": mean("trimserve_stage_duration_seconds", "stage", 'stage!="decode_step"')},
            "image_decode is part of preprocess; trim_select, trim_gather of prefill; detokenize of decode.",
        ),
        Panel(
            "One decode step",
            "s",
            quantiles("trimserve_stage_duration_seconds", labels='stage="decode_step"'),
            "Model and sampling, the whole batch.",
        ),
        Panel(
            "First token, spread",
            "s",
            {"{{le}}": rate(f"{FIRST_TOKEN}_bucket", by="le")},
            "How many requests took how long.",
            "heatmap",
        ),
    ),
    "Throughput": (
        Panel(
            "Requests by end",
            "reqps",
            {"{{finish_reason}}": rate("trimserve_requests_total", by="finish_reason")},
            "How.",
        ),
        Panel(
            "Tokens",
            "cps",
            {
                "prompt": rate("trimserve_prompt_tokens_total"),
                "generated": rate("trimserve_generation_tokens_total"),
            },
            "Of prompts that were prefilled, and sent.",
        ),
        Panel(
            "Running and waiting",
            "short",
            {"running": total("trimserve_requests_running"), "waiting": total("trimserve_requests_waiting")},
            "Waiting that grows while running stays: the batch or the page pool is full.",
        ),
        Panel(
            "Batch",
            "short",
            {"{{phase}}": mean("trimserve_batch_size", "phase")},
            "Mean of requests that one step works on.",
        ),
        Panel(
            "Tokens of a request",
            "short",
            {
                "prompt, p95": quantile(0.95, "trimserve_request_prompt_tokens"),
                "generated, p95": quantile(0.95, "trimserve_request_generation_tokens"),
            },
            "What clients ask for.",
        ),
        Panel("Images of a request", "short", {"mean": mean("trimserve_request_images")}, "What clients send."),
    ),
    "Cache and trimming": (
        Panel(
            "Page pool",
            "bytes",
            {
                "used by {{kind}}": total("trimserve_kv_cache_used_bytes", by="kind"),
                "capacity": total("trimserve_kv_cache_capacity_bytes"),
            },
            "One pool for self- and cross-attention; full, requests wait.",
        ),
        Panel(
            "Page pool, share in use",
            "percentunit",
            {"{{instance}}": series("trimserve_kv_cache_usage_ratio")},
            "What routers and autoscalers read.",
        ),
        Panel(
            "Preemptions",
            "reqps",
            {"": rate("trimserve_preemptions_total")},
            "Requests that gave their pages to more urgent ones, and are computed again.",
        ),
        Panel(
            "Tokens computed again",
            "cps",
            {"": rate("trimserve_recomputed_tokens_total")},
            "Work that preemptions cost. Much of it: raise kv_cache_bytes, or lower max_batch.",
        ),
        Panel("Prompt passes", "cps", {"": rate("trimserve_prefill_passes_total")}, "Small prompts share one."),
        Panel(
            "Drafts",
            "cps",
            {"proposed": rate("trimserve_proposed_tokens_total"), "accepted": rate("trimserve_accepted_tokens_total")},
            "Tokens that steps checked before they were drawn (speculation), and those that then were.",
        ),
        Panel(
            "Cross KV: held and untrimmed",
            "bytes",
            {
                "held": HELD,
                "untrimmed": UNTRIMMED,
            },
            "What running requests hold, and what they would hold.",
        ),
        Panel("Cross KV saved", "percentunit", {"now": SAVED}, "Room for other requests."),
        Panel(
            "Cross KV not held, by cause",
            "binBps",
            {"{{cause}}": rate("trimserve_cross_kv_bytes_saved_total", by="cause")},
            "Padding and visibility are lossless, trimming is not.",
        ),
        Panel(
            "Kept fraction, spread",
            "percentunit",
            {"{{le}}": rate("trimserve_kept_fraction_bucket", by="le")},
            "Rows held over valid features; k_ratio is another number.",
            "heatmap",
        ),
        Panel(
            "Visual features",
            "cps",
            {"{{state}}": rate("trimserve_visual_features_total", by="state")},
            "valid = kept + dropped; merged are rows that dropped ones became.",
        ),
        Panel(
            "What trimming did",
            "reqps",
            {"{{outcome}}": rate("trimserve_trim_requests_total", by="outcome")},
            "Requests by outcome.",
        ),
        Panel(
            "Cross KV of a request",
            "bytes",
            {"p95 {{state}}": quantile(0.95, "trimserve_request_cross_kv_bytes", by="state")},
            "Untrimmed, and as held.",
        ),
        Panel(
            "Image cache",
            "percentunit",
            {
                "hits": f"{HITS} / ({HITS} + {MISSES})",
                "KV hits": f"{rate('trimserve_image_cache_kv_hits_total')} / ({HITS} + {MISSES})",
                "full": " / ".join(IMAGES),
                "full of KV": f"{total('trimserve_image_cache_kv_bytes')} / {IMAGES[1]}",
            },
            "Images that were not encoded again, those of them with keys and values, and how full the cache is.",
        ),
        Panel(
            "Image decoders that ended",
            "cps",
            {"{{cause}}": rate("trimserve_decoder_deaths_total", by="cause")},
            "Each was replaced; processor_time and crash are bad files.",
        ),
        Panel("Image cache: evictions", "cps", {"": rate("trimserve_image_cache_evictions_total")}, "Images."),
        Panel(
            "Choosing features, by policy",
            "s",
            {"p95 {{policy}}": quantile(0.95, "trimserve_trim_select_seconds", by="policy")},
            "Of one request; next to nothing where an image remembered a choice.",
        ),
        Panel(
            "Requests by policy",
            "reqps",
            {"{{policy}}": rate("trimserve_trim_requests_total", by="policy")},
            "None where trimming was off or there was no image.",
        ),
    ),
    "gRPC": (
        Panel(
            "Calls by code",
            "reqps",
            {"{{grpc_code}}": rate("grpc_server_handled_total", by="grpc_code")},
            "That ended.",
        ),
        Panel(
            "Calls by method",
            "reqps",
            {"{{grpc_method}}": rate("grpc_server_started_total", by="grpc_method")},
            "That began.",
        ),
        Panel(
            "Open calls",
            "short",
            {
                "{{grpc_method}}": f"{total('grpc_server_started_total', by='grpc_method')} - "
                f"{total('grpc_server_handled_total', by='grpc_method')}"
            },
            "Began and did not end yet.",
        ),
        Panel(
            "Messages",
            "cps",
            {"received": rate("grpc_server_msg_received_total"), "sent": rate("grpc_server_msg_sent_total")},
            "Of all calls.",
        ),
        Panel(
            "Handling, p95",
            "s",
            {"{{grpc_method}}": quantile(0.95, "grpc_server_handling_seconds", by="grpc_method")},
            "Whole calls.",
        ),
        Panel(
            "Refused calls",
            "reqps",
            {"{{reason}}": rate("trimserve_refused_calls_total", by="reason")},
            "Before their message was read: no token, too many, too fast, too large, too late.",
        ),
        Panel(
            "HTTP requests",
            "reqps",
            {"{{route}} {{status}}": rate("trimserve_http_requests_total", by="route, status")},
            "In OpenAI's shape; 499 is a client that left.",
        ),
        Panel("HTTP connections", "short", {"{{instance}}": series("trimserve_http_connections")}, "Open now."),
        Panel("Health watches", "short", {"{{instance}}": series("trimserve_health_watches")}, "Open now."),
        Panel(
            "Messages in flight",
            "bytes",
            {"{{instance}}": series("trimserve_message_bytes_in_flight")},
            "Held, or set aside for what arrives; calls wait once it is 16 times max_message_bytes.",
        ),
    ),
    "Errors": (
        Panel("Failed", "percentunit", {"share": FAILED}, "Of all requests, through no fault of the client."),
        Panel("Failures by kind", "reqps", {"{{kind}}": rate("trimserve_engine_errors_total", by="kind")}, "Requests."),
        Panel(
            "Refused by reason",
            "reqps",
            {"{{reason}}": rate("trimserve_admission_rejections_total", by="reason")},
            "queue_full: scale out. stopped: starting, draining or dead.",
        ),
        Panel(
            "Ended early, by reason",
            "reqps",
            {"{{reason}}": rate("trimserve_cancelled_requests_total", by="reason")},
            "Clients that go away, deadlines, shutdowns.",
        ),
    ),
    "Process": (
        Panel(
            "Memory of the process",
            "bytes",
            {
                "{{instance}}": series("process_resident_memory_bytes"),
                "left for {{instance}}": series("trimserve_memory_left_bytes"),
            },
            "Resident, and what machine and control groups leave.",
        ),
        Panel(
            "Memory of the device",
            "bytes",
            {"{{kind}}": total("trimserve_device_memory_bytes", by="kind")},
            "Weights, page pool, what is free; of a GPU also torch's allocator.",
        ),
        Panel(
            "Decoded images",
            "bytes",
            {"{{instance}}": series("trimserve_pixel_bytes")},
            "Of requests that wait or run, in the machine's memory.",
        ),
        Panel(
            "CPU",
            "suffix: cores",
            {"{{instance}}": f"rate({series('process_cpu_seconds_total')}[$__rate_interval])"},
            "Busy.",
        ),
        Panel(
            "Open files",
            "percentunit",
            {"{{instance}}": f"{series('process_open_fds')} / {series('process_max_fds')}"},
            "Of the limit. Near it, new connections are not accepted.",
        ),
        Panel(
            "Event loop: lag",
            "s",
            {
                **quantiles("trimserve_event_loop_lag_seconds"),
                "stalled, {{instance}}": series("trimserve_event_loop_stalled_seconds"),
            },
            "How late calls, health and cancellations are handled.",
        ),
        Panel(
            "Workers that prepare requests",
            "short",
            {
                "{{pool}}, busy": total("trimserve_preparation_workers_busy", by="pool"),
                "{{pool}}": total("trimserve_preparation_workers", by="pool"),
            },
            "All busy: tokenising or decoding images is what requests wait for.",
        ),
        Panel(
            "Workers: longest job",
            "s",
            {"{{pool}}": f"max by (pool) ({series('trimserve_preparation_oldest_job_seconds')})"},
            "Beyond step_timeout_seconds the server is not ready.",
        ),
        Panel(
            "Certificates end",
            "dateTimeFromNow",
            {"{{certificate}}, {{instance}}": f"{series(CERTIFICATE_END)} * 1000"},
            "Those in use.",
        ),
        Panel(
            "Credentials not reloaded",
            "cps",
            {"{{kind}}": rate("trimserve_credential_reload_failures_total", by="kind")},
            "Attempts to read changed files that failed: what was read before stays.",
        ),
        Panel(
            "Credentials loaded",
            "dateTimeFromNow",
            {"{{kind}}, {{instance}}": f"{series('trimserve_credentials_loaded_timestamp_seconds')} * 1000"},
            "Last success.",
        ),
        Panel(
            "Log lines dropped",
            "cps",
            {"{{instance}}": rate("trimserve_log_lines_dropped_total", by="instance")},
            "Nobody reads standard error, or it cannot be written.",
        ),
        Panel(
            "Versions and models",
            "short",
            {
                "{{version}}, torch {{torch}}": f"count by (version, torch) ({series('trimserve_build_info')})",
                "{{model_id}} {{dtype}}": f"count by (model_id, dtype) ({series('trimserve_model_info')})",
            },
            "Replicas of each.",
        ),
    ),
}
