"""A pretended CUDA device: tensors that say `cuda:0` over values in this process's memory.

Every operator passes through `Device`. It refuses what a GPU refuses (tensors of two devices; waiting and host memory
while a graph is captured) and counts what a GPU pays for: kernels, waits and copies. Our ops run the kernels of
csrc/cuda as fibers, which count their own launches; an operator of torch that computes counts as one kernel. While a
graph is captured, what runs is recorded, to be done again on the same memory. It knows nothing about time.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["Counts", "Device", "PretendedTensor", "Recording"]

_HERE: Final = Path(__file__).parent
_ROOT: Final = _HERE.parents[1]
_PACKAGE: Final = _ROOT / "trimserve"
_TESTS: Final = _ROOT / "tests"
_OF_DEVICE: Final = {_HERE / "device.py", _HERE / "runtime.py"}
_GPU: Final = torch.device("cuda:0")
_HOST: Final = torch.device("cpu")
_ATEN: Final = torch.ops.aten

_WAITS: Final = {
    _ATEN._local_scalar_dense.default,
    _ATEN._unique2.default,
    _ATEN.bincount.default,
    _ATEN.equal.default,
    _ATEN.masked_select.default,
    _ATEN.nonzero.default,
    _ATEN.repeat_interleave.Tensor,
    _ATEN.unique_consecutive.default,
    _ATEN.unique_dim.default,
}
"""Their results have a size, or go to the host, so CUDA waits in them."""
_INDEXING: Final = {
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
}
_FREE: Final = {
    _ATEN._local_scalar_dense.default,
    _ATEN._unsafe_view.default,
    _ATEN.detach_.default,
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
_COPIES: Final = {_ATEN._to_copy.default, _ATEN.copy_.default}
_ATTENTION: Final = _ATEN.scaled_dot_product_attention.default
_WHOLE: Final = {_ATTENTION, _ATEN._fused_rms_norm.default}
"""One kernel on CUDA, though made of others elsewhere."""
_OF_TORCH: Final = {"linear", "rms_norm"}
"""Ops of ours that are torch's own operators on CUDA."""


@dataclass(slots=True)
class Counts:
    """What was done on the device, each by the name of the operator and the line of ours that asked for it."""

    kernels: Counter[str] = field(default_factory=Counter)
    """By operator only."""
    waits: Counter[str] = field(default_factory=Counter)
    """The host waited for all that was queued: `.item()`, copies to the host, results of unknown size."""
    event_waits: int = 0
    """The host waited for a part of what was queued."""
    blocking_copies: Counter[str] = field(default_factory=Counter)
    """To the device, of memory that the host may not touch until they are done, or that is pageable: CUDA may wait for
    what is queued before it copies that."""
    queued_copies: Counter[str] = field(default_factory=Counter)
    """To the device, without waiting."""
    queued_reads: Counter[str] = field(default_factory=Counter)
    """To the host, without waiting."""
    replays: int = 0
    """Of graphs."""
    cudnn_attention: Counter[str] = field(default_factory=Counter)
    """Attention that cuDNN may take, which makes a plan for every new shape."""
    large_attention: Counter[str] = field(default_factory=Counter)
    """Attention that torch's flash and memory-efficient kernels do not take: the logits of all pairs in memory."""


