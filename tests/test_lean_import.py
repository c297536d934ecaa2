"""ops, models and engine work where grpc's companions are not installed, such as on a bare GPU machine."""

import subprocess
import sys

BLOCKED = ("grpc_tools", "grpc_health", "grpc_reflection", "grpc_status", "grpc")

PROGRAM = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.engine import Engine
from trimserve.api.chunks import Finished, Started
from trimserve.api.request import GenerationRequest
from trimserve.api.sampling import SamplingParams
from trimserve.model.loading import embedded_model_folder, load_model
from trimserve.api.prompt import ChatPrompt, ImageFile, Message, Text
from trimserve.api.trim import TrimRequest

image = ImageFile((embedded_model_folder().parent / "samples/scene.png").read_bytes())
prompt = ChatPrompt((Message("user", (image, Text("What colour is the star?"))),))
request = GenerationRequest("lean", prompt, SamplingParams(max_new_tokens=3, ignore_eos=True), TrimRequest(k_ratio=0.1))
engine = Engine(load_model(ModelConfig(), EngineConfig()), max_batch=1)
chunks = []
engine.add(engine.prepare(request, chunks.append, 0.0))
while engine.has_work:
    engine.step()
started, finished = chunks[0], chunks[-1]
assert isinstance(started, Started) and started.images[0].kept_features < started.images[0].valid_features
assert isinstance(finished, Finished) and finished.num_generated_tokens == 3
"""


def test_ops_models_and_engine_work_without_grpc_companions() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
