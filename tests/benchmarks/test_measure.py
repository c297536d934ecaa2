"""How calls are timed, and what is made of the times."""

import time

import pytest

from benchmarks import measure


def test_calls_take_turns_and_slow_ones_are_timed_five_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_FLUSH_BYTES", {"cpu": 4096})
    monkeypatch.setattr(measure, "_SLOW_MILLISECONDS", 200)
    called: list[str] = []

    def slow() -> None:
        called.append("slow")
        time.sleep(0.2)  # is slow: see _SLOW_MILLISECONDS above

    fast_ms, slow_ms = measure.time_cold([lambda: called.append("fast"), slow], 7)
    assert called == ["fast", "slow"] * 6 + ["fast"] * 2
    assert 0 <= fast_ms["p10"] <= fast_ms["median"] <= fast_ms["p90"]
    assert slow_ms["p10"] >= 200 > fast_ms["median"]


def test_a_copy_moves_its_bytes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_STREAM_BYTES", 4096)
    read, num_read = measure.stream("read")
    copy, num_copied = measure.stream("copy")
    assert (num_read, num_copied) == (4096, 8192)
    assert read().item() == 1024
    assert copy().sum().item() == 1024


def test_a_single_sample_has_no_spread() -> None:
    assert measure.spread([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert measure.spread([float(each) for each in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
