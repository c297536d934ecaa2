"""A status is of one moment, though the engine's thread goes on meanwhile."""

import threading
from typing import Any, cast

import pytest

from tests.engine.fake_model import FakeModel
from tests.engine.stepping import make_engine
from trimserve.api.status import EngineStatus
from trimserve.config import EngineConfig
from trimserve.engine.engine import Engine
from trimserve.engine.kv_pool import KVPool
from trimserve.engine.status import engine_status


def status_of(engine: Engine) -> EngineStatus:
    return engine_status(engine, (), EngineConfig(), 0, is_ready=True, is_alive=True, uptime_seconds=0.0)


def test_a_pool_that_is_made_anew_while_a_status_is_told_is_told_whole() -> None:
    engine = make_engine(FakeModel())

    class Changing:
        """Has another pool every time that somebody looks."""

        num_pages = 1

        @property
        def pool(self) -> KVPool:
            self.num_pages += 1
            return KVPool(engine.info, engine.pool.page_bytes * self.num_pages)

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

    status = status_of(cast("Engine", Changing()))
    assert status.memory_bytes["kv"] == status.kv_capacity_bytes


@pytest.mark.parametrize("sizes", [(2**20, 2**21)])
def test_statuses_are_told_while_the_engine_s_thread_makes_its_pool_anew(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(FakeModel())
    left = iter(range(200))

    def available(_: str) -> int:
        return sizes[next(left, 0) % 2]

    monkeypatch.setattr("trimserve.engine.engine.available_bytes", available)
    engine.resize_after_warm_up()

    def resize() -> None:
        for _ in range(100):
            engine.resize_after_warm_up()

    thread = threading.Thread(target=resize)
    thread.start()
    statuses = [status_of(engine)]
    while thread.is_alive():
        statuses.append(status_of(engine))
    thread.join()
    capacities = {status.kv_capacity_bytes for status in statuses}
    assert all(status.memory_bytes["kv"] == status.kv_capacity_bytes for status in statuses)
    assert len(capacities) <= 2
    assert 0 not in capacities
