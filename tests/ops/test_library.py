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


def test_ops_link_no_python() -> None:
    spec = importlib.util.find_spec("trimserve.ops._ops_cpu")
    assert spec is not None
    assert spec.origin is not None
    binary = Path(spec.origin).read_bytes()
    assert b"libtorch_cpu.so" in binary
    assert b"libpython" not in binary
    assert b"libtorch_python" not in binary
