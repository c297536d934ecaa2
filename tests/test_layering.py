"""Each part of the package imports only what its place allows; tests/test_lean_import.py checks it by execution.

The arrow: server -> engine -> executor -> model -> trimming -> ops. The server knows the engine by a protocol only, and
`serve.py` puts the two together.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trimserve"
MODULES = sorted(ROOT.rglob("*.py"))

PLAIN = {"api", "config", "errors", "loopback", "validation"}
"""What everyone may import."""

ARROW = ["ops", "trimming", "model", "executor", "engine"]
"""From below; each may import those before it."""

MAY_IMPORT = {
    # plain values, and helpers of one file
    "__init__": set(),
    "api": set(),
    "errors": set(),
    "loopback": set(),
    "parent": set(),
    "environment": set(),
    "process": set(),
    "v1": set(),
    "validation": set(),
    "config": {"api", "loopback"},
    "imaging": {"errors", "parent"},
    # the arrow
    **{part: {*PLAIN, "imaging", "parent", *ARROW[:place]} for place, part in enumerate(ARROW)},
    # the server, which the arrow reaches only through its protocol of an engine
    "server": PLAIN,
    "server/grpc": {*PLAIN, "server", "v1"},
    # The contract is one for all transports, so its conversion is gRPC's.
    "server/http": {*PLAIN, "server", "server/grpc", "v1"},
    # outside the arrow
    "serve": {*PLAIN, *ARROW, "imaging", "server", "server/grpc", "server/http"},
    "client": {"loopback", "v1"},
    "options": set(),
    "connection": {"client", "options", "refusal"},
    "knobs": {"config", "options", "validation"},
    "refusal": set(),
    "image_files": {"errors", "refusal", "v1"},
    "batch": {"client", "errors", "image_files", "refusal", "v1"},
    "explain": {"api", "v1"},
    "playground": {"client", "connection", "errors", "explain", "imaging", "refusal", "v1"},
    "planner": {*PLAIN, *ARROW},
    "evaluation": {*PLAIN, *ARROW, "client", "connection", "knobs", "v1"},
    "distillation": {*PLAIN, *ARROW, "evaluation", "knobs"},
    "commands": {
        *PLAIN,
        *("ops", "model", "server", "serve"),
        *("batch", "client", "connection", "explain", "image_files", "knobs", "options", "planner", "playground"),
        *("refusal", "v1"),
    },
    "cli": {"batch", "commands", "distillation", "engine", "environment", "errors", "evaluation", "refusal"},
    "__main__": {"cli"},
}
"""Parts of the package by the part that may import them."""

STANDARD_LIBRARY_ONLY = {"__init__", "__main__", "api", "errors", "loopback", "environment", "parent", "process"}

HOMES = {
    "grpc": {
        *("server/grpc", "client", "connection", "refusal", "image_files", "batch", "commands", "playground", "cli"),
        "v1",
    },
    "grpc_health": {"server/grpc"},
    "grpc_reflection": {"server/grpc"},
    "grpc_status": {"server/grpc", "refusal"},
    "google": {"server/grpc", "server/http", "refusal", "batch", "commands", "playground", "v1"},
    "prometheus_client": {"server"},
    "opentelemetry": {"server"},
    "structlog": {"server"},
    "starlette": {"server/http"},
    "uvicorn": {"server/http"},
    "torch": {*ARROW, "serve", "evaluation", "distillation", "commands"},
    "transformers": {"model"},
    "huggingface_hub": {"model"},
    "tokenizers": {"model", "engine", "executor"},
    "llguidance": {"executor"},
    "typer": {"cli", "commands", "connection", "distillation", "evaluation", "knobs"},
    "matplotlib": {"evaluation"},
    "gradio": {"playground"},
}
"""Libraries by the parts that may import them."""

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


def part(*names: str) -> str:
    """The part that a module belongs to, by its dotted name below `trimserve`."""
    return "/".join(names[:2]) if names[:2] in (("server", "grpc"), ("server", "http")) else names[0]


def home(path: Path) -> str:
    """The part that a file belongs to."""
    return part(*path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


def test_every_part_has_its_place() -> None:
    assert {home(path) for path in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    own = home(path)
    for package, *rest in imports(path):
        name = ".".join([package, *rest])
        if package in HOMES:
            assert own in HOMES[package], f"{path} imports {name}"
        if own in STANDARD_LIBRARY_ONLY and package != "trimserve":
            assert package in sys.stdlib_module_names, f"{path} imports {name}"
        if package == "trimserve" and rest and (target := part(*rest)) in MAY_IMPORT:
            assert target == own or target in MAY_IMPORT[own], f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path != SEAM], ids=lambda path: path.stem)
def test_only_one_file_borrows_transformers_model_code(path: Path) -> None:
    for name in map(".".join, imports(path)):
        assert not f"{name}.".startswith("transformers.") or name.startswith(NO_MODEL_CODE), f"{path} imports {name}"
    reached = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not reached & MODULES_OF_MLLAMA, path


def test_the_compiled_modules_are_loaded_only_in_ops() -> None:
    loads = re.compile(r"load_library\(|\b_host\b")
    loaders = {home(path) for path in MODULES if loads.search(path.read_text())}
    assert loaders <= {"ops"}


def test_host_and_device_kernels_contain_no_torch() -> None:
    kernels = [*(ROOT.parent / "csrc/cpu").glob("*"), *(ROOT.parent / "csrc/cuda").glob("*.cu")]
    assert kernels
    for path in kernels:
        assert "torch/" not in path.read_text(), path
