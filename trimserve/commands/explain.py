"""`trimserve explain`: a picture of what a question kept."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimserve.commands import question
from trimserve.commands.server import OWN_SERVER, asked_server
from trimserve.config import Config
from trimserve.connection import Connection, with_connection
from trimserve.image_files import named_files
from trimserve.knobs import adapter_of, with_knobs
from trimserve.v1 import generation_pb2 as pb
from trimserve.v1.model_pb2 import GetModelResponse

if TYPE_CHECKING:
    from trimserve.client import Client
    from trimserve.explain import Explained

__all__ = ["explain"]

_SHEET_KEEP = 0.2
_FORMATS: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def _check_ending(out: Path) -> Path:
    if out.suffix.lower() not in _FORMATS:
        raise typer.BadParameter(f"must end in one of {', '.join(_FORMATS)}, got {out.name}")
    return out


@with_knobs("model")
@with_connection(OWN_SERVER)
def explain(
    image: Annotated[str, typer.Option(help="Image file, or - for standard input.")],
    prompt: question.Prompt,
    out: Annotated[
        Path,
        typer.Option(
            dir_okay=False, callback=_check_ending, help=f"Picture to write, whose ending is {', '.join(_FORMATS)}."
        ),
    ] = Path("explain.png"),
    system: question.System = None,
    policy: question.Policy = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Instead draw side by side what these policies keep, separated by commas; all: every one. "
            f"Default of --keep is then {_SHEET_KEEP}."
        ),
    ] = None,
    keep: question.Keep = None,
    k_ratio: question.KRatio = None,
    merge_ratio: question.MergeRatio = None,
    adapter: question.Adapter = None,
    *,
    connection: Connection,
    config: Config,
) -> None:
    """Draw which visual features a question kept, and which query heads picked them."""
    name, config = adapter_of(adapter, config, is_served=connection.address is not None)
    request = question.ask(prompt, [image], system, pb.SamplingParams(temperature=0), pb.TrimOptions(), name)

    from trimserve.explain import draw_contact_sheet, draw_explanation
    from trimserve.model.images import decode_image

    content = request.chat.messages[-1].parts[0].image.data
    picture = decode_image(content, image, config.engine.max_image_pixels)
    out.parent.mkdir(parents=True, exist_ok=True)
    text = request.chat.messages[-1].parts[-1].text
    with asked_server(connection, config) as client, named_files(request, [image]):
        model = client.model()
        if policies is None:
            trim = question.trim_options(policy, keep, k_ratio, merge_ratio)
            page = draw_explanation(
                picture, _explained(client, request, trim, f"{out}"), tile_size=model.tile_size, question=text
            )
        else:
            trims = _trims_of(policies, model, _SHEET_KEEP if keep is None else keep, merge_ratio)
            explained = {name: _explained(client, request, trim, f"{out}", name) for name, trim in trims.items()}
            page = draw_contact_sheet(picture, explained, tile_size=model.tile_size, question=text)
    page.save(out, _FORMATS[out.suffix.lower()])


def _explained(
    client: "Client", request: pb.GenerateRequest, trim: pb.TrimOptions, out: str, policy: str = ""
) -> "Explained":
    """Ask, and print the answer and what it held."""
    from trimserve.explain import Explained, selection_of

    trim.return_selection = True
    request.trim.CopyFrom(trim)
    response = client.generate(request)
    [selection], [usage] = response.selections, response.usage.images
    print(response.text)
    print(f"{policy + ': ' if policy else ''}{question.held(usage)}: {out}", file=sys.stderr)
    return Explained(selection_of(selection), usage.merged_features, response.text)


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
        trims[name] = question.trim_options(name, None if takes_none else keep, None, merge_ratio)
    return trims
