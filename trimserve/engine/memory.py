"""How much memory there is, and how much of it the KV pool takes."""

import os
import re
from pathlib import Path

import torch

from trimserve.api.info import ModelInfo
from trimserve.config import EngineConfig
from trimserve.engine.cgroup import CGROUPS, OWN_GROUPS, memory_left
from trimserve.engine.kv_pool import KVPool
from trimserve.errors import CheckpointError, OutOfMemory
from trimserve.model.adapter_files import WEIGHTS_FILE
from trimserve.model.key_values import layers_per_page, num_pages
from trimserve.model.pieces import MLP_ROWS
from trimserve.model.step_buffers import batch_buckets
from trimserve.ops import PAGE_POSITIONS
from trimserve.trimming.plan import scratch_bytes

__all__ = [
    "activation_bytes",
    "available_bytes",
    "check_room_for_adapter",
    "default_kv_cache_bytes",
    "kv_budget",
    "make_pool",
    "memory_by_kind",
    "prefill_scratch_bytes",
    "step_bytes",
]

# On the CPU the memory is everybody's; on a GPU nobody else is expected.
_SHARE = {"cpu": 0.5, "cuda": 0.9}

_WORKSPACE_BYTES = {"cpu": 0, "cuda": 32 * 2**20}
"""Of cuBLAS on a stream, the most that torch gives it by default. The stream of the warm-up's request has its own when
memory is measured; that on which steps are captured is yet to get one."""

_PIECE_POSITIONS = 256
"""Of a sequence, that a block of csrc/cuda/paged_attention.cu takes: sums of all pieces lie in memory for a while."""

_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: str, meminfo: Path = _MEMINFO, cgroup: Path = CGROUPS, own: Path = OWN_GROUPS) -> int:
    """Memory that could still be allocated.

    Args:
        device: as in `ModelInfo.device`.
        meminfo: of the kernel.
        cgroup: where control groups are mounted; their limits are respected.
        own: the kernel's list of the control groups that this process is in.
    """
    if torch.device(device).type == "cuda":
        # What torch's allocator holds in reserve it uses again, and gives back when another size is wanted.
        # Another thread may allocate between the two questions.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + max(0, unused)
    free, left = _free_bytes(meminfo), memory_left(cgroup, own)
    return max(0, free if left is None else min(free, left))


def _free_bytes(meminfo: Path) -> int:
    try:
        text = meminfo.read_text()
    except OSError:  # no Linux
        text = ""
    kibibytes = {name: int(number) for name, number in re.findall(r"^(\S+): +(\d+) kB$", text, re.MULTILINE)}
    if "MemAvailable" in kibibytes:
        return kibibytes["MemAvailable"] * 1024
    if "MemFree" in kibibytes:  # an old kernel, or a sandbox: about what the other is made of
        return sum(kibibytes.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)")) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_room_for_adapter(name: str, folder: Path, available: int) -> None:
    """Check that an adapter fits beside what is there already, before it is read.

    Args:
        name: of the adapter.
        folder: where it lies; whether it can be read at all is found out later.
        available: see `available_bytes`.
    Raises:
        OutOfMemory: its file is larger.
    """
    file = folder / WEIGHTS_FILE
    size = file.stat().st_size if file.is_file() else 0
    if size > available:
        raise OutOfMemory(f"adapter {name!r} takes up to {size} bytes, {available} are free")


def memory_by_kind(info: ModelInfo, kv_cache_bytes: int, adapter_bytes: int) -> dict[str, int]:
    """What the model's device holds, for whoever watches it.

    Args:
        info: of the model.
        kv_cache_bytes: of the page pool.
        adapter_bytes: of all adapters.
    Returns:
        Bytes of `weights`, a guide's included, `adapters`, `kv` (the pool) and `free` (see `available_bytes`); of a GPU
        also what torch's allocator has `reserved` and how much of that is `allocated`.
    """
    kinds = {
        "weights": info.weight_bytes + (info.guide.weight_bytes if info.guide else 0),
        "adapters": adapter_bytes,
        "kv": kv_cache_bytes,
        "free": available_bytes(info.device),
    }
    if torch.device(info.device).type == "cuda":
        kinds["allocated"] = torch.cuda.memory_allocated(info.device)
        kinds["reserved"] = torch.cuda.memory_reserved(info.device)
    return kinds


