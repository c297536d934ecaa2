"""How many requests fit beside a model into a device's memory, by the formulas with which a server sizes its pool.

A plan is arithmetic over a `ModelInfo`: no weights are read, and the device need not be there.
"""

from dataclasses import dataclass, replace

from trimserve.api.info import ModelInfo
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig
from trimserve.engine.kv_pool import KVPool
from trimserve.engine.memory import kv_budget
from trimserve.engine.speculation import most_rows
from trimserve.trimming.budget import cap
from trimserve.trimming.plan import TrimPlan, max_rows

__all__ = ["MOST_REQUESTS", "Plan", "Workload", "make_plan", "of_rank"]

MOST_REQUESTS = 4096
"""Where the search for the most requests ends."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one request is like; all of them are."""

    num_tokens: int
    """Of prompt and answer together, at least 1."""
    num_images: int
    num_tiles: int | None = None
    """Of each image, at least 1; None is the model's most."""
    kept_fraction: float | None = None
    """Measured share of an image's features that stay, in (0, 1]; None is the most that the trimming can leave."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where on one device, in bytes unless said otherwise; of N tensor-parallel devices, on each."""

    memory_bytes: int
    weight_bytes: int
    """A guide's included."""
    kv_cache_bytes: int
    """Keys, values and scratch, as the knob of that name."""
    scratch_bytes: int
    """Of one prefill and, on a GPU, of the longest text."""
    left_bytes: int
    """What remains; negative if even the above does not fit."""
    image_cache_bytes: int
    """Comes out of what remains, as encoding does."""
    vision_scratch_bytes: int
    """Of encoding one image."""
    self_kv_bytes_per_request: int
    cross_kv_bytes_per_request: int
    joining_kv_bytes: int
    """Of a request whose features are not selected yet; at least the two above."""
    num_requests: int
    """That decode together: those asked for, or the most that fit."""
    num_fitting: int
    """Whose keys and values the pool holds with that `max_batch`."""
    step_bytes: int
    """That a decode step of `num_requests` reads."""
    step_bytes_alone: int
    """The same of one request."""

    @property
    def limit(self) -> str | None:
        """What does not fit; None if everything does."""
        if self.weight_bytes > self.memory_bytes:
            return "the weights are larger than the memory"
        if self.left_bytes < 0:
            return "kv_cache_bytes is more than the weights leave"
        if self.num_fitting < max(1, self.num_requests):
            return "the pages of keys and values"
        if self.left_bytes < self.image_cache_bytes + self.vision_scratch_bytes:
            return "image_cache_bytes and the encoder's scratch, which need what is left beside the pool"
        return None


def of_rank(info: ModelInfo, num_devices: int) -> ModelInfo:
    """One of N tensor-parallel devices' share of a model.

    Linear layers of the decoder, heads and their keys and values are divided; the vision encoder, embedding and norms
    are on each.

    Args:
        info: of the whole model.
        num_devices: N, which must divide the KV heads and the width of the MLP.
    Raises:
        ValueError: it does not.
    """
    for name in ("num_kv_heads", "intermediate_size"):
        if getattr(info, name) % num_devices:
            raise ValueError(f"num_devices: must divide the model's {name}, {getattr(info, name)}, got {num_devices}")
    elsewhere = info.linear_bytes - info.linear_bytes // num_devices
    return replace(
        info,
        weight_bytes=info.weight_bytes - elsewhere,
        linear_bytes=info.linear_bytes - elsewhere,
        step_weight_bytes=info.step_weight_bytes // num_devices,
        num_heads=info.num_heads // num_devices,
        num_kv_heads=info.num_kv_heads // num_devices,
        intermediate_size=info.intermediate_size // num_devices,
        kv_bytes_per_position=info.kv_bytes_per_position // num_devices,
    )


