"""`trimserve codebook`: options in, a file out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trimserve.config import Config
from trimserve.evaluation.dataset import load_questions
from trimserve.evaluation.progress import progress
from trimserve.knobs import with_knobs

__all__ = ["build", "codebook"]

_WITHOUT_EFFECT = ("adapter", "codebook", "compressor", "guide_model", "k_ratio", "merge_ratio")
"""Knobs: what is redundant is asked of the untrimmed base model."""

codebook = typer.Typer(no_args_is_help=True, help="Make what the policy `codebook` needs.")


@codebook.command()
@with_knobs("model", without=_WITHOUT_EFFECT)
def build(
    data: Annotated[Path, typer.Option(help="JSONL file: image and question on each line; answers are not asked for.")],
    out: Annotated[Path, typer.Option(help="File to write, in safetensors.")],
    prototypes: Annotated[int, typer.Option(min=1, help="Clusters of redundant features.")] = 64,
    features_per_question: Annotated[
        int, typer.Option(min=1, help="Features of each image that are tested; each takes two prefills.")
    ] = 16,
    redundant_ratio: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="A feature is redundant if both of its divergences are in this lower share of all."
        ),
    ] = 0.5,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask the first questions only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the features that are tested.")] = 0,
    num_threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one op on the CPU; default: PyTorch's choice.")
    ] = None,
    *,
    config: Config,
) -> None:
    """Find prototypes of redundant features of a model, and write them as a codebook of this very model."""
    import torch

    from trimserve.evaluation.redundancy import find_prototypes
    from trimserve.model.codebook import save_codebook
    from trimserve.model.loading import load_model

    questions = load_questions(data, limit=limit, need_answers=False)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    model = load_model(config.model, config.engine)
    with progress("questions", len(questions)) as advance:
        found = find_prototypes(
            model,
            questions,
            num_prototypes=prototypes,
            features_per_question=features_per_question,
            redundant_ratio=redundant_ratio,
            seed=seed,
            on_question=advance,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_codebook(out, found, model.info, config.model.intermediate_features)
    Console(stderr=True).print(f"{out}: {len(found)} prototypes", highlight=False, markup=False, soft_wrap=True)
