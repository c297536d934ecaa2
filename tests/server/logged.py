"""What the server writes down about a call."""

from typing import Any

import pytest

from tests.patience import until

__all__ = ["line_of"]


async def line_of(call: str, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """Fields of the one line that tells of a call, `rpc` or `http`: it comes after the caller has its answer."""
    await until(lambda: call in caplog.messages)
    (record,) = (record for record in caplog.records if record.message == call)
    return record.__dict__
