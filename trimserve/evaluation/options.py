"""Options of `trimserve eval`: what each is called, takes and means."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trimserve.config import Device, Dtype, Quantize

__all__ = [
    "ALL_POLICIES",
    "KEEP_OF_ALL",
    "Adapter",
    "By",
    "Calibrate",
    "Data",
    "GuideModel",
    "KRatios",
    "Keep",
    "Limit",
    "MaxKl",
    "MergeRatios",
    "Model",
    "ModelCodebook",
    "ModelCompressor",
    "ModelDevice",
    "ModelDtype",
    "ModelQuantize",
    "NumThreads",
    "Out",
    "Policies",
]

ALL_POLICIES = "all"
"""In `--policies`: every one."""

KEEP_OF_ALL = "0.05,0.11,0.22,0.33,0.5"
"""`--keep` where every policy is asked and nothing else is said."""

Data = Annotated[Path, typer.Option(help="JSONL file: image, question, answer and kind on each line.")]
Out = Annotated[Path, typer.Option(help="Folder for report.json and curves.png, or calibration.json.")]
Policies = Annotated[
    str,
    typer.Option(
        help="What chooses the features, separated by commas, each with parameters if need be "
        "(vispruner:layer=3:important_ratio=0.25); the first is compared with the others. all: every policy, beside "
        "random."
    ),
]
KRatios = Annotated[
    str,
    typer.Option(
        help="Budgets per head, each in (0, 1], separated by commas; other policies than trimmed keep as many features "
        "as it does."
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Instead of --k-ratios: shares of each image that every policy keeps, each in (0, 1], separated by "
        f"commas; with --policies all: {KEEP_OF_ALL}."
    ),
]
MergeRatios = Annotated[
    str,
    typer.Option(
        help="Rows that the other features of a tile are merged into, as shares of its own, each in [0, 1], separated "
        "by commas; 0 drops them."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask the first questions only.")]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Instead find the smallest k_ratio within --max-kl; with --keep the policy's parameters whose answers "
        "begin most like the untrimmed ones. Takes the first policy and the first merge_ratio; needs no answers.",
    ),
]
By = Annotated[
    Literal["cosine", "kl"],
    typer.Option(
        help="What --calibrate with --keep goes by: the cosine of the logits after the prompt with the untrimmed ones, "
        "or the KL of their distributions."
    ),
]
MaxKl = Annotated[
    float, typer.Option(min=0, help="Bound on the mean KL of the first token's distribution to untrimmed, in nats.")
]
NumThreads = Annotated[int | None, typer.Option(min=1, help="Threads of one op on the CPU; default: PyTorch's choice.")]
Model = Annotated[str | None, typer.Option("--model", help="Folder or hub id; default: the embedded model.")]
ModelDevice = Annotated[
    Device, typer.Option(help="Where a model in this process runs; auto: a GPU where there is one.")
]
ModelDtype = Annotated[Dtype, typer.Option(help="Of weights and KV of a model in this process.")]
ModelQuantize = Annotated[Quantize, typer.Option(help="How that model's linear layers are stored.")]
ModelCompressor = Annotated[
    list[Path] | None,
    typer.Option("--compressor", help="File of `trimserve train-compressor` for its policy; again for another policy."),
]
ModelCodebook = Annotated[Path | None, typer.Option(help="File of prototypes for its policy `codebook`.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="LoRA adapter that answers: the NAME of one that the server at --address has, or NAME=FOLDER without "
        "--address; default: the base model."
    ),
]
GuideModel = Annotated[str | None, typer.Option(help="Folder or hub id of the guide for its policy `guided`.")]
