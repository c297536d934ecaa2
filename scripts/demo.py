"""`make demo`: serve the embedded model, ask it about sample images, show the byte account, metrics and a picture."""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from trimserve.client import Client, make_request
from trimserve.model.loading import embedded_model_folder
from trimserve.process import ServerProcess, server_process
from trimserve.v1 import generation_pb2 as pb

SAMPLES = embedded_model_folder().parent / "samples"
PICTURE = Path("out/explain.png")
SERVER_LOG = Path("out/demo-server.log")
METRICS = (
    "tokens_total",
    "kept_fraction_sum",
    "kept_fraction_count",
    "bytes_saved_total",
    "first_token_seconds_sum",
)

console = Console()


def main() -> None:
    """Run the demo; the server logs to out/demo-server.log."""
    PICTURE.parent.mkdir(exist_ok=True)
    with server_process(log=SERVER_LOG) as server:
        console.rule(f"trimserve serves its embedded model on {server.address}")
        show(server)


def show(server: ServerProcess) -> None:
    """Ask, and print what there is to see."""
    samples = json.loads((SAMPLES / "samples.json").read_text())
    with Client(server.address) as client:
        first, second = _sample(samples, "colour"), _sample(samples, "description")
        console.print(f"[bold]unary[/]   {escape(first['file'])}: {escape(first['question'])}", soft_wrap=True)
        response = client.generate(make_request(first["question"], [SAMPLES / first["file"]]))
        console.print(
            f"        [green]{escape(response.text)}[/]   (expected: {escape(first['answer'])})", soft_wrap=True
        )
        console.print(f"[bold]stream[/]  {escape(second['file'])}: {escape(second['question'])}", soft_wrap=True)
        console.print("        ", end="")
        events = list(_printed(client, make_request(second["question"], [SAMPLES / second["file"]])))
        console.print(f"   (expected: {escape(second['answer'])})", soft_wrap=True)
    console.print(_account({"unary": (response.usage, response.cross_kv_bytes), "stream": _last(events)}))
    console.rule(f"http://{server.metrics_address}/metrics")
    for series, value in server.metrics().items():
        # What is zero is of policies that nobody asked for.
        if value and series.startswith("trimserve_") and any(name in series for name in METRICS):
            console.print(f"{series} {value}", markup=False, highlight=False, soft_wrap=True)
    console.rule("what the question made the model look at")
    explain = [
        "explain",
        "--address",
        server.address,
        "--image",
        str(SAMPLES / first["file"]),
        "--prompt",
        first["question"],
    ]
    subprocess.run([sys.executable, "-m", "trimserve", *explain, "--out", str(PICTURE)], check=True)


def _sample(samples: list[dict[str, str]], kind: str) -> dict[str, str]:
    return next(sample for sample in samples if sample["kind"] == kind)


def _printed(client: Client, request: pb.GenerateRequest) -> list[pb.GenerateStreamResponse]:
    events = []
    for event in client.stream(request):
        console.print(event.delta.text, end="", style="green", markup=False, highlight=False, soft_wrap=True)
        events.append(event)
    return events


def _last(events: list[pb.GenerateStreamResponse]) -> tuple[pb.Usage, pb.CrossKvBytes]:
    return events[-1].finished.usage, events[-1].finished.cross_kv_bytes


def _account(answers: dict[str, tuple[pb.Usage, pb.CrossKvBytes]]) -> Table:
    table = Table(title="cross-attention KV of each answer, bytes in whole pages")
    for column in ("", "kept_fraction", "untrimmed", "held", "saved by trimming", "saved by padding"):
        table.add_column(column, justify="right")
    for name, (usage, account) in answers.items():
        [image] = usage.images
        rows = image.kept_features + image.merged_features
        fraction = f"{rows}/{image.valid_features} = {rows / image.valid_features:.2f}"
        sizes = (account.untrimmed, account.held, account.saved_by_trimming, account.saved_by_padding)
        table.add_row(name, fraction, *(f"{size:,}" for size in sizes))
    return table


if __name__ == "__main__":
    main()
