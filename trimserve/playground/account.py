"""What an answer held and took, as tables in Markdown."""

from collections.abc import Iterable, Mapping

from trimserve.v1 import generation_pb2 as pb

__all__ = ["account_table", "images_table"]


def images_table(images: Iterable[pb.ImageUsage]) -> str:
    """What is known of the images before the first word.

    Args:
        images: usage of each.
    """
    return _table(_kept(images))


def account_table(finished: pb.Finished) -> str:
    """What is known at the end.

    Args:
        finished: the last message.
    """
    held, times = finished.cross_kv_bytes, finished.timings
    saved = f" ({1 - held.held / held.untrimmed:.1%} less)" if held.held < held.untrimmed else ""
    return _table(
        {
            **_kept(finished.usage.images),
            "cross KV bytes untrimmed": f"{held.untrimmed:,}",
            "cross KV bytes held": f"{held.held:,}{saved}",
            "first token after": _seconds(times.time_to_first_token_seconds),
            "vision encoder": _seconds(times.vision_seconds),
            "prefill with selection": _seconds(times.prefill_seconds),
            "decoding": f"{_seconds(times.decode_seconds)}, {finished.usage.num_generated_tokens} tokens",
            "in all": _seconds(times.total_seconds),
        }
    )


def _kept(images: Iterable[pb.ImageUsage]) -> dict[str, str]:
    facts = {}
    for image in images:  # the page shows one
        rows = image.kept_features + image.merged_features
        merged = f" + {image.merged_features} merged" if image.merged_features else ""
        facts["kept_fraction"] = f"{rows / image.valid_features:.3f}"
        facts["features"] = f"{image.kept_features}{merged} of {image.valid_features}"
    return facts


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _table(facts: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---:|", *lines]) if lines else ""
