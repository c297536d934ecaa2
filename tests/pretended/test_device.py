"""The pretended device refuses what a GPU refuses, counts what it pays for, and replays graphs on the same memory."""

import pytest
import torch

from tests.pretended.device import Device
from trimserve import ops


def here(*values: float) -> torch.Tensor:
    return torch.tensor(values, device="cuda")


@pytest.fixture(autouse=True)
def inference(gpu: Device) -> object:  # noqa: ARG001 - it must be there
    """As the package computes."""
    with torch.inference_mode():
        yield


def test_its_tensors_say_where_they_are_and_compute_as_the_cpu_does() -> None:
    x = here(1.0, 2.0, 3.0)
    assert x.device == torch.device("cuda:0")
    assert (x * 2 + 1).cpu().tolist() == [3.0, 5.0, 7.0]
    assert (x.view(3, 1) @ x.view(1, 3))[1:, [0, 2]].tolist() == [[2.0, 6.0], [3.0, 9.0]]


def test_tensors_of_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="got one on cpu"):
        here(1.0, 2.0) + torch.ones(2)
    with pytest.raises(RuntimeError, match="got one on cpu"):
        ops.silu_gate(here(1.0, 2.0)[None]) + torch.ones(1)
    assert (here(1.0) + torch.tensor(2.0)).tolist() == [3.0]  # a number is a kernel's argument


def test_views_and_memory_cost_nothing_and_a_kernel_is_one(gpu: Device) -> None:
    x = torch.zeros(4, 6, device="cuda")
    with gpu.counting() as counts:
        torch.empty_like(x.view(6, 4).transpose(0, 1)[:2].chunk(2)[0])
    assert not counts.kernels
    with gpu.counting() as counts:
        torch.nn.functional.linear(x, x).add_(1).softmax(dim=-1)
        ops.rotate(x.view(4, 1, 6), torch.ones(4, 3, device="cuda"), torch.ones(4, 3, device="cuda"))
    assert counts.kernels == {"aten::mm": 1, "aten::add_": 1, "aten::_softmax": 1, "aten::ones": 2, "rotate": 1}


def test_a_copy_to_the_host_that_nobody_waits_for_arrives_when_its_event_is_waited_for(gpu: Device) -> None:
    first, second = torch.empty(2, device="cpu").pin_memory(), torch.empty(1, device="cpu").pin_memory()
    with gpu.counting() as counts:
        first.copy_(here(1.0, 2.0), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        second.copy_(here(3.0), non_blocking=True)
    assert not counts.waits
    assert sum(counts.queued_reads.values()) == 2
    assert first.isnan().all()
    event.synchronize()
    assert first.tolist() == [1.0, 2.0]
    assert second.isnan().all()
    torch.cuda.synchronize()
    assert second.tolist() == [3.0]


def test_waits_and_copies_are_told_by_line(gpu: Device) -> None:
    x, is_large = here(1.0, 5.0), here(1.0, 5.0) > 2
    with gpu.counting() as counts:
        assert x.sum().item() == 6.0
        assert x[is_large].tolist() == [5.0]
        x.copy_(torch.ones(2).pin_memory(), non_blocking=True)
    assert sum(counts.waits.values()) == 3  # item, the mask's size, tolist
    assert all("tests/pretended/test_device.py" in line for line in counts.waits)
    assert sum(counts.queued_copies.values()) == 1
    assert not counts.blocking_copies
    with gpu.counting() as counts:
        x.copy_(torch.ones(2))
        torch.ones(2).to("cuda")
        torch.ones(2).to("cuda", non_blocking=True)  # pageable
    assert sum(counts.blocking_copies.values()) == 3


def test_a_graph_does_again_what_was_captured_on_the_same_memory() -> None:
    x, total = here(1.0, 2.0), here(0.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += x.sum()
        doubled = torch.cat([x, x])
    assert total.tolist() == [3.0]  # capturing ran it, which a GPU does not
    x.fill_(5.0)
    graph.replay()
    assert total.tolist() == [13.0]
    assert doubled.tolist() == [5.0] * 4


def test_graphs_of_one_pool_overwrite_each_others_results() -> None:
    x, pool = here(1.0), torch.cuda.graph_pool_handle()
    results = []
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    for graph in graphs:
        with torch.cuda.graph(graph, pool=pool):
            results.append(x + 1)
    graphs[0].replay()
    graphs[1].replay()
    assert results[0].isnan().all()
    assert results[1].tolist() == [2.0]


def test_while_a_graph_is_captured_nothing_waits_and_nothing_comes_from_the_host() -> None:
    x = here(1.0, 2.0)
    for call, reason in [
        (lambda: x.sum().item(), "waits for the device"),
        (lambda: x[x > 1], "waits for the device"),
        (lambda: torch.ones(2).to("cuda", non_blocking=True), "copies from the host"),
        (lambda: x[torch.tensor([0])], "copies an index from the host"),
        (lambda: x + torch.tensor(1.0), "reads a number of the host"),
    ]:
        with pytest.raises(RuntimeError, match=reason), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()  # type: ignore[no-untyped-call]  # the test's own lambdas
