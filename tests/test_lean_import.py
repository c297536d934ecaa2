"""Each part can be imported, and the engine works, where the libraries and parts that it may not know are missing.

tests/test_layering.py reads what a file imports itself; here, what it imports through others shows, too.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "trimserve"

COMPUTE = ("torch", "transformers", "tokenizers", "safetensors")
WIRE = ("grpc", "grpc_tools", "grpc_health", "grpc_reflection", "grpc_status", "google.protobuf", "google.rpc")
ARROW = ("ops", "trimming", "model", "executor", "engine")
ENGINE = tuple(f"trimserve.{part}" for part in ARROW)

ANSWER_A_REQUEST = """
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.executor.local import LocalExecutor
from trimserve.api.chunks import Finished, Started
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.model.loading import embedded_model_folder, load_model
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest

image = ImageFile((embedded_model_folder().parent / "samples/scene.png").read_bytes())
prompt = ChatPrompt((Message("user", (image, Text("What colour is the star?"))),))
request = GenerationRequest("lean", prompt, SamplingParams(max_new_tokens=3, ignore_eos=True), TrimRequest(k_ratio=0.1))
model = load_model(ModelConfig(), EngineConfig())
engine = Engine(model, LocalExecutor(model), EngineConfig(max_batch=1))
chunks = []
engine.add(engine.prepare(request, chunks.append, 0.0))
while engine.has_work:
    engine.step()
started, finished = chunks[0], chunks[-1]
assert isinstance(started, Started) and started.images[0].kept_features < started.images[0].valid_features
assert isinstance(finished, Finished) and finished.num_generated_tokens == 3
"""


def modules(*parts: str) -> list[str]:
    """Dotted names of every module of some parts; a part is a folder or a file."""
    paths = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    paths += [path for part in parts if (path := ROOT / f"{part}.py").exists()]
    return [".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for path in paths]


def run_without(missing: Iterable[str], program: str) -> None:
    """Run a program where some modules cannot be imported; it must succeed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({tuple(missing)!r}))\n"  # None: as if not installed
    done = subprocess.run([sys.executable, "-c", block + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def imported(names: list[str]) -> str:
    """A program that imports modules."""
    assert names
    return "".join(f"import {name}\n" for name in names)


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (["api"], [*COMPUTE, *WIRE, *ENGINE, "numpy", "pydantic", "prometheus_client", "trimserve.v1"]),
        (["imaging"], [*COMPUTE, *WIRE, *ENGINE, "pydantic", "trimserve.server", "trimserve.v1"]),
        (["server"], [*COMPUTE, *ENGINE, "PIL"]),
        (
            ["client", "connection", "process", "knobs", "explain", "batch", "playground", "commands"],
            [*COMPUTE, *ENGINE, "gradio", "trimserve.server"],
        ),
    ],
    ids=["api", "imaging", "server", "tools"],
)
def test_a_part_is_imported_without_what_it_may_not_know(parts: list[str], missing: list[str]) -> None:
    run_without(missing, imported(modules(*parts)))


def test_the_engine_and_all_below_it_answer_a_request_without_grpc_protobuf_and_prometheus() -> None:
    missing = [*WIRE, "prometheus_client", "trimserve.server", "trimserve.v1"]
    run_without(missing, imported(modules(*ARROW)) + ANSWER_A_REQUEST)


def test_a_module_that_is_missing_cannot_be_imported() -> None:
    with pytest.raises(AssertionError, match="ModuleNotFoundError"):
        run_without(["trimserve.api"], "import trimserve.server.backend")
