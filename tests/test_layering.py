"""Imports go one way: server -> engine -> executor -> model -> trimming -> ops; each library stays in its layer."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trimserve"
LAYERS = ["ops", "trimming", "model", "executor", "engine", "server"]  # from below; a layer may use those before it
SHARED = {"api", "config", "errors", "loopback", "__init__"}
# Libraries that only these parts may import.
HOMES = {
    "grpc": {"server", "client", "connection", "cli", "v1"},
    "grpc_health": {"server"},
    "grpc_reflection": {"server"},
    "grpc_status": {"server"},
    "google": {"server", "client", "cli", "v1"},
    "prometheus_client": {"server"},
    "opentelemetry": {"server"},
    "transformers": {"model"},
    "huggingface_hub": {"model"},
    "matplotlib": {"evaluation"},
}
SEAM = ROOT / "model/transformers_mllama.py"
# What the other files may import of transformers, and what they may not reach into.
NO_MODEL_CODE = (
    "transformers.AutoTokenizer",
    "transformers.MllamaConfig",
    "transformers.MllamaProcessor",
    "transformers.PreTrainedTokenizerBase",
    "transformers.models.mllama.configuration_mllama.",
    "transformers.models.mllama.image_processing_pil_mllama.",
)
MODULES_OF_MLLAMA = {"language_model", "vision_model", "multi_modal_projector", "self_attn", "cross_attn"}
MODULES = sorted(path for path in ROOT.rglob("*.py"))


def part(path: Path) -> str:
    """The layer, or the top-level module, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    home = part(path)
    for name in imports(path):
        first, *rest = name.split(".")
        if first in HOMES:
            assert home in HOMES[first], f"{path} imports {name}"
        if first == "trimserve" and rest and home in LAYERS:
            target = rest[0]
            allowed = {*SHARED, *LAYERS[: LAYERS.index(home) + 1], *({"v1"} if home == "server" else set())}
            assert target in allowed or not (ROOT / target).exists(), f"{path} imports {name}"
        if first == "trimserve" and rest and home in SHARED:
            assert rest[0] in SHARED, f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path != SEAM], ids=lambda path: path.stem)
def test_only_one_file_borrows_transformers_model_code(path: Path) -> None:
    for name in imports(path):
        assert not f"{name}.".startswith("transformers.") or name.startswith(NO_MODEL_CODE), f"{path} imports {name}"
    reached = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not reached & MODULES_OF_MLLAMA, path


def test_the_compiled_modules_are_loaded_only_in_ops() -> None:
    loaders = {part(path) for path in MODULES if "load_library(" in path.read_text() or "_host" in path.read_text()}
    assert loaders <= {"ops"}


def test_host_and_device_kernels_contain_no_torch() -> None:
    kernels = [*(ROOT.parent / "csrc/cpu").glob("*"), *(ROOT.parent / "csrc/cuda").glob("*.cu")]
    assert kernels
    for path in kernels:
        assert "torch/" not in path.read_text(), path
