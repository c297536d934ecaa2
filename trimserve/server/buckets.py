"""Bounds of the histograms' buckets."""

__all__ = [
    "BATCH",
    "CROSS_KV",
    "DURATION",
    "FIRST_TOKEN",
    "FRACTION",
    "HANDLING",
    "IMAGES",
    "LAG",
    "PER_TOKEN",
    "QUEUE",
    "STAGE",
    "TOKENS",
]

# Seconds. Handling covers whole answers, so it ends later than the ecosystem's usual 10 s.
HANDLING = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
DURATION = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300)
FIRST_TOKEN = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40)
PER_TOKEN = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STAGE = (0.0001, 0.00025, 0.0006, 0.0015, 0.004, 0.01, 0.025, 0.06, 0.15, 0.4, 1, 2.5, 6, 10, 30, 60, 120)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
IMAGES = (0, 1, 2, 3, 4, 8, 16)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FRACTION = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
# Bytes: the embedded model's requests take some hundred KiB, one 4-tile image of the 11B model 200 MiB.
KIB, MIB = 2**10, 2**20
CROSS_KV = (
    *(size * KIB for size in (0, 16, 64, 256)),
    *(size * MIB for size in (1, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024, 2048)),
)
