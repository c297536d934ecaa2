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
import torch
from trimserve.config import EngineConfig, ModelConfig
from trimserve.engine.kv_pool import KVPool
from trimserve.engine.runner import Runner
from trimserve.models.loading import load_model
from trimserve.models.prompt import RawPrompt
from trimserve.models.trimming import TrimParams

model = load_model(ModelConfig(), EngineConfig())
prompt = model.prepare(RawPrompt("Hello"))
kv = KVPool(model.info, torch.float32, torch.device("cpu")).allocate(64)
print(model.prefill(prompt, [], TrimParams(), kv).logits.shape)
"""


def test_ops_models_and_engine_work_without_grpc_companions() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size" in done.stdout
