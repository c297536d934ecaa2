"""`trimserve plan`: what fits into a device's memory, before there is one."""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from trimserve.commands.tables import as_bytes, print_facts
from trimserve.config import Config
from trimserve.knobs import with_knobs
from trimserve.options import Command, with_options

if TYPE_CHECKING:
    from trimserve.api.info import ModelInfo
    from trimserve.planner import Plan

__all__ = ["plan"]

_OPTIONS = {"num_tokens": "--tokens", "num_images": "--images", "num_tiles": "--tiles"}
"""What the planner refuses, as the command line names it."""


def _with_workload() -> Callable[[Command], Command]:
    """Add the options of a request; the command receives them, checked, as its argument `workload`.

    They are no `Workload` yet, because that needs torch, and what is typed wrongly is told before torch is there.
    """
    options = {
        "tokens": (int, 512, typer.Option(min=1, help="Of prompt and answer of a request together.")),
        "images": (int, 1, typer.Option(min=0, help="Of a request.")),
        "tiles": (int | None, None, typer.Option(min=1, help="Of an image; default: the model's most.")),
        "kept_fraction": (
            float | None,
            None,
            typer.Option(help="Share of an image that stays, as your answers report it; default: the most that can."),
        ),
    }
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, default, option) in options.items()
    ]

    def make(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values, checked."""
        fraction = values["kept_fraction"]
        if fraction is not None and not 0 < fraction <= 1:
            raise typer.BadParameter(f"must be in (0, 1], got {fraction}", param_hint="--kept-fraction")
        return {name: values[name] for name in options}

    return lambda command: with_options(command, "workload", parameters, make)


@with_knobs("model", "engine")
@_with_workload()
def plan(
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of one GPU, such as 24GiB.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of a machine whose CPU runs the model.")] = None,
    # It has the name of the knob whose place it takes.
    max_batch: Annotated[
        int | None, typer.Option("--requests", min=1, help="That are to decode together; default: all that fit.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of a device's memory in GB/s, for the decode floor.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    *,
    workload: Mapping[str, Any],
    config: Config,
) -> None:
    """Tell how many requests fit beside a model, and what limits them; exit status 1 if the plan does not fit."""
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise typer.BadParameter(f"must be above 0 and finite, got {bandwidth}", param_hint="--bandwidth")
    device, memory_bytes = _device(gpu_memory, memory, config)

    from trimserve.model.loading import describe_model
    from trimserve.planner import Workload, make_plan

    each = Workload(workload["tokens"], workload["images"], workload["tiles"], workload["kept_fraction"])
    info = describe_model(config.model, config.engine, device)
    try:
        made = make_plan(info, config.engine, each, memory_bytes, max_batch)
    except ValueError as error:
        name, _, why = str(error).partition(": ")
        raise typer.BadParameter(why, param_hint=_OPTIONS[name]) from None
    floors = {} if bandwidth is None else _floors(made, bandwidth)
    if as_json:
        print(json.dumps({**asdict(made), **floors, "limit": made.limit}, indent=2))
    else:
        print_facts({**_facts_of_memory(info, made), **_facts_of_requests(made, floors)})
    if made.limit is not None:
        raise typer.Exit(1)


def _device(gpu_memory: str | None, memory: str | None, config: Config) -> tuple[str, int]:
    """As in `ModelInfo.device`, and its bytes."""
    if (gpu_memory is None) == (memory is None):
        raise typer.BadParameter("must be given, or --memory for a CPU, and not both", param_hint="--gpu-memory")
    is_gpu = gpu_memory is not None
    option = "--gpu-memory" if is_gpu else "--memory"
    if config.model.device == ("cpu" if is_gpu else "cuda"):
        raise typer.BadParameter(f"is not for --device {config.model.device}", param_hint=option)
    try:
        size = TypeAdapter(ByteSize).validate_python(gpu_memory if is_gpu else memory)
    except ValidationError:
        given = gpu_memory if is_gpu else memory
        raise typer.BadParameter(f"must be a size such as 24GiB, got {given!r}", param_hint=option) from None
    return ("cuda:0" if is_gpu else "cpu"), size


def _floors(plan: "Plan", gigabytes_per_second: float) -> dict[str, float]:
    """Least milliseconds of a decode step, by the bytes that it reads."""
    per_ms = gigabytes_per_second * 1e6
    return {"floor_ms_alone": plan.step_bytes_alone / per_ms, "floor_ms": plan.step_bytes / per_ms}


def _facts_of_memory(info: "ModelInfo", plan: "Plan") -> dict[str, str]:
    where = "the CPU's machine" if info.device == "cpu" else "a GPU"
    size = info.tensor_parallel
    shared = "" if size == 1 else f", for all {size} processes" if info.device == "cpu" else f", each of {size}"
    quantized = "" if info.quantization == "none" else f", linear layers in {info.quantization}"
    left = f"-{as_bytes(-plan.left_bytes)}" if plan.left_bytes < 0 else as_bytes(plan.left_bytes)
    return {
        "model": f"{info.model_id}, {info.dtype}{quantized}",
        "memory": f"{as_bytes(plan.memory_bytes)} of {where}{shared}",
        "weights": as_bytes(plan.weight_bytes),
        "KV": f"{as_bytes(plan.kv_cache_bytes)} (kv_cache_bytes), {as_bytes(plan.scratch_bytes)} of it scratch",
        "left": f"{left} for the runtime, up to {as_bytes(plan.image_cache_bytes)} of cached images, and "
        f"{as_bytes(plan.vision_scratch_bytes)} to encode one",
    }


def _facts_of_requests(plan: "Plan", floors: dict[str, float]) -> dict[str, str]:
    held = plan.self_kv_bytes_per_request + plan.cross_kv_bytes_per_request
    facts = {
        "a request": f"{as_bytes(held)}: text {as_bytes(plan.self_kv_bytes_per_request)}, images "
        f"{as_bytes(plan.cross_kv_bytes_per_request)}; {as_bytes(plan.joining_kv_bytes)} to join",
        "requests": f"{plan.num_requests} at once (--max-batch {plan.num_requests}), room for {plan.num_fitting}",
        "a step reads": f"{as_bytes(plan.step_bytes)}, of one request alone {as_bytes(plan.step_bytes_alone)}",
    }
    if floors:
        rate = plan.num_requests / floors["floor_ms"] * 1e3
        facts["decode floor"] = (
            f"{floors['floor_ms_alone']:.2f} ms a token alone, {floors['floor_ms']:.2f} ms for all: at most "
            f"{rate:,.0f} tokens/s"
        )
    return {**facts, "fits": "yes" if plan.limit is None else f"no: {plan.limit}"}
