"""What a finished prefill tells the engine."""

from trimserve.executor.plan import PrefillReport, PrefillTimes
from trimserve.model.key_values import KeyValues
from trimserve.model.prefilled import Prefilled

__all__ = ["prefill_report"]


def prefill_report(sequence: int, prefilled: Prefilled, kv: KeyValues, times: PrefillTimes) -> PrefillReport:
    """Put it together.

    Args:
        sequence: its number.
        prefilled: what the model says.
        kv: of the sequence, after the prefill.
        times: of the stages.
    """
    spans = [] if prefilled.trim_times is None else [prefilled.trim_times, *prefilled.later_trim_times]
    return PrefillReport(
        sequence=sequence,
        num_padding=prefilled.num_padding,
        num_valid=prefilled.num_valid,
        num_kept=prefilled.num_kept,
        num_merged=prefilled.num_merged,
        layer_rows=prefilled.layer_rows,
        held_rows=tuple(kv.cross_lengths),
        selections=prefilled.selections,
        stored=prefilled.kept_sets,
        times=times,
        trim_times=tuple(spans),
    )