def make_plan(
    info: ModelInfo,
    config: EngineConfig,
    workload: Workload,
    memory_bytes: int,
    num_requests: int | None = None,
    num_devices: int = 1,
) -> Plan:
    """Plan one device.

    Args:
        info: of the model and the device.
        config: the server's; its `max_batch` is what is found here.
        workload: the requests.
        memory_bytes: of the device, for trimserve alone.
        num_requests: that are to decode together, at least 1; None is as many as fit, up to `MOST_REQUESTS`.
        num_devices: tensor-parallel ones.
    Raises:
        ValueError: the workload is more than a request may ask for, or the devices cannot share the model.
    """
    _check(info, workload)
    # How many features stay is up to all heads, on whatever device.
    most = _most_kept(info, workload)
    rank = of_rank(info, num_devices)

    of_all = config.kv_cache_bytes
    kv_cache_bytes = None if of_all is None else of_all // num_devices

    def plan(count: int) -> Plan:
        own = config.model_copy(update={"max_batch": count, "kv_cache_bytes": kv_cache_bytes})
        return _plan_for(rank, own, workload, most, memory_bytes)

    if num_requests is not None:
        return plan(num_requests)
    low, high = 0, MOST_REQUESTS  # a larger batch wants more and gets no more, so what fits has an upper end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan(middle).num_fitting >= middle else (low, middle - 1)
    return plan(max(low, 1))


def _check(info: ModelInfo, workload: Workload) -> None:
    for name, most in (
        ("num_tokens", info.max_model_len),
        ("num_images", info.max_images),
        ("num_tiles", info.max_tiles),
    ):
        if (getattr(workload, name) or 0) > most:
            raise ValueError(f"{name}: must be at most {most}, got {getattr(workload, name)}")


def _num_features(workload: Workload, info: ModelInfo) -> int:
    """Of one image."""
    return (workload.num_tiles or info.max_tiles) * info.features_per_tile


def _most_kept(info: ModelInfo, workload: Workload) -> int:
    trim = TrimPlan.of(TrimRequest(k_ratio=info.default_k_ratio, merge_ratio=info.default_merge_ratio))
    features = _num_features(workload, info)
    return workload.num_images * max_rows(features, info.num_heads, info.features_per_tile, trim)


def _plan_for(rank: ModelInfo, config: EngineConfig, workload: Workload, most_kept: int, memory_bytes: int) -> Plan:
    weights = rank.weight_bytes + (rank.guide.weight_bytes if rank.guide else 0)
    rows_of_step = most_rows(config.max_batch, has_drafts=config.speculation)
    total, scratch = kv_budget(rank, config, rows_of_step, max(0, memory_bytes - weights))
    sizes = KVPool(rank, 0, config.kv_layers_per_page)  # for the sizes of pages
    features = workload.num_images * _num_features(workload, rank)
    rows = min(most_kept, cap(workload.kept_fraction, features)) if features else 0
    self_bytes = sizes.self_bytes(workload.num_tokens)
    held, joining = self_bytes + sizes.cross_bytes(rows), self_bytes + sizes.cross_bytes(most_kept)
    pool_bytes = max(0, total - scratch) // sizes.page_bytes * sizes.page_bytes
    num_fitting = 0 if joining > pool_bytes else 1 + (pool_bytes - joining) // held
    return Plan(
        memory_bytes=memory_bytes,
        weight_bytes=weights,
        kv_cache_bytes=total,
        scratch_bytes=scratch,
        left_bytes=memory_bytes - weights - total,
        image_cache_bytes=config.image_cache_bytes,
        vision_scratch_bytes=rank.vision_scratch_bytes,
        self_kv_bytes_per_request=self_bytes,
        cross_kv_bytes_per_request=held - self_bytes,
        joining_kv_bytes=joining,
        num_requests=config.max_batch,
        num_fitting=num_fitting,
        step_bytes=rank.step_weight_bytes + config.max_batch * held,
        step_bytes_alone=rank.step_weight_bytes + held,
    )
