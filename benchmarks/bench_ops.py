"""Times each op against its composition in PyTorch, at the geometry of Llama-3.2-Vision 11B, on one thread.

    python benchmarks/bench_ops.py [--runs 20] [--out FILE]

Compares results first, then times with cold caches. The last line is one JSON document.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimserve import ops
from trimserve.ops import reference

NUM_ROWS, NUM_FEATURES, HEADS, KV_HEADS, HEAD_DIM, DIM = 64, 4 * 1601, 32, 8, 128, 4096
NUM_PICKS = 1281  # k_ratio 0.2
SCORES_RTOL = 1e-5  # tests/tolerances.py, HEADWISE_SCORES
DTYPES = [torch.float32, torch.bfloat16]
Case = tuple[str, Callable[[], Any], Callable[[], Any], int]


def scores_in_torch(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Baseline of headwise_scores when every row sees every feature: two batched ops and a mean."""
    keys = k.permute(1, 2, 0).repeat_interleave(HEADS // KV_HEADS, dim=0)  # [H, Dh, N]
    return (torch.bmm(q.transpose(0, 1), keys).float() * scale).softmax(dim=-1).mean(dim=1)


def cases(dtype: torch.dtype) -> list[Case]:
    """Name, op, baseline and least bytes to move, after each op was found equal to its reference."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(NUM_ROWS, HEADS, HEAD_DIM, generator=generator).to(dtype)
    keys, values = torch.randn(2, NUM_FEATURES, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
    features = torch.randn(NUM_FEATURES, DIM, generator=generator).to(dtype)
    visibility = torch.tensor([[0, NUM_FEATURES]], dtype=torch.int32).expand(NUM_ROWS, 2)
    scale = HEAD_DIM**-0.5

    scores = ops.headwise_scores(q, keys, visibility, scale)
    expected = reference.headwise_scores(q, keys, visibility, scale)
    torch.testing.assert_close(scores, expected, rtol=SCORES_RTOL, atol=0)
    picks = ops.headwise_topk(scores, [NUM_FEATURES], [NUM_PICKS])
    assert torch.equal(picks, reference.headwise_topk(scores, [NUM_FEATURES], [NUM_PICKS]))
    narrow = picks[:3]  # random heads keep nearly everything together; three of them keep about half
    kept, num_kept = ops.union_indices(narrow, NUM_FEATURES)
    assert torch.equal(kept, reference.union_indices(narrow, NUM_FEATURES)[0])
    kept = kept[: int(num_kept)]
    tensors = (features, keys, values)
    results = zip(ops.gather_kv(*tensors, kept), reference.gather_kv(*tensors, kept), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in results)

    row_bytes = sum(tensor[0].nbytes for tensor in tensors)
    return [
        (
            "headwise_scores",
            lambda: ops.headwise_scores(q, keys, visibility, scale),
            lambda: scores_in_torch(q, keys, scale),
            q.nbytes + keys.nbytes + scores.nbytes,
        ),
        (
            "headwise_topk",
            lambda: ops.headwise_topk(scores, [NUM_FEATURES], [NUM_PICKS]),
            lambda: scores.topk(NUM_PICKS).indices.sort().values,
            scores.nbytes + picks.nbytes,
        ),
        (
            "union_indices",
            lambda: ops.union_indices(picks, NUM_FEATURES),
            lambda: picks.unique(),
            picks.nbytes + 8 * NUM_FEATURES,
        ),
        (
            "gather_kv",
            lambda: ops.gather_kv(*tensors, kept),
            lambda: [tensor.index_select(0, kept) for tensor in tensors],
            2 * row_bytes * len(kept),
        ),
    ]


def time_milliseconds(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Median, 10th and 90th percentile of `runs` calls, each after the caches were flushed."""
    flush = torch.empty(64 * 2**20 // 4)
    call()
    samples = []
    for _ in range(runs):
        flush.fill_(0)
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e3)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": round(deciles[4], 3), "p10": round(deciles[0], 3), "p90": round(deciles[-1], 3)}


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    text = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": models[0] if models else platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.strip() or None,
        "build": ops.build_info(),
    }


def main() -> None:
    """Compare, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="timed calls of each op, at least 2")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    results = []
    print(f"{'op':16} {'dtype':9} {'ms: median':>10} {'p10':>8} {'p90':>8} {'PyTorch':>9} {'GB/s':>7}")
    for dtype in DTYPES:
        dtype_name = str(dtype).removeprefix("torch.")
        for name, op, baseline, num_bytes in cases(dtype):
            ours, theirs = (time_milliseconds(call, arguments.runs) for call in (op, baseline))
            row = {"op": name, "dtype": dtype_name, "ms": ours, "baseline_ms": theirs, "bytes": num_bytes}
            results.append(row)
            milliseconds = f"{ours['median']:10.3f} {ours['p10']:8.3f} {ours['p90']:8.3f} {theirs['median']:9.3f}"
            print(f"{name:16} {dtype_name:9} {milliseconds} {num_bytes / ours['median'] / 1e6:7.1f}")
    geometry = {"T": NUM_ROWS, "N": NUM_FEATURES, "H": HEADS, "Hkv": KV_HEADS, "Dh": HEAD_DIM, "D": DIM}
    document = {
        "benchmark": "ops",
        "geometry": {**geometry, "K": NUM_PICKS},
        "machine": machine(),
        "results": results,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
