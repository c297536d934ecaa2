"""How many requests fit beside a model into a device's memory, by the formulas with which a server sizes its pool.

A plan is arithmetic over a `ModelInfo`: no weights are read, and the device need not be there.
"""

from dataclasses import dataclass

from trimserve.api.info import ModelInfo
from trimserve.api.trim import TrimRequest
from trimserve.config import EngineConfig
from trimserve.engine.kv_pool import KVPool
from trimserve.engine.memory import kv_budget
from trimserve.engine.speculation import most_rows
from trimserve.trimming.budget import cap
from trimserve.trimming.plan import TrimPlan, max_rows

__all__ = ["MOST_REQUESTS", "Plan", "Workload", "make_plan"]

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
    """What goes where on one device, in bytes unless said otherwise.

    Of the GPUs that share a model on each; processes that share it on a CPU share the memory, too, and count together.
    """

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


def make_plan(
    info: ModelInfo, config: EngineConfig, workload: Workload, memory_bytes: int, num_requests: int | None = None
) -> Plan:
    """Plan one device.

    Args:
        info: of the model and the device.
        config: the server's; its `max_batch` is what is found here.
        workload: the requests.
        memory_bytes: of the device, for trimserve alone.
        num_requests: that are to decode together, at least 1; None is as many as fit, up to `MOST_REQUESTS`.
    Raises:
        ValueError: the workload is more than a request may ask for.
    """
    _check(info, workload)

    def plan(count: int) -> Plan:
        return _plan_for(info, config.model_copy(update={"max_batch": count}), workload, memory_bytes)

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


def _plan_for(info: ModelInfo, config: EngineConfig, workload: Workload, memory_bytes: int) -> Plan:
    # What follows is of all ranks together until it is divided among the devices that have memory of their own.
    devices = 1 if info.device == "cpu" else info.tensor_parallel
    ranks_of_device = info.tensor_parallel // devices
    weights = info.weight_bytes + (info.guide.weight_bytes if info.guide else 0)
    rows_of_step = most_rows(config.max_batch, has_drafts=config.speculation)
    total, scratch = kv_budget(info, config, rows_of_step, max(0, memory_bytes - weights // devices))
    sizes = KVPool(info, 0)  # for the sizes of pages
    features, most_kept = workload.num_images * _num_features(workload, info), _most_kept(info, workload)
    rows = min(most_kept, cap(workload.kept_fraction, features)) if features else 0
    self_bytes, cross_bytes = sizes.self_bytes(workload.num_tokens), sizes.cross_bytes(rows)
    held, joining = self_bytes + cross_bytes, self_bytes + sizes.cross_bytes(most_kept)
    pool_bytes = max(0, total - scratch) // sizes.page_bytes * sizes.page_bytes
    num_fitting = 0 if joining > pool_bytes else 1 + (pool_bytes - joining) // held
    return Plan(
        memory_bytes=memory_bytes,
        weight_bytes=weights // devices,
        kv_cache_bytes=total // devices,
        scratch_bytes=scratch // devices,
        left_bytes=memory_bytes - (weights + total) // devices,
        image_cache_bytes=config.image_cache_bytes * ranks_of_device,
        vision_scratch_bytes=info.vision_scratch_bytes * ranks_of_device,
        self_kv_bytes_per_request=self_bytes // devices,
        cross_kv_bytes_per_request=cross_bytes // devices,
        joining_kv_bytes=joining // devices,
        num_requests=config.max_batch,
        num_fitting=num_fitting,
        step_bytes=(info.step_weight_bytes + config.max_batch * held) // devices,
        step_bytes_alone=(info.step_weight_bytes + held) // devices,
    )