def prefill_scratch_bytes(info: ModelInfo) -> int:
    """Bytes that the one request in prefill takes beside its pages, for as many images as a request may have.

    Features and the first cross-attention layer's keys and values, before selection and gathered; and what a policy
    takes while it chooses, one image after the other. A guide takes as much of its own, and encodes images meanwhile;
    when the model encodes its own, little of the above is there yet. Of several ranks each sets aside what rank 0
    takes: features are whole everywhere, and rank 0 gathers the keys of all heads (twice while it does).
    """
    num_features, size = info.max_images * info.max_tiles * info.features_per_tile, info.tensor_parallel
    dtype: torch.dtype = getattr(torch, info.dtype)
    keys_values = 2 * info.num_kv_heads * info.head_dim * dtype.itemsize
    rows = 2 * num_features * (info.hidden_size * dtype.itemsize + keys_values // size)
    gathered_keys = num_features * keys_values if size > 1 else 0
    own = rows + gathered_keys + scratch_bytes(info.max_tiles, info.features_per_tile, info.hidden_size)
    guide = info.guide
    return size * own + (prefill_scratch_bytes(guide) + size * guide.vision_scratch_bytes if guide else 0)


def step_bytes(info: ModelInfo, max_rows: int) -> int:
    """Bytes that captured decode steps hold on a GPU: what they read, and the memory that their graphs share.

    Page tables and biases for requests of any size; of the largest step its rows between the parts of a layer, what
    pieces of its sequences leave to be merged, and its logits.

    Args:
        info: of the model.
        max_rows: of a step.
    """
    dtype: torch.dtype = getattr(torch, info.dtype)
    rows = batch_buckets(max_rows)[-1]
    num_self, num_cross = info.num_self_attention_layers, info.num_cross_attention_layers
    per_page = layers_per_page(num_self, num_cross)
    text = num_pages(info.max_model_len)
    features = num_pages(info.max_images * info.max_tiles * info.features_per_tile)
    tables = torch.int32.itemsize * (num_self // per_page * text + num_cross // per_page * features)
    biases = torch.float32.itemsize * num_cross * features * PAGE_POSITIONS
    num_pieces = -(-max(text, features) * PAGE_POSITIONS // _PIECE_POSITIONS)
    partials = torch.float32.itemsize * num_pieces * info.num_heads * (info.head_dim + 2)
    logits = info.vocab_size * (dtype.itemsize + torch.float32.itemsize)
    between = (_row_size(info) + 3 * info.intermediate_size) * dtype.itemsize
    return rows * (tables + biases + partials + logits + between)


def _row_size(info: ModelInfo) -> int:
    """Elements of a row between the parts of a layer: came in, normed, attended, added, goes out; projected."""
    return 5 * info.hidden_size + (info.num_heads + 2 * info.num_kv_heads) * info.head_dim // info.tensor_parallel


def activation_bytes(info: ModelInfo, max_rows: int, available: int) -> int:
    """Bytes that text takes for a while, beside keys and values.

    On a GPU the rows of the longest prompt that the pool can hold, between the parts of a layer, a piece of them in its
    MLP, and what captured steps hold (`step_bytes`); on a CPU these are not counted. With several ranks also the
    queries of these rows and all heads, which rank 0 gathers (twice while it does).

    Args:
        info: of the model.
        max_rows: of a decode step.
        available: for keys and values and all scratch.
    """
    dtype: torch.dtype = getattr(torch, info.dtype)
    size = info.tensor_parallel
    gathered = 2 * info.num_heads * info.head_dim * dtype.itemsize if size > 1 else 0
    if torch.device(info.device).type == "cpu":  # only rank 0 takes it, of the memory of all
        return gathered * min(info.max_model_len, available // (gathered + info.self_kv_bytes_per_token))
    row = _row_size(info) * dtype.itemsize + gathered
    num_rows = min(info.max_model_len, available // (size * row + info.self_kv_bytes_per_token))
    in_mlp = min(num_rows, MLP_ROWS) * 3 * info.intermediate_size // size * dtype.itemsize
    return size * (num_rows * row + in_mlp + step_bytes(info, max_rows))


def default_kv_cache_bytes(info: ModelInfo, max_batch: int, available: int) -> int:
    """Bytes for keys, values and the prefill scratch when nobody says: a share of the memory, but no more than helps.

    Args:
        info: of the model.
        max_batch: requests that run together.
        available: see `available_bytes`; of rank 0's GPU, which the others' are taken to be like.
    """
    layers = layers_per_page(info.num_self_attention_layers, info.num_cross_attention_layers)
    num_features = info.max_images * info.max_tiles * info.features_per_tile
    groups = (info.num_self_attention_layers, info.max_model_len), (info.num_cross_attention_layers, num_features)
    pages = sum(count // layers * num_pages(positions) for count, positions in groups)
    page_bytes = PAGE_POSITIONS * layers * info.kv_bytes_per_position
    kind = torch.device(info.device).type
    share = int(max(0, available - _WORKSPACE_BYTES[kind]) * _SHARE[kind]) * (
        info.tensor_parallel if kind == "cuda" else 1
    )
    scratch = prefill_scratch_bytes(info) + activation_bytes(info, max_batch, share)
    return min(max_batch * pages * page_bytes + scratch, share)


def kv_budget(info: ModelInfo, config: EngineConfig, max_rows: int, available: int) -> tuple[int, int]:
    """What keys, values and scratch take together, and the scratch among it, in bytes.

    Args:
        info: of the model.
        config: `kv_cache_bytes`, or without it `max_batch`, which `default_kv_cache_bytes` goes by.
        max_rows: of a decode step.
        available: see `available_bytes`, beside the model.
    """
    total: int | None = config.kv_cache_bytes
    if total is None:
        total = default_kv_cache_bytes(info, config.max_batch, available)
    return total, prefill_scratch_bytes(info) + activation_bytes(info, max_rows, total)


def make_pool(info: ModelInfo, config: EngineConfig, max_rows: int, available: int) -> KVPool:
    """The page pool that a config asks for, or that the memory allows.

    Args:
        info: of the model.
        config: see `kv_budget`.
        max_rows: see `kv_budget`.
        available: see `kv_budget`.
    Raises:
        CheckpointError: `kv_cache_bytes` does not even hold the prefill scratch and a page.
    """
    total, scratch = kv_budget(info, config, max_rows, available)
    pool = KVPool(info, total - scratch)
    if not pool.num_pages:
        raise CheckpointError(
            f"kv_cache_bytes: must be at least {scratch + pool.page_bytes}, the scratch of a prefill with "
            f"{info.max_images} images (max_images) and a page, got {total}"
        )
    return pool
