"""`make verify-batch`: how its two sides are timed."""

from scripts.verify.batch import in_pairs


def test_pairs_are_measured_back_to_back_and_each_is_first_in_turn() -> None:
    asked: list[tuple[str, int]] = []

    def figure(name: str, number: int) -> float:
        asked.append((name, number))
        return float(number)

    pairs = in_pairs(lambda number: figure("one", number), lambda number: -figure("other", number), 2)
    assert pairs == [(1.0, -1.0), (2.0, -2.0)]
    assert asked == [("other", 0), ("one", 0), ("one", 1), ("other", 1), ("other", 2), ("one", 2)]
