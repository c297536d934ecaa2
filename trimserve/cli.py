"""The command line: `trimserve serve | generate | explain | eval | codebook | info`.

Without `--address`, `generate` and `explain` start a server of their own on a free port and talk gRPC to it, too. The
knobs of `config.py` are options and environment variables of the commands that use them. Slow imports are left to the
command that needs them.
"""

import asyncio
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError
from rich.console import Console

from trimserve import __version__
from trimserve.client import Client, RequestOptions, make_request
from trimserve.config import Config, ModelConfig
from trimserve.connection import Ca, Token, connected
from trimserve.engine.workers import is_any_left_behind
from trimserve.environment import shut_out
from trimserve.errors import TrimserveError
from trimserve.evaluation.codebook_command import codebook
from trimserve.evaluation.command import evaluate
from trimserve.evaluation.dataset import DatasetError
from trimserve.knobs import with_knobs
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1.model_pb2 import GetModelResponse

if TYPE_CHECKING:
    from trimserve.api.chunks import ImageSelection
    from trimserve.server.lifecycle import Server

__all__ = ["about", "app", "explain", "generate", "info", "main", "serve"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

_SHEET_KEEP = 0.2

_INTERRUPTED = 130
"""Exit status after Ctrl-C."""

PromptOption = Annotated[str, typer.Option(help="What to ask.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
Policy = Annotated[str | None, typer.Option(help="What chooses visual features; default: the model's first.")]
Keep = Annotated[
    float | None,
    typer.Option(help="Budget: share of an image that stays, in (0, 1]; default: the policy's."),
]
KRatio = Annotated[float | None, typer.Option(help="Budget per head, in (0, 1]; default: the model's.")]
MergeRatio = Annotated[
    float | None,
    typer.Option(
        help="Rows that a tile's other features are merged into, as a share of its own, in [0, 1]; "
        "0 drops them; default: the model's."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="LoRA adapter that answers: the NAME of one that the server at --address has, or NAME=FOLDER without "
        "--address; default: the base model."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="HOST:PORT of a running server; default: start one, with the knobs of the model below."),
]


def main() -> None:
    """Entry point of `trimserve`; errors that a user can fix are one line and exit status 1, Ctrl-C is 130."""
    shut_out()
    try:
        _run()
    except SystemExit as end:
        is_interrupted = end.code == _INTERRUPTED
        if is_interrupted:
            with suppress(OSError):
                print("interrupted", file=sys.stderr)
        if is_interrupted or is_any_left_behind():
            _leave(end.code)
        raise


def _run() -> None:
    try:
        app()
    except grpc.RpcError as error:
        _fail(f"{error.code().name}: {error.details()}")
    except (TrimserveError, DatasetError, OSError) as error:
        _fail(f"error: {error}")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1) from None


def _leave(status: object) -> NoReturn:
    """End at once: a thread that hangs or loads a model in compiled code would abort Python's normal exit."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status if isinstance(status, int) else 0)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"trimserve {__version__}")
        raise typer.Exit


@app.callback()
def about(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve Llama-3.2-Vision, keeping only the visual features that the text attends to."""


@app.command()
@with_knobs("model", "engine", "server")
def serve(*, config: Config) -> None:
    """Serve a model over gRPC until SIGTERM, SIGINT or SIGHUP."""
    from trimserve.model.loading import describe_model
    from trimserve.serve import make_runner, make_server
    from trimserve.server import running

    describe_model(config.model, config.engine)  # refuses a bad checkpoint before anything listens

    def announce(serving: "Server") -> None:
        metrics = f"metrics on {serving.metrics_address}" if serving.metrics_address else "no metrics"
        print(f"trimserve {__version__}: gRPC on {serving.address}, {metrics}", flush=True)

    server = make_server(make_runner(config), config)
    asyncio.run(running.serve(server, on_serving=announce))


@app.command()
@with_knobs("model")
def generate(
    prompt: PromptOption,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given again.")] = None,
    system: System = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    policy: Policy = None,
    keep: Keep = None,
    k_ratio: KRatio = None,
    merge_ratio: MergeRatio = None,
    no_trim: Annotated[bool, typer.Option("--no-trim", help="Keep every valid feature.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=2**32 - 1, help="Most tokens to generate; default: the model's.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole messages as JSON.")] = False,
    adapter: Adapter = None,
    address: Address = None,
    ca: Ca = None,
    token: Token = None,
    *,
    config: Config,
) -> None:
    """Ask a question about images and print the answer."""
    name, model = _adapter(adapter, address, config.model)
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    options = _options(system, sampling, _trim(policy, keep, k_ratio, merge_ratio, no_trim), name)
    request = make_request(prompt, image or [], **options)
    with _client(address, ca, token, model) as client:
        if stream:
            for event in client.stream(request):
                if as_json:
                    print(json.dumps(_to_dict(event)), flush=True)
                else:
                    print(event.delta.text, end="", flush=True)
            if not as_json:
                print()
            return
        response = client.generate(request)
        print(json.dumps(_to_dict(response), indent=2) if as_json else response.text)


@app.command()
@with_knobs("model")
def explain(
    image: Annotated[Path, typer.Option(help="Image file.")],
    prompt: PromptOption,
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write; it is a PNG.")] = Path("explain.png"),
    system: System = None,
    policy: Policy = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Instead draw side by side what these policies keep, separated by commas; all: every one. "
            f"Default of --keep is then {_SHEET_KEEP}."
        ),
    ] = None,
    keep: Keep = None,
    k_ratio: KRatio = None,
    merge_ratio: MergeRatio = None,
    adapter: Adapter = None,
    address: Address = None,
    ca: Ca = None,
    token: Token = None,
    *,
    config: Config,
) -> None:
    """Draw which visual features a question kept, and which query heads picked them."""
    from trimserve.explain import Explained, draw_contact_sheet, draw_explanation
    from trimserve.model.images import decode_image

    if policies is not None and (policy is not None or k_ratio is not None):
        raise typer.BadParameter("--policies excludes --policy and --k-ratio")
    picture = decode_image(image.read_bytes(), str(image), config.engine.max_image_pixels)
    out.parent.mkdir(parents=True, exist_ok=True)
    explained = {}
    name_of_adapter, config_of_model = _adapter(adapter, address, config.model)
    with _client(address, ca, token, config_of_model) as client:
        model = client.model()
        trims = {"": _trim(policy, keep, k_ratio, merge_ratio, no_trim=False)}
        if policies is not None:
            trims = _trims_of(policies, model, keep or _SHEET_KEEP, merge_ratio)
        for name, trim in trims.items():
            trim.return_selection = True
            options = _options(system, pb.SamplingParams(temperature=0), trim, name_of_adapter)
            response = client.generate(make_request(prompt, [image], **options))
            [selection], [usage] = response.selections, response.usage.images
            explained[name] = Explained(_selection(selection), usage.merged_features, response.text)
            print(response.text)
            print(f"{name + ': ' if name else ''}{_kept(usage)}: {out}", file=sys.stderr)
    if policies is None:
        page = draw_explanation(picture, explained[""], tile_size=model.tile_size, question=prompt)
    else:
        page = draw_contact_sheet(picture, explained, tile_size=model.tile_size, question=prompt)
    page.save(out, "PNG")


@app.command()
@with_knobs("model")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False, *, config: Config
) -> None:
    """Tell versions, the extension's build, devices and the model's geometry."""
    import torch

    from trimserve import ops
    from trimserve.model.loading import describe_model

    model = describe_model(config.model, config.engine)
    packages = ("torch", "transformers", "tokenizers", "grpcio", "protobuf")
    document = {
        "trimserve": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "extension": ops.build_info(),
        "ops": [name for name in ops.__all__ if hasattr(torch.ops.trimserve, name)],
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "model": {
            **asdict(model),
            "cross_kv_bytes_per_feature": model.cross_kv_bytes_per_feature,
            "self_kv_bytes_per_token": model.self_kv_bytes_per_token,
        },
    }
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console().print(document, soft_wrap=True)


app.command("eval")(evaluate)
app.add_typer(codebook, name="codebook")


@contextmanager
def _client(address: str | None, ca: Path | None, token: str | None, model: ModelConfig) -> Iterator[Client]:
    """A client of the server at an address, or of a new one in this process."""
    if address is None:
        from trimserve.serve import in_process_server

        with in_process_server(model) as server, Client(server.address) as client:
            yield client
        return
    with connected(address, ca, token) as client:
        yield client


def _trim(
    policy: str | None, keep: float | None, k_ratio: float | None, merge_ratio: float | None, no_trim: bool
) -> pb.TrimOptions:
    told = {"--policy": policy, "--keep": keep, "--k-ratio": k_ratio, "--merge-ratio": merge_ratio}
    for option, value in told.items():
        if no_trim and value is not None:
            raise typer.BadParameter(f"--no-trim and {option} exclude each other")
    mode = pb.TRIM_MODE_OFF if no_trim else pb.TRIM_MODE_ON
    budget = None if keep is None else pb.Budget(ratio=keep)
    return pb.TrimOptions(mode=mode, policy=policy, budget=budget, k_ratio=k_ratio, merge_ratio=merge_ratio)


def _adapter(adapter: str | None, address: str | None, model: ModelConfig) -> tuple[str | None, ModelConfig]:
    """Name of the adapter, and the model of a server that has it loaded."""
    if adapter is None:
        return None, model
    name, equals, _ = adapter.partition("=")
    if bool(equals) == (address is not None):
        raise typer.BadParameter("must be NAME=FOLDER without --address, and NAME with it", param_hint="--adapter")
    if not equals:
        return name, model
    try:
        return name, ModelConfig(**{**dict(model), "adapter": (adapter,)})
    except ValidationError as error:
        raise typer.BadParameter(f"{error.errors()[0]['msg']}, got {adapter!r}", param_hint="--adapter") from None


def _trims_of(
    policies: str, model: GetModelResponse, keep: float, merge_ratio: float | None
) -> dict[str, pb.TrimOptions]:
    """Options for each policy, with the same budget if it takes one."""
    known = {policy.name: policy for policy in model.policy_details}
    available = [name for name, policy in known.items() if policy.is_available]
    names = available if policies == "all" else [name.strip() for name in policies.split(",")]
    trims = {}
    for name in names:
        takes_none = name in known and not known[name].budgets
        trims[name] = _trim(name, None if takes_none else keep, None, merge_ratio, no_trim=False)
    return trims


def _kept(usage: pb.ImageUsage) -> str:
    kept = f"kept {usage.kept_features} of {usage.valid_features} features"
    merged = f", the others as {usage.merged_features} rows" if usage.merged_features else ""
    return f"{kept}{merged} ({(usage.kept_features + usage.merged_features) / usage.valid_features:.1%})"


def _options(
    system: str | None, sampling: pb.SamplingParams, trim: pb.TrimOptions, adapter: str | None
) -> RequestOptions:
    options: RequestOptions = {"sampling": sampling, "trim": trim, "adapter": adapter}
    if system is not None:
        options["system"] = system
    return options


def _to_dict(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> dict[str, Any]:
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document


def _selection(selection: pb.ImageSelection) -> "ImageSelection":
    from trimserve.api.chunks import ImageSelection

    return ImageSelection(
        tiles_high=selection.tiles_high,
        tiles_wide=selection.tiles_wide,
        features_per_tile=selection.features_per_tile,
        content_height=selection.content_height,
        content_width=selection.content_width,
        kept=selection.kept,
        picks_by_head=tuple(selection.picks_by_head),
    )
