"""Who waits and who runs: the most urgent waiting sequence gets the next free place of the batch.

One order holds for all of it, larger priority first, then who was submitted first: the head of the queue joins next,
and the last one that runs is the first to be preempted.

It knows neither model nor KV. The bound of the queue is kept in `runner.py`, where requests enter, before
their images are decoded.
"""

from bisect import insort

from trimserve.engine.sequence import Sequence, SequenceState

__all__ = ["Scheduler"]


class Scheduler:
    """The waiting and the running sequences."""

    def __init__(self, max_batch: int) -> None:
        """Start empty.

        Args:
            max_batch: sequences that run at the same time, at least 1.
        """
        self.running: list[Sequence] = []
        """In the order of admission."""
        self._waiting: list[Sequence] = []
        self._max_batch = max_batch

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self._waiting)

    @property
    def next(self) -> Sequence | None:
        """The head of the queue when the batch has a place for it, and for all answers that begin with it.

        Answers that join late may find none that still has their prompt.
        """
        if not self._waiting:
            return None
        places = min(self._waiting[0].num_joining, self._max_batch)
        return self._waiting[0] if len(self.running) + places <= self._max_batch else None

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue: larger priority first, then who was submitted first."""
        insort(self._waiting, sequence, key=_urgency)

    def by_urgency(self) -> list[Sequence]:
        """Those that run, the most urgent first."""
        return sorted(self.running, key=_urgency)

    def admit(self) -> Sequence:
        """Move `next` into the batch. Nobody overtakes it: what is behind it waits until there is room for it."""
        sequence = self._waiting.pop(0)
        sequence.state = SequenceState.RUNNING
        self.running.append(sequence)
        return sequence

    def send_back(self, sequence: Sequence) -> None:
        """Move a running sequence back into the queue, to the place that it had."""
        self.running.remove(sequence)
        sequence.state = SequenceState.WAITING
        self.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        sequence.state = SequenceState.ENDED
        for sequences in (self._waiting, self.running):
            if sequence in sequences:
                sequences.remove(sequence)


def _urgency(sequence: Sequence) -> tuple[float, float]:
    return -sequence.priority, sequence.submitted_at
