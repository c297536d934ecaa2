"""Every expression of dashboard, rules and alerts, asked of a real Prometheus that scrapes a real server under load.

Prometheus and promtool are Debian's `prometheus` package, installed (as root) where they are missing. Takes a minute.

Usage: python -m scripts.verify.monitoring
"""

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import yaml
from pydantic import ByteSize

from trimserve.client import Client, make_request
from trimserve.config import Config, EngineConfig, ServerConfig
from trimserve.model.loading import embedded_model_folder
from trimserve.process import read_page
from trimserve.serve import make_runner, make_server
from trimserve.server.running import InProcessServer
from trimserve.v1 import generation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "docker/prometheus"
SAMPLES = sorted((embedded_model_folder().parent / "samples").glob("*.png"))

VARIABLES = {"$instance": ".*", "$model": ".*", "$__rate_interval": "30s"}
ABSENT = re.compile("trimserve_(tls_certificate|credentials_loaded)")
"""What only a server with TLS or tokens has."""

PATIENCE_SECONDS = 60.0
"""For an expression to have data."""


def main() -> None:
    """Run promtool, then the server, its load and Prometheus; ask everything."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        install = "apt-get install --quiet --quiet --yes --no-install-recommends prometheus"
        subprocess.run(f"apt-get update --quiet --quiet && {install}", shell=True, check=True)
    for command in ("check config prometheus.yml", "check rules recording.yml alerts.yml", "test rules tests.yml"):
        subprocess.run(["promtool", *command.split()], cwd=RULES, check=True, stdout=subprocess.DEVNULL)
    # A small queue, so that some requests are refused; a small cache, so that images make room for others.
    engine = EngineConfig(max_batch=4, max_queue=4, image_cache_bytes=ByteSize(200_000), num_threads=1)
    config = Config(engine=engine, server=ServerConfig(port=0, metrics_port=0))
    with InProcessServer(make_server(make_runner(config), config)) as server, load(server.address):
        assert server.metrics_address is not None
        with prometheus(server.metrics_address) as url:
            asked = ask_everything(url)
    print(f"monitoring: {asked} expressions of dashboard, rules and alerts have data; promtool's tests pass")


@contextmanager
def load(address: str) -> Iterator[None]:
    """Requests of every kind, some of them refused, cancelled, late or wrong, until the block ends."""
    is_over = threading.Event()
    kinds: list[Callable[[Client], None]] = [_finish, _finish, _stream, _stream, _stream, _go_away, _be_wrong, _be_late]

    def work(act: Callable[[Client], None]) -> None:
        with Client(address) as client:
            while not is_over.is_set():
                with suppress(grpc.RpcError):
                    act(client)
                is_over.wait(0.05)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in kinds * 2]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _request(trim: pb.TrimOptions | None = None, num_tokens: int = 24) -> pb.GenerateRequest:
    image = SAMPLES[time.monotonic_ns() % len(SAMPLES)]
    sampling = pb.SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
    return make_request("What do you see?", [image], sampling=sampling, trim=trim)


def _finish(client: Client) -> None:
    client.generate(_request(pb.TrimOptions(mode=pb.TRIM_MODE_OFF)))
    client.generate("Hello")


def _stream(client: Client) -> None:
    for _ in client.stream(_request()):
        pass
    client.model()
    client.status()


def _go_away(client: Client) -> None:
    for _ in client.stream(_request(num_tokens=200)):
        break


def _be_wrong(client: Client) -> None:
    client.generate(pb.GenerateRequest())


def _be_late(client: Client) -> None:
    client.generate(_request(num_tokens=200), timeout_seconds=0.05)


@contextmanager
def prometheus(target: str) -> Iterator[str]:
    """A Prometheus with our rules that scrapes `target` every second; yields its URL."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        config = yaml.safe_load((RULES / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
        [scrape] = config["scrape_configs"]
        config["scrape_configs"] = [{"job_name": scrape["job_name"], "static_configs": [{"targets": [target]}]}]
        path = Path(folder) / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        free.close()
        options = [
            f"--config.file={path}",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        log = (Path(folder) / "log").open("w+")
        with log, subprocess.Popen(["prometheus", *options], stdout=log, stderr=log) as process:
            try:
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()


def ask_everything(url: str) -> int:
    """Wait until each expression has data; returns how many there were.

    Raises:
        SystemExit: naming those that have none.
    """
    wanted = [each for each in (*dashboard_queries(), *rule_queries()) if not ABSENT.search(each[1])]
    end = time.monotonic() + PATIENCE_SECONDS
    missing = dict(wanted)
    while missing and time.monotonic() < end:
        time.sleep(2)  # Prometheus scrapes once a second and tells nobody
        missing = {name: query for name, query in missing.items() if not _has_data(url, query)}
    for variable in ("model_id", "instance"):
        if not _get(url, f"label/{variable}/values"):
            missing[variable] = "label_values"
    if missing:
        raise SystemExit("no data:\n" + "\n".join(f"{name}: {query}" for name, query in missing.items()))
    return len(wanted)


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Panel and legend -> expression, variables filled in."""
    for panel in json.loads((ROOT / "docker/grafana/trimserve.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            yield f"{panel['title']} ({panel['id']}), {target['legendFormat']}", query


def rule_queries() -> Iterator[tuple[str, str]]:
    """Recording rules by name; of each alert, every side of its set operators without the threshold."""
    for file in ("recording.yml", "alerts.yml"):
        for group in yaml.safe_load((RULES / file).read_text())["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    yield rule["record"], rule["record"]
                    continue
                sides = re.split(r"\b(?:and|unless)\b\s*(?:on \([^)]*\))?", rule["expr"])
                for number, side in enumerate(sides):
                    yield f"{rule['alert']} ({number})", re.sub(r"(==|>)", r"\1 bool", side)


def _has_data(url: str, query: str) -> bool:
    with suppress(urllib.error.URLError):  # it is starting
        result = _get(url, "query?" + urllib.parse.urlencode({"query": query}))["result"]
        return any(math.isfinite(float(series["value"][1])) for series in result)
    return False


def _get(url: str, path: str) -> Any:
    try:
        return json.loads(read_page(f"{url}/api/v1/{path}", timeout_seconds=10))["data"]
    except urllib.error.HTTPError as error:
        if error.code == 400:  # what we asked is wrong, not what is there
            sys.exit(f"{path}: {error.read().decode()}")
        raise


if __name__ == "__main__":
    main()
