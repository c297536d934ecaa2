"""The compiled modules: how they load, what they say of themselves, what they do not depend on."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import trimserve
from trimserve.ops import build_info, load_library


def test_build_info_names_this_version() -> None:
    info = build_info()
    assert info["version"] == trimserve.__version__
    assert info["torch_target_version"] == "2.10"
    assert info["cuda_architectures"] in ([], ["80-real", "90-real", "90-virtual"])
    assert set(info) == {
        "version",
        "compiler",
        "build_type",
        "torch_target_version",
        "cuda_architectures",
        "git_sha",
    }


def test_loading_twice_does_nothing() -> None:
    load_library()


def test_missing_build_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="run `make build`"):
        load_library()


def test_import_brings_neither_transformers_nor_grpc() -> None:
    program = "import sys, trimserve.ops; print({'transformers', 'grpc', 'google.protobuf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


FIRST_CALL = """
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
from trimserve import ops
imported = time.process_time() - start
ops.select_features(torch.rand(4, 64), [64], [8])
compilers = ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "triton")
print(imported, [name for name in set(sys.modules) - before if name.startswith(compilers)])
"""


def test_import_takes_under_a_second_and_a_half_and_nothing_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, check=True)
    seconds, compilers = done.stdout.split(maxsplit=1)
    assert float(seconds) < 1.5  # of the process: what else the machine does is not counted
    assert compilers.strip() == "[]"


def test_ops_link_no_python() -> None:
    spec = importlib.util.find_spec("trimserve.ops._ops_cpu")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).read_bytes()
    assert b"libtorch_cpu.so" in binary
    assert b"libpython" not in binary
    assert b"libtorch_python" not in binary
