"""What the commands that ask a question have in common: options, and the request that they make."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trimserve.client import RequestOptions, make_request
from trimserve.image_files import STANDARD_INPUT, read_image
from trimserve.v1 import generation_pb2 as pb

__all__ = [
    "Adapter",
    "Choices",
    "ImageNames",
    "JsonSchema",
    "KRatio",
    "Keep",
    "LookAgain",
    "MaxNewTokens",
    "MergeRatio",
    "NoTrim",
    "Policy",
    "Prompt",
    "Regex",
    "Seed",
    "System",
    "Temperature",
    "ask",
    "constrain",
    "held",
    "policy_help",
    "trim_options",
]


def _utf8(text: str | None) -> str | None:
    """Refuse what a shell in another encoding hands on."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"must be UTF-8, got {text!r}: {error.reason} at {error.start}") from None
    return text


def policy_help() -> str:
    """All policies with a line each, which `scripts/generate/docs.py` writes down: policies themselves need torch."""
    summaries: dict[str, str] = json.loads(Path(__file__).with_name("policies.json").read_text())
    return "\n\n".join(["Policies:", *(f"{name}: {summary}" for name, summary in summaries.items())])


Prompt = Annotated[str, typer.Option(callback=_utf8, help="What to ask; - reads standard input.")]
ImageNames = Annotated[list[str] | None, typer.Option("--image", help="Image file, or -; may be given again.")]
System = Annotated[str | None, typer.Option(callback=_utf8, help="A system message.")]
Policy = Annotated[
    str | None,
    typer.Option(callback=_utf8, help="What chooses visual features, of those below; default: the model's first."),
]
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
LookAgain = Annotated[
    float | None,
    typer.Option(
        help="Look again at the part of the image that most heads picked, of this share of its height and width, "
        "in (0, 1]; default: off."
    ),
]
NoTrim = Annotated[bool, typer.Option("--no-trim", help="Keep every valid feature.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, max=2**32 - 1, help="Most tokens to generate; default: the model's.")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        callback=_utf8,
        help="LoRA adapter that answers: the NAME of one that the server at --address has, or NAME=FOLDER without "
        "--address; default: the base model.",
    ),
]
JsonSchema = Annotated[Path | None, typer.Option(help="File with a JSON Schema that the answer is valid against.")]
Regex = Annotated[
    str | None, typer.Option(callback=_utf8, help="Regular expression that matches the answer from end to end.")
]
Choices = Annotated[
    list[str] | None, typer.Option("--choice", help="A text that the answer may be; may be given again.")
]
Seed = Annotated[int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")]


def ask(
    prompt: str,
    images: Sequence[str],
    system: str | None,
    sampling: pb.SamplingParams,
    trim: pb.TrimOptions,
    adapter: str | None = None,
) -> pb.GenerateRequest:
    """A request of what the options say; reads standard input where they say so.

    Args:
        prompt: the question, or `-`.
        images: paths, or `-`.
        system: text of a system message.
        sampling: how tokens are drawn.
        trim: which visual features stay.
        adapter: name of the one that answers; None is the base model.
    Raises:
        InvalidRequest: an image file cannot be read.
    """
    if [prompt, *images].count(STANDARD_INPUT) > 1:
        raise typer.BadParameter("standard input (-) can be read once only, as the prompt or as one image")
    text = _read_prompt() if prompt == STANDARD_INPUT else prompt
    options: RequestOptions = {"sampling": sampling, "trim": trim, "system": system, "adapter": adapter}
    return make_request(text, [read_image(image) for image in images], **options)


def _read_prompt() -> str:
    content = sys.stdin.buffer.read()
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        got = f"byte {content[error.start]:#04x} at position {error.start}"
        raise typer.BadParameter(f"standard input must be UTF-8, got {got}", param_hint="--prompt") from None


def constrain(
    request: pb.GenerateRequest, json_schema: Path | None, regex: str | None, choices: Sequence[str] | None
) -> None:
    """Ask for an answer of the form that the options say; at most one of them.

    Args:
        request: gets the constraint.
        json_schema: file of a schema.
        regex: an expression.
        choices: possible answers.
    """
    told = {"--json-schema": json_schema, "--regex": regex, "--choice": choices or None}
    given = [option for option, value in told.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other")
    if json_schema is not None:
        try:
            request.json_schema = json_schema.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise typer.BadParameter(f"{json_schema}: {why}", param_hint="--json-schema") from None
    if regex is not None:
        request.regex = regex
    if choices:
        request.choice.options.extend(choices)


def trim_options(
    policy: str | None,
    keep: float | None,
    k_ratio: float | None,
    merge_ratio: float | None,
    *,
    no_trim: bool = False,
    look_again: float | None = None,
) -> pb.TrimOptions:
    """Trimming as the options say it.

    Args:
        policy: None is the server's default, as of the others.
        keep: budget of an image.
        k_ratio: budget per head.
        merge_ratio: rows for what does not stay.
        no_trim: switches it off; excludes the others.
        look_again: side of the part that is looked at again, as a share; None is off.
    """
    told = {
        "--policy": policy,
        "--keep": keep,
        "--k-ratio": k_ratio,
        "--merge-ratio": merge_ratio,
        "--look-again": look_again,
    }
    for option, value in told.items():
        if no_trim and value is not None:
            raise typer.BadParameter(f"--no-trim and {option} exclude each other")
    mode = pb.TRIM_MODE_OFF if no_trim else pb.TRIM_MODE_ON
    budget = None if keep is None else pb.Budget(ratio=keep)
    again = None if look_again is None else pb.LookAgain(side_ratio=look_again)
    return pb.TrimOptions(
        mode=mode, policy=policy, budget=budget, k_ratio=k_ratio, merge_ratio=merge_ratio, look_again=again
    )


def held(usage: pb.ImageUsage) -> str:
    """What an image holds, in words.

    Args:
        usage: of one image.
    """
    kept = f"kept {usage.kept_features} of {usage.valid_features} features"
    merged = f", the others as {usage.merged_features} rows" if usage.merged_features else ""
    return f"{kept}{merged} ({(usage.kept_features + usage.merged_features) / usage.valid_features:.1%})"