class PretendedTensor(Tensor):
    """A tensor that says `cuda:0`; its values are `host`."""

    host: Tensor

    @staticmethod
    def __new__(cls: type["PretendedTensor"], host: Tensor) -> "PretendedTensor":
        """Wrap a tensor of the CPU."""
        assert not isinstance(host, PretendedTensor)
        with torch.inference_mode(host.is_inference()):  # views of weights are no inference tensors
            wrapper: PretendedTensor = Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=_GPU,
            )
        wrapper.host = host
        return wrapper

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # tensors print themselves
        return f"cuda:0 {self.host!r}"

    def tolist(self) -> Any:
        """Copy to the host first."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # its own signature
        cls, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} on the pretended device outside of it, at {_line()}")


@dataclass(slots=True)
class Recording:
    """What ran while a graph was captured."""

    steps: list[tuple[Callable[[], Any], list[Tensor]]] = field(default_factory=list)
    """Calls, and the tensors that each made."""

    def replay(self) -> None:
        """Do it again, on the same memory."""
        for call, made in self.steps:
            again = call()
            for result, value in zip(made, tree_flatten(again)[0] if made else [], strict=True):
                result.copy_(value)


class Device(TorchDispatchMode):
    """The device, while it is entered."""

    def __init__(self, num_launches: Callable[[], int]) -> None:
        """Nothing has run.

        Args:
            num_launches: how many kernels our ops have launched until now.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types
        self._num_launches = num_launches
        self._reads: list[tuple[Tensor, Tensor]] = []
        self.num_reads = 0
        """Copies to the host that were queued."""
        self._recording: Recording | None = None
        self.counts = Counts()
        """Since `counting` was entered, or from the beginning."""

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        """Count anew."""
        before, self.counts = self.counts, Counts()
        try:
            yield self.counts
        finally:
            self.counts = before

    @contextmanager
    def capturing(self) -> Iterator[Recording]:
        """Record, and refuse what no graph can do."""
        assert self._recording is None, "a graph is being captured"
        self._recording = Recording()
        try:
            yield self._recording
        finally:
            self._recording = None

    def wait(self, name: str) -> None:
        """The host waits for the device."""
        self._refuse_in_graph(f"{name} waits for the device")
        self.counts.waits[f"{name} at {_line()}"] += 1
        self.read(self.num_reads)

    def read(self, number: int) -> None:
        """Let the first so many queued copies to the host arrive."""
        while self._reads and self.num_reads - len(self._reads) < number:
            target, value = self._reads.pop(0)
            target.copy_(value)

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_flatten((args, kwargs))[0]
        tensors = [each for each in given if isinstance(each, Tensor)]
        if not any(_is_here(each) for each in given):
            return _on_host(func, args, kwargs)
        if func.namespace == "trimserve":
            return self._ours(func, args, kwargs)
        if func in _COPIES:
            return self._copy(func, args, kwargs)
        if func not in _WHOLE:
            with self:  # composite operators are what they are made of
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._compute(func, args, kwargs, tensors)

    def _ours(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("trimserve::")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        if name in _OF_TORCH:
            with self:
                return func.redispatch(keys, *args, **kwargs)
        self._check_devices(func, args)
        before = self._num_launches()
        result = self._run(func, partial(func.redispatch, keys), args, kwargs)
        self.counts.kernels[name] += self._num_launches() - before
        return result

    def _copy(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _ATEN.copy_.default:
            target, source = args[:2]
            to_device, does_not_wait = isinstance(target, PretendedTensor), len(args) > 2 and args[2]
        else:
            source = args[0]
            wanted = kwargs.get("device")
            to_device = isinstance(source, PretendedTensor) if wanted is None else torch.device(wanted).type == "cuda"
            does_not_wait = kwargs.get("non_blocking", False)
        if isinstance(source, PretendedTensor) == to_device:
            return self._compute(func, args, kwargs, ())
        name = func._schema.name
        if not to_device and does_not_wait and func is _ATEN.copy_.default:
            self._refuse_in_graph(f"{name} copies to the host")
            self.counts.queued_reads[f"{name} at {_line()}"] += 1
            self._reads.append((target, source.host.clone()))
            self.num_reads += 1
            return target.fill_(torch.nan)  # until somebody waits for it
        if not to_device:
            self.wait(name)
        else:
            self._refuse_in_graph(f"{name} copies from the host")
            is_queued = does_not_wait and getattr(source, "is_pretended_pinned", False)
            copies = self.counts.queued_copies if is_queued else self.counts.blocking_copies
            copies[f"{name} at {_line()}"] += 1
        result = func(*_on_cpu(args), **_on_cpu(kwargs))
        if func is _ATEN.copy_.default:
            return args[0]
        return PretendedTensor(result) if to_device else result

    def _compute(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor]
    ) -> Any:
        name = func._schema.name
        if func in _INDEXING:
            self._index(name, args)
        elif tensors and not name.endswith("_like"):  # of which only the shape counts
            self._check_devices(func, args)
        if func in _WAITS:
            self.wait(name)
        if func is _ATTENTION:
            self._note_attention(*args, **kwargs)
        is_kernel = not (func.is_view or func in _FREE)
        if is_kernel:
            self.counts.kernels[name] += 1
        return self._run(func, func, args, kwargs, is_recorded=is_kernel)

    def _run(
        self,
        func: OpOverload,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_recorded: bool = True,
    ) -> Any:
        """Call on the values; results say `cuda:0`, and what is written to stays the tensor that it was."""
        values, named = _on_cpu(args), _on_cpu(kwargs)
        result = call(*values, **named)
        written = [
            argument.name
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if self._recording is not None and is_recorded:
            made = [] if written else [each for each in tree_flatten(result)[0] if isinstance(each, Tensor)]
            self._recording.steps.append((partial(call, *values, **named), made))
        if written and func._schema.returns:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            targets = tuple(given[name] for name in written)
            return targets[0] if len(targets) == 1 else targets
        if isinstance(kwargs.get("device"), torch.device | str) and torch.device(kwargs["device"]).type != "cuda":
            return result
        return tree_map(lambda each: PretendedTensor(each) if isinstance(each, Tensor) else each, result)

    def _index(self, name: str, args: tuple[Any, ...]) -> None:
        for index in args[1]:
            if index is None:
                continue
            if not isinstance(index, PretendedTensor):
                self._refuse_in_graph(f"{name} copies an index from the host")
                self.counts.blocking_copies[f"{name} at {_line()}"] += 1
            if index.dtype in (torch.bool, torch.uint8):
                self.wait(name)

    def _check_devices(self, func: OpOverload, args: tuple[Any, ...]) -> None:
        for each in tree_flatten(args)[0]:
            if isinstance(each, Tensor) and not isinstance(each, PretendedTensor):
                if each.dim() or func.namespace == "trimserve":
                    raise RuntimeError(f"{func}: expected all tensors to be on cuda:0, got one on {each.device}")
                self._refuse_in_graph(f"{func} reads a number of the host")

    def _note_attention(
        self,
        q: Tensor,
        k: Tensor,
        _v: Tensor,
        attn_mask: Tensor | None = None,
        *_: Any,
        enable_gqa: bool = False,
        **__: Any,
    ) -> None:
        if torch.backends.cuda.cudnn_sdp_enabled():
            self.counts.cudnn_attention[_line()] += 1
        is_for_flash = q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None
        if not is_for_flash and enable_gqa and q.shape[1] != k.shape[1]:
            self.counts.large_attention[_line()] += 1

    def _refuse_in_graph(self, what: str) -> None:
        if self._recording is not None:
            raise RuntimeError(f"while a graph is captured {what}, at {_line()}")


def _is_here(value: Any) -> bool:
    """Whether a tensor is on the device, or a new one is wanted there."""
    return isinstance(value, PretendedTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def _on_host(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in (_ATEN.pin_memory.default, _ATEN._pin_memory.default):  # a page as good as any here
        pinned = args[0].clone()
        pinned.is_pretended_pinned = True
        return pinned
    return func(*args, **kwargs)


def _on_cpu(tree: Any) -> Any:
    def value(each: Any) -> Any:
        if isinstance(each, PretendedTensor):
            return each.host
        return _HOST if isinstance(each, torch.device) else each

    return tree_map(value, tree)


def _line() -> str:
    """The line of the package, or else of a test, that led here."""
    frame = sys._getframe()
    lines = []
    while frame.f_back is not None:
        frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno}"
        if path.is_relative_to(_TESTS) and path not in _OF_DEVICE:
            lines.append(f"{path.relative_to(_ROOT)}:{frame.f_lineno}")
    return lines[0] if lines else "?"
