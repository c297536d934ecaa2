"""What every test shares: one torch thread, and hypothesis without deadlines."""

import os

import torch
from hypothesis import settings

# One thread: with more, a busy neighbour stalls every op at the thread pool's barrier.
torch.set_num_threads(1)

# No deadline: the first example pays for compilation and caches. CI draws the same examples on every run, so
# that its failures can be replayed.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
