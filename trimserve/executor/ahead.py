"""How far the host may be ahead of a GPU: a slice of a prefill ends by what was computed, not by what was queued."""

from collections import deque

import torch

__all__ = ["Ahead"]


class Ahead:
    """Lets one piece of work wait on the device while the host queues the next; on a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is queued.

        Args:
            device: where the work runs.
        """
        self._is_gpu = device.type == "cuda"
        self._queued: deque[torch.cuda.Event] = deque()

    def queued(self) -> None:
        """A piece was queued: wait until the one before it is done."""
        if not self._is_gpu:
            return
        event = torch.cuda.Event()
        event.record()
        self._queued.append(event)
        if len(self._queued) > 1:
            self._queued.popleft().synchronize()
