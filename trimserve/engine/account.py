"""What a prefill came to, for the client: features of each image, bytes of cross-attention KV."""

from collections.abc import Iterable

from trimserve.api.chunks import CrossKvBytes, ImageUsage
from trimserve.engine.kv_pool import KVPool
from trimserve.executor.plan import PrefillReport

__all__ = ["account_cross_kv", "image_usage"]


def image_usage(report: PrefillReport) -> tuple[ImageUsage, ...]:
    """Visual features of each image."""
    num_merged = report.num_merged or (0,) * len(report.num_kept)
    layer_rows: Iterable[tuple[int, ...]] = [()] * len(num_merged)
    if report.layer_rows:
        layer_rows = zip(*report.layer_rows, strict=True)
    counts = zip(report.num_padding, report.num_valid, report.num_kept, num_merged, layer_rows, strict=True)
    return tuple(ImageUsage(*of_image) for of_image in counts)


def account_cross_kv(report: PrefillReport, held_bytes: int, pool: KVPool) -> CrossKvBytes:
    """Who saved how many bytes of cross-attention KV; each step of the way in whole pages.

    Args:
        report: counts of padding, valid, kept and merged features, and of what each layer holds.
        held_bytes: what the request really holds.
        pool: knows the size of a page.
    """
    valid, left = sum(report.num_valid), sum(report.num_kept) + sum(report.num_merged)
    padded_bytes = pool.cross_bytes(sum(report.num_padding) + valid)
    untrimmed_bytes, left_bytes = pool.cross_bytes(valid), pool.cross_bytes(left)
    if report.layer_rows:
        left_bytes = pool.layered_cross_bytes([sum(rows) for rows in report.layer_rows])
    return CrossKvBytes(
        untrimmed=untrimmed_bytes,
        held=held_bytes,
        saved_by_padding=padded_bytes - untrimmed_bytes,
        saved_by_trimming=untrimmed_bytes - left_bytes,
        saved_by_visibility=left_bytes - held_bytes,
    )
