"""What trimming saves and costs, from bytes that were counted and an evaluation: README.md and the first page."""

from typing import Any

__all__ = ["headline", "saving"]


def headline(of_bytes: dict[str, Any], of_trimming: dict[str, Any]) -> str:
    """What trimming saves and costs, in a few lines of Markdown.

    Args:
        of_bytes: the report.
        of_trimming: report of `trimserve eval` on the embedded model, of the budgets that it recommends, among others.
    """
    model, row, before = _exact_answers(of_bytes, of_trimming)
    at_once = model["at_once"]["four_tiles"]
    held = f"{_share(model, 'four_tiles'):.0%} for 4 tiles, {_share(model, 'one_tile'):.0%} for 1 tile"
    counts = f"untrimmed {at_once['trimserve_untrimmed']}, transformers {at_once['transformers']}"
    right = f"{row['accuracy']['value']:.1%}, untrimmed {before:.1%}"
    return "\n".join(
        [
            "| saved and paid, embedded model | |\n|---|---|",
            f"| cross-attention KV of an image, as a share of transformers' | {held} |",
            f"| requests with a 4-tile image at once, in equal memory | {at_once['trimserve']}, {counts} |",
            f"| exact answers to {row['num_questions']:,} held-out questions | {right} |",
        ]
    )


def saving(of_bytes: dict[str, Any], of_trimming: dict[str, Any]) -> str:
    """The same in one sentence; takes what `headline` takes."""
    model, row, before = _exact_answers(of_bytes, of_trimming)
    return (
        f"An image of four tiles holds **{_share(model, 'four_tiles'):.0%}** of the cross-attention KV that it holds "
        f"in transformers, and **{row['accuracy']['value']:.1%}** of {row['num_questions']:,} held-out questions are "
        f"answered exactly; untrimmed, {before:.1%} are (embedded model)."
    )


def _share(model: dict[str, Any], request: str) -> float:
    """Cross-attention KV of a request, as a share of what transformers holds for it."""
    held = model["requests"][request]["bytes"]
    return float(held["trimserve"]["cross"] / held["transformers"]["cross"])


def _exact_answers(
    of_bytes: dict[str, Any], of_trimming: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """The embedded model, the evaluation's row of its own setting, and the accuracy without trimming."""
    [model] = [model for model in of_bytes["models"] if model["model"] == "embedded"]
    setting = {"policy": "trimmed", "k_ratio": model["k_ratio"], "merge_ratio": model["merge_ratio"], "kind": "all"}
    [row] = [row for row in of_trimming["rows"] if setting.items() <= row.items()]
    return model, row, row["accuracy"]["value"] - row["accuracy_change"]["value"]
