"""The command line: `trimserve serve | generate | explain | info`.

`generate` and `explain` talk gRPC also when no `--address` is given: they start a server of their own on a free port.
The options of `serve` are the fields of `config.py`, and so are its environment variables (`TRIMSERVE_MAX_BATCH`).
"""

import asyncio
import inspect
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import grpc
import torch
import typer
from google.protobuf.json_format import MessageToDict
from pydantic import BaseModel, ValidationError
from rich.console import Console

from trimserve import __version__, ops
from trimserve.client import Client, RequestOptions, make_request
from trimserve.config import Config, EngineConfig, ModelConfig, ServerConfig
from trimserve.engine.runner import Runner
from trimserve.errors import CheckpointError
from trimserve.explain import draw_explanation
from trimserve.models.images import decode_image
from trimserve.models.loading import load_model
from trimserve.models.mllama import Mllama
from trimserve.models.trimming import ImageSelection
from trimserve.server.app import InProcessServer, Server, serve
from trimserve.v1 import generation_pb2 as pb

__all__ = ["app", "explain", "generate", "in_process_server", "info", "main"]

app = typer.Typer(
    help="Serve Llama-3.2-Vision, keeping only the visual features that the text attends to.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(stderr=True)

_SECTIONS: dict[str, type[BaseModel]] = {"model": ModelConfig, "engine": EngineConfig, "server": ServerConfig}

Prompt = Annotated[str, typer.Option(help="What to ask.")]
System = Annotated[str | None, typer.Option(help="A system message.")]
KRatio = Annotated[float | None, typer.Option(help="Budget per head, in (0, 1]; default: the model's.")]
NoTrim = Annotated[bool, typer.Option("--no-trim", help="Keep every valid feature.")]
Address = Annotated[str | None, typer.Option(help="HOST:PORT of a running server; default: start one.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Folder or hub id; default: the embedded model.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most tokens to generate; default: the model's.")]


def main() -> None:
    """Entry point of the `trimserve` command; what a user can mend is one line on standard error, exit status 1."""
    try:
        app()
    except grpc.RpcError as error:
        console.print(f"[red]{error.code().name}[/]: {error.details()}", highlight=False)
        raise SystemExit(1) from None
    except (CheckpointError, OSError) as error:
        console.print(f"[red]error[/]: {error}", highlight=False)
        raise SystemExit(1) from None


def _serve(**knobs: Any) -> None:
    """Serve a model over gRPC until SIGTERM or SIGINT."""
    config = _config(knobs)

    def announce(server: Server) -> None:
        addresses = f"gRPC on {server.address}, metrics on {server.metrics_address}"
        print(f"trimserve {__version__}: {addresses}", flush=True)

    asyncio.run(serve(_runner(config), config, on_serving=announce))


@app.command()
def generate(
    prompt: Prompt,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given again.")] = None,
    system: System = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    k_ratio: KRatio = None,
    no_trim: NoTrim = False,
    max_new_tokens: MaxNewTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print whole messages as JSON.")] = False,
    address: Address = None,
    model: ModelName = None,
) -> None:
    """Ask a question about images and print the answer."""
    sampling = pb.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    options = _options(system, sampling, _trim(k_ratio, no_trim))
    request = make_request(prompt, image or [], **options)
    with _client(address, model) as client:
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
def explain(
    image: Annotated[Path, typer.Option(help="Image file.")],
    prompt: Prompt,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("explain.png"),
    system: System = None,
    k_ratio: KRatio = None,
    address: Address = None,
    model: ModelName = None,
) -> None:
    """Draw which visual features a question kept, and which query heads picked them."""
    trim = _trim(k_ratio, no_trim=False)
    trim.return_selection = True
    options = _options(system, pb.SamplingParams(temperature=0), trim)
    with _client(address, model) as client:
        response = client.generate(make_request(prompt, [image], **options))
        tile_size = client.model().tile_size
    picture = decode_image(image.read_bytes(), str(image), EngineConfig().max_image_pixels)
    selection = _selection(response.selections[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_explanation(picture, selection, tile_size=tile_size, question=prompt, answer=response.text).save(out)
    usage = response.usage.images[0]
    kept = usage.kept_features / usage.valid_features
    console.print(f"{response.text}\nkept {usage.kept_features} of {usage.valid_features} features ({kept:.1%}): {out}")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    model: ModelName = None,
) -> None:
    """Tell versions, the extension's build, devices and the model's geometry."""
    about = load_model(ModelConfig(model=model), EngineConfig()).info
    fields = {name: getattr(about, name) for name in type(about).__dataclass_fields__}
    fields["generation_defaults"] = {
        name: getattr(about.generation_defaults, name) for name in type(about.generation_defaults).__dataclass_fields__
    }
    packages = ("torch", "transformers", "tokenizers", "grpcio", "protobuf")
    document = {
        "trimserve": __version__,
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "extension": ops.build_info(),
        "ops": [name for name in ops.__all__ if hasattr(torch.ops.trimserve, name)],
        "devices": ["cpu", *(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))],
        "model": {
            **fields,
            "cross_kv_bytes_per_feature": about.cross_kv_bytes_per_feature,
            "self_kv_bytes_per_token": about.self_kv_bytes_per_token,
        },
    }
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        Console().print(document)


def in_process_server(model: str | None = None) -> InProcessServer:
    """A server in this process, on a free port, without metrics.

    Args:
        model: folder or hub id; None is the embedded model.
    """
    config = _config({"model": model, "port": 0, "metrics_port": None})
    return InProcessServer(_runner(config), config)


def _knobs() -> Iterator[inspect.Parameter]:
    """The fields of every config section as command-line options."""
    for section in _SECTIONS.values():
        for name, field in section.model_fields.items():
            option = typer.Option(help=field.description, envvar=f"TRIMSERVE_{name.upper()}")
            annotation: Any = Annotated[_plain(field.annotation), option]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """A field's type without its bounds, which pydantic checks: `Annotated[int, ...] | None` is `int | None`."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        return reduce(or_, map(_plain, get_args(annotation)))
    return annotation


_serve.__signature__ = inspect.Signature(list(_knobs()))  # type: ignore[attr-defined]  # functions may carry one
_serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _knobs()}
app.command("serve")(_serve)


def _config(knobs: dict[str, Any]) -> Config:
    sections = {
        section: {name: knobs[name] for name in model.model_fields if name in knobs}
        for section, model in _SECTIONS.items()
    }
    try:
        return Config.model_validate(sections)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1]).replace("_", "-")
        raise typer.BadParameter(f"{first['msg']}, got {first['input']!r}", param_hint=option) from None


def _runner(config: Config) -> Runner:
    def load() -> Mllama:
        if config.engine.num_threads is not None:
            torch.set_num_threads(config.engine.num_threads)
        return load_model(config.model, config.engine)

    engine = config.engine
    return Runner(
        load,
        max_batch=engine.max_batch,
        max_queue=engine.max_queue,
        num_preprocess_workers=engine.num_preprocess_workers,
    )


@contextmanager
def _client(address: str | None, model: str | None) -> Iterator[Client]:
    """A client of the server at an address, or of one in this process on a free port."""
    if address is not None:
        with Client(address) as client:
            yield client
        return
    with in_process_server(model) as server, Client(server.address) as client:
        yield client


def _trim(k_ratio: float | None, no_trim: bool) -> pb.TrimOptions:
    if no_trim and k_ratio is not None:
        raise typer.BadParameter("--no-trim and --k-ratio exclude each other")
    return pb.TrimOptions(mode=pb.TRIM_MODE_OFF if no_trim else pb.TRIM_MODE_ON, k_ratio=k_ratio)


def _options(system: str | None, sampling: pb.SamplingParams, trim: pb.TrimOptions) -> RequestOptions:
    options: RequestOptions = {"sampling": sampling, "trim": trim}
    if system is not None:
        options["system"] = system
    return options


def _to_dict(message: pb.GenerateResponse | pb.GenerateStreamResponse) -> dict[str, Any]:
    document: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return document


def _selection(selection: pb.ImageSelection) -> ImageSelection:
    return ImageSelection(
        tiles_high=selection.tiles_high,
        tiles_wide=selection.tiles_wide,
        features_per_tile=selection.features_per_tile,
        content_height=selection.content_height,
        content_width=selection.content_width,
        kept=selection.kept,
        picks_by_head=tuple(selection.picks_by_head),
    )
