"""Who may hold decoded images: a bounded number, the most urgent first."""

from trimserve.engine.lookahead import Lookahead, Ticket


def test_as_many_as_there_is_room_for_begin_and_the_most_urgent_follows() -> None:
    began: list[str] = []
    lookahead = Lookahead(2)
    tickets = {
        name: Ticket((0.0, float(arrived)), lambda name=name: began.append(name))  # type: ignore[misc]  # bound early
        for arrived, name in enumerate("abcd")
    }
    for name in "abdc":
        lookahead.enter(tickets[name])
    assert began == ["a", "b"]
    lookahead.leave(tickets["b"])
    assert began == ["a", "b", "c"]
    lookahead.leave(tickets["b"])
    assert began == ["a", "b", "c"]


def test_who_leaves_while_waiting_never_begins() -> None:
    began: list[str] = []
    lookahead = Lookahead(1)
    first, second = (
        Ticket((0.0, 0.0), lambda: began.append("first")),
        Ticket((0.0, 1.0), lambda: began.append("second")),
    )
    lookahead.enter(first)
    lookahead.enter(second)
    lookahead.leave(second)
    lookahead.leave(first)
    assert began == ["first"]


def test_a_higher_priority_does_not_wait_for_lower_ones() -> None:
    began: list[str] = []
    lookahead = Lookahead(1)
    lookahead.enter(Ticket((0.0, 0.0), lambda: began.append("usual")))
    lookahead.enter(Ticket((-1.0, 1.0), lambda: began.append("urgent")))
    lookahead.enter(Ticket((-1.0, 2.0), lambda: began.append("urgent too")))
    assert began == ["usual", "urgent"]
