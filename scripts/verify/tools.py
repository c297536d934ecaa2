"""Tools that speak OpenAI's HTTP, unmodified, each from an environment of its own, against a live server.

lmms-eval asks held-out questions and must come to the score of `trimserve eval`. guidellm measures: every request must
be answered, with as many tokens as it asked for. Both are told that there is no network.

    python -m scripts.verify.tools --lmms-eval PYTHON --guidellm PYTHON [--questions 200] [--out FILE]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.machine import about
from benchmarks.report import RESULTS, write_json
from training.heldout import write_held_out
from trimserve.client import Client
from trimserve.model.loading import embedded_model_folder
from trimserve.process import ServerProcess, server_process

__all__ = ["main"]

_TASK: Final = Path(__file__).parent / "lmms_eval"
_OUTPUT_TOKENS: Final = 16
"""Of every request of guidellm."""
_NUM_STREAMS: Final = 4


def _run(command: list[str], folder: Path) -> None:
    """Run a tool in a folder where it may leave what it likes; it finds neither hub nor proxy."""
    told = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "no_proxy": "*"}
    subprocess.run(command, cwd=folder, env={**os.environ, **told}, check=True)


def _version(python: str, tool: str) -> str:
    program = f"from importlib.metadata import version; print(version({tool!r}))"
    return subprocess.run([python, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def ask_lmms_eval(python: str, server: ServerProcess, model: str, folder: Path) -> float:
    """The share of questions that lmms-eval counts as answered rightly."""
    told = {"model": model, "base_url": f"http://{server.http_address}/v1", "api_key": "none", "timeout": "600"}
    command = [python, "-m", "lmms_eval", "eval", "--model", "openai", "--tasks", "trimserve_heldout"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in told.items())]
    command += ["--include_path", str(_TASK), "--output_path", str(folder / "lmms_eval"), "--log_samples"]
    _run(command, folder)
    [file] = (folder / "lmms_eval").rglob("*_results.json")
    score: float = json.loads(file.read_text())["results"]["trimserve_heldout"]["exact_match,none"]
    return score


def ask_trimserve_eval(server: ServerProcess, folder: Path) -> float:
    """The same share by `trimserve eval`, with what requests that name nothing get."""
    with Client(server.address) as client:
        model = client.model()
    budgets = ["--k-ratios", str(model.default_k_ratio), "--merge-ratios", str(model.default_merge_ratio)]
    command = [sys.executable, "-m", "trimserve", "eval", "--data", "questions.jsonl", "--out", "eval"]
    _run([*command, "--address", server.address, "--policies", model.policies[0], *budgets], folder)
    rows = json.loads((folder / "eval/report.json").read_text())["rows"]
    [score] = (row["accuracy"]["value"] for row in rows if (row["policy"], row["kind"]) == (model.policies[0], "all"))
    return float(score)


def ask_guidellm(python: str, server: ServerProcess, model: str, folder: Path) -> Mapping[str, int]:
    """How many of guidellm's requests succeeded and failed, and the fewest and most tokens of an answer."""
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    asked = [
        {"prompt": each["question"], "image": str(folder / each["image"]), "output_tokens_count": _OUTPUT_TOKENS}
        for each in questions
    ]
    (folder / "asked.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in asked))
    command = [str(Path(python).with_name("guidellm")), "run", "--disable-progress"]
    command += ["--backend", f"kind=openai_http,target=http://{server.http_address},model={model}"]
    command += ["--profile", f"kind=concurrent,streams={_NUM_STREAMS}"]
    command += ["--constraint", f"kind=max_requests,count={len(asked)}", "--data", "kind=json_file,path=asked.jsonl"]
    command += ["--tokenizer", f"kind=hf_auto,model={embedded_model_folder()}"]
    _run([*command, "--output", "kind=json,path=guidellm.json"], folder)
    [benchmark] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    counts = [each["output_metrics"]["text_tokens"] for each in requests["successful"]]
    return {
        "successful": len(counts),
        "errored": len(requests["errored"]),
        "incomplete": len(requests["incomplete"]),
        "least_tokens": min(counts, default=0),
        "most_tokens": max(counts, default=0),
    }


def verify(lmms_eval: str, guidellm: str, num_questions: int, folder: Path) -> dict[str, Any]:
    """All of it, as plain data.

    Raises:
        AssertionError: something is not as it should be.
    """
    write_held_out(folder, num_questions)
    with server_process("--http-port", "0") as server:
        with Client(server.address) as client:
            model = client.model().model_id
        scores = {
            "lmms-eval": ask_lmms_eval(lmms_eval, server, model, folder),
            "trimserve eval": ask_trimserve_eval(server, folder),
        }
        measured = ask_guidellm(guidellm, server, model, folder)
    assert len({round(score, 6) for score in scores.values()}) == 1, scores
    whole = {"successful": num_questions, "errored": 0, "incomplete": 0}
    assert measured == {**whole, "least_tokens": _OUTPUT_TOKENS, "most_tokens": _OUTPUT_TOKENS}, measured
    tools = {"lmms-eval": _version(lmms_eval, "lmms-eval"), "guidellm": _version(guidellm, "guidellm")}
    return {"tools": tools, "questions": num_questions, "exact_match": scores, "guidellm": measured}


def main() -> None:
    """Write down what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lmms-eval", required=True, metavar="PYTHON", help="of its environment")
    parser.add_argument("--guidellm", required=True, metavar="PYTHON", help="of its environment")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "tools.json")
    arguments = parser.parse_args()
    # As they are: what they link to would know no packages.
    lmms_eval, guidellm = (str(Path(each).absolute()) for each in (arguments.lmms_eval, arguments.guidellm))
    with TemporaryDirectory() as folder:
        found = verify(lmms_eval, guidellm, arguments.questions, Path(folder))
    write_json({"benchmark": "tools", **about(1), **found}, arguments.out)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
