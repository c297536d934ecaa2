"""Every knob of trimserve, once: what it sets, its unit, its range and its default.

`docs/configuration.md` is generated from this file. Values are checked when a config is made. The command line makes an
option (`--max-batch`) and an environment variable (`TRIMSERVE__ENGINE__MAX_BATCH`, by section and knob) of every field.
The underscores are double because Kubernetes injects `TRIMSERVE_PORT` and the like for a service named trimserve.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationInfo, field_validator

from trimserve.api.adapter import ADAPTER_NAME, ADAPTER_NAME_RULE
from trimserve.loopback import is_loopback

__all__ = ["Config", "Device", "Dtype", "EngineConfig", "KvDtype", "ModelConfig", "Quantize", "ServerConfig"]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["none", "int8", "int4"]
KvDtype = Literal["auto", "int8"]
Port = Annotated[int, Field(ge=0, le=65535)]


def _of_home(path: Path) -> Path:
    """Put a home in the place of `~`, which no shell does in `--knob=~/file`, nor anything in a unit's environment."""
    try:
        return path.expanduser()
    except RuntimeError as error:  # nobody has that name, or the process has no home
        raise ValueError(f"must be in a home that there is: {error}") from error


File = Annotated[Path, AfterValidator(_of_home)]

_LARGEST_COUNT = 10**9
"""Fields of messages have 32 bits."""


