"""Variables of the environment that other packages read and that may not reach a command of trimserve.

They would round what is computed, or are meant for another kind of process. What the other variables do is in
`docs/environment.md`. A program that uses trimserve as a library keeps its environment, which may be meant for the rest
of it; it may call `shut_out` itself, before it imports anything else.
"""

import os

__all__ = ["SHUT_OUT", "shut_out"]

SHUT_OUT = {
    "PROMETHEUS_MULTIPROC_DIR": "metrics would go to files that several processes share; we are one",
    "prometheus_multiproc_dir": "the same, by its older name",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "would round float32 to 10 bits in matrix products",
    "NVIDIA_TF32_OVERRIDE": "would do so in all of NVIDIA's libraries, whatever torch tells them",
}
"""Why, by variable."""


def shut_out() -> None:
    """Remove them from this process and those it starts; before torch and prometheus_client read them, at import."""
    for name in SHUT_OUT:
        os.environ.pop(name, None)
