"""Every benchmark is a command that says what it does."""

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = sorted(path.stem for path in Path(__file__).parents[2].glob("benchmarks/bench_*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_tells_its_options(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert str(module.__doc__).partition("\n")[0] in said
    assert f"-m benchmarks.{name}" in said
    assert "--out" in said