class _Knobs(BaseModel):
    """What the sections have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Knobs):
    """Which checkpoint is served, and how it is read."""

    model: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or hub id of an `MllamaForConditionalGeneration` checkpoint; unset is the embedded model.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Branch, tag or commit of a hub checkpoint; unset is its main branch.",
    )
    device: Device = Field(
        default="auto",
        description="Where the model runs; `auto` is `cuda` where torch sees a GPU and the ops are built for it, else "
        "`cpu`. `cuda` is the first GPU that `CUDA_VISIBLE_DEVICES` leaves.",
    )
    dtype: Dtype = Field(default="auto", description="Type of weights; `auto` is the checkpoint's own.")
    quantize: Quantize = Field(
        default="none",
        description="How the decoder's linear layers are stored. `none`: in `dtype`, except that int8 and int4 "
        "weights of a quantized checkpoint stay as they are on a CPU. `int8`: one scale for each output. `int4`: one "
        "scale for each 64 inputs of an output. Both take less memory and make decode steps faster on a CPU. On a GPU, "
        "`int8` uses torch's own products and `int4` is refused. Everything else keeps `dtype`.",
    )
    kv_dtype: KvDtype = Field(
        default="auto",
        description="Type of cached keys and values. `auto` is `dtype`. `int8` has a scale for each head and position "
        "and takes about half the bytes of bfloat16; answers may differ a little. `int8` is refused on a GPU.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Most tokens of prompt and answer together; unset is the checkpoint's limit.",
    )
    intermediate_features: Literal["inputs", "outputs"] = Field(
        default="inputs",
        description="Where intermediate vision features are taken: `inputs` of the layers, as Meta's weights "
        "were trained, or `outputs`, for checkpoints that were fine-tuned on transformers' features.",
    )
    adapter: tuple[Annotated[str, Field(pattern=rf"^{ADAPTER_NAME.pattern}=.+$")], ...] = Field(
        default=(),
        description="A LoRA adapter that requests may ask for, as `NAME=FOLDER`; in the environment "
        "with spaces between several. The folder is one that PEFT saved, NAME " + ADAPTER_NAME_RULE + ".",
    )
    k_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Default budget per head, for requests that name none; unset is the value of the checkpoint's "
        "`trimserve.json`, or 0.2 without one.",
    )
    codebook: File | None = Field(
        default=None,
        description="File of prototypes for the policy `codebook`, built for this very model by `trimserve codebook "
        "build`; unset refuses that policy.",
    )
    compressor: tuple[File, ...] = Field(
        default=(),
        description="A file that `trimserve train-compressor` wrote for this very model; its policy is refused without "
        "it. Give it again for each other policy; in the environment with spaces between several.",
    )
    guide_model: str | None = Field(
        default=None,
        min_length=1,
        description="Folder or hub id of a smaller Mllama with the same tiles, patches and tokens, which chooses "
        "visual features for the policy `guided`; it is read as `dtype` and `quantize` say. Unset refuses that policy.",
    )
    merge_ratio: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Default for requests that name none: rows that the unkept features of a tile are merged into, as "
        "a share of the tile's features. 0 drops them. Unset is the value of the checkpoint's `trimserve.json`, or 0 "
        "without one.",
    )

    @property
    def adapters(self) -> dict[str, Path]:
        """The folders of `adapter` by name."""
        pairs = (each.partition("=") for each in self.adapter)
        return {name: _of_home(Path(folder)) for name, _, folder in pairs}

    @field_validator("adapter")
    @classmethod
    def _names_are_given_once(cls, adapters: tuple[str, ...]) -> tuple[str, ...]:
        names = [each.partition("=")[0] for each in adapters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"must name each adapter once, {name} is there {names.count(name)} times")
        for each in adapters:
            _of_home(Path(each.partition("=")[2]))
        return adapters


class EngineConfig(_Knobs):
    """How much the engine takes on."""

    max_batch: int = Field(default=16, ge=1, le=_LARGEST_COUNT, description="Most requests that decode together.")
    max_queue: int = Field(
        default=64,
        ge=1,
        le=_LARGEST_COUNT,
        description="Most requests that wait; one more is refused with RESOURCE_EXHAUSTED.",
    )
    kv_cache_bytes: ByteSize | None = Field(
        default=None,
        ge=1,
        description="Bytes for all keys and values and for the scratch of one prefill, such as `2GiB`. Unset is half "
        "of the memory that is free after warm-up (0.9 of it on a GPU), but no more than `max_batch` requests can use.",
    )
    image_cache_bytes: ByteSize = Field(
        default=ByteSize(512 * 2**20),
        ge=0,
        description="Bytes of visual features, and of their keys and values, that are kept for another question on the "
        "same image, in each of `tensor_parallel` processes; 0 keeps none.",
    )
    prefill_slice_seconds: float = Field(
        default=0.1,
        ge=0,
        description="Seconds of prefill between two decode steps, so the longest pause that a newcomer causes in "
        "running streams. A layer that has begun is finished.",
    )
    speculation: bool = Field(
        default=False,
        description="Whether a step also checks drafts: tokens that followed the same ones earlier in prompt or "
        "answer, and those that a constraint forces. Answers are the same. Drafts take free places of `max_batch`, and "
        "stop by themselves where they make nothing faster.",
    )
    step_timeout_seconds: float = Field(
        default=300.0,
        gt=0,
        description="Seconds after which a decode step, or a layer of a prefill, counts as hung: health says "
        "NOT_SERVING and the process ends with the cause. The same holds for an event loop that stalls for as long.",
    )
    max_images: int = Field(default=8, ge=1, le=_LARGEST_COUNT, description="Most images of one request.")
    max_image_bytes: ByteSize = Field(
        default=ByteSize(32 * 2**20), ge=1, description="Most bytes of one encoded image file."
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=_LARGEST_COUNT,
        description="Most pixels of one decoded image; a larger one counts as a decompression bomb. The limit also "
        "bounds the memory and processor time of the decoder.",
    )
    num_preprocess_workers: int = Field(
        default=2,
        ge=1,
        le=1024,
        description="Threads that tokenise prompts, and as many that prepare images, each with a process that decodes "
        "the files.",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Threads of one op on the CPU, in each of `tensor_parallel` processes. Unset is PyTorch's choice, "
        "`OMP_NUM_THREADS` or all cores, which the processes share.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Processes of this machine that hold a part of the model each, on a GPU each or on the CPU; must "
        "divide the model's KV heads and the width of its MLP. `kv_cache_bytes` are of all of them together.",
    )


class ServerConfig(_Knobs):
    """How the server is reached, and how it behaves."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that all ports listen on. Beyond loopback, `tls_cert` or `allow_plaintext` is needed.",
    )
    port: Port = Field(default=50051, description="Port of gRPC; 0 is any free one.")
    http_port: Port | None = Field(
        default=None,
        description="Port of HTTP in the shape of OpenAI's API, with the same limits, tokens and TLS; 0 is any free "
        "one, unset is none. Needs `pip install 'trimserve[http]'`.",
    )
    tls_cert: File | None = Field(
        default=None,
        description="PEM file with the certificate chain of the gRPC and the HTTP port, which then take TLS only. Like "
        "the other files of this section, it is read again when it changes.",
    )
    tls_key: File | None = Field(
        default=None, validate_default=True, description="PEM file with the unencrypted key of `tls_cert`."
    )
    tls_client_ca: File | None = Field(
        default=None,
        description="PEM file with certificates of authorities; clients must then show one that these signed (mTLS).",
    )
    auth_file: File | None = Field(
        default=None,
        description="TOML file with the clients that may call, by digests of their tokens; unset lets everybody call. "
        "Health checks need no token.",
    )
    allow_plaintext: bool = Field(
        default=False,
        validate_default=True,
        description="Whether to listen beyond loopback without TLS, for servers behind a proxy that encrypts.",
    )
    metrics_port: Port = Field(
        default=9464, description="Port of `/metrics`, `/healthz` and `/readyz`; 0 is any free one."
    )
    max_message_bytes: ByteSize = Field(
        default=ByteSize(64 * 2**20),
        ge=4096,
        description="Bytes of one gRPC message, either way, and of the body of an HTTP request, at least 4096; more is "
        "RESOURCE_EXHAUSTED. Messages that are arriving (each counts as this many bytes) or whose images are not yet "
        "decoded take at most 16 times as much, those of one client at most half of that; other calls wait for room, "
        "up to `receive_timeout_seconds`.",
    )
    max_concurrent_rpcs: int = Field(
        default=1024,
        ge=1,
        description="Calls of trimserve's services that are open at once, and of reflection; more are "
        "RESOURCE_EXHAUSTED. Health checks do not count.",
    )
    max_concurrent_rpcs_per_client: int | None = Field(
        default=None,
        ge=1,
        description="The same for each client, who is known by token, else by certificate, else by address. Unset is "
        "no limit for each.",
    )
    receive_timeout_seconds: float = Field(
        default=60.0, gt=0, description="Seconds in which a call's message must have arrived."
    )
    max_deadline_seconds: float | None = Field(
        default=None, gt=0, description="Longest deadline; a longer one, or none, counts as this; unset is no limit."
    )
    drain_grace_seconds: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that running requests get to finish after SIGTERM, SIGINT or SIGHUP.",
    )
    max_connection_age_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Age at which a client is asked to reconnect, so that load balancers that see only connections can "
        "spread load. Running calls get the drain grace to finish. Unset is never.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least severity that is logged, to standard error: lines for people on a terminal, elsewhere one "
        "JSON object each.",
    )
    tracing_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="Collector that takes traces as OTLP over gRPC, such as `http://localhost:4317`; unset is no "
        "traces. Needs `pip install 'trimserve[tracing]'`; OpenTelemetry's own variables (`OTEL_*`) set the rest.",
    )

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        """An IPv6 address as sockets take it, also where it is written as beside a port."""
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host

    @field_validator("http_port")
    @classmethod
    def _has_uvicorn(cls, port: int | None) -> int | None:
        if port is not None:
            _check_installed("uvicorn", "HTTP needs `pip install 'trimserve[http]'`")
        return port

    @field_validator("tls_key", "tls_client_ca")
    @classmethod
    def _needs_a_certificate(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        has_certificate = info.data.get("tls_cert") is not None
        if path is not None and not has_certificate:
            raise ValueError("needs tls_cert beside it")
        if path is None and has_certificate and info.field_name == "tls_key":
            raise ValueError("must be given with tls_cert")
        return path

    @field_validator("allow_plaintext")
    @classmethod
    def _plaintext_stays_on_loopback(cls, is_allowed: bool, info: ValidationInfo) -> bool:
        host = info.data.get("host", "")
        if not (is_allowed or info.data.get("tls_cert") or is_loopback(host)):
            raise ValueError(f"must be set, or tls_cert given, to listen on {host}, which is not loopback")
        return is_allowed

    @field_validator("tracing_endpoint")
    @classmethod
    def _has_opentelemetry(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            _check_installed("opentelemetry-exporter-otlp-proto-grpc", "traces need `pip install 'trimserve[tracing]'`")
        return endpoint


class Config(_Knobs):
    """All of it."""

    model: ModelConfig = Field(default=ModelConfig(), description="The checkpoint.")
    engine: EngineConfig = Field(default=EngineConfig(), description="The engine.")
    server: ServerConfig = Field(default=ServerConfig(), description="The server.")


def _check_installed(package: str, complaint: str) -> None:
    try:
        distribution(package)
    except PackageNotFoundError:
        raise ValueError(complaint) from None
