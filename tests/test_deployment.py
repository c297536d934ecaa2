"""Manifests, compose file, unit and Envoy fit the server and each other; `make verify-deployment` validates them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from tests.test_container import DOCKERFILE, VARIABLES
from tests.test_repository import ROOT
from trimserve.client import IMAGE_HASH, MAX_MESSAGE_BYTES, SERVICE_CONFIG
from trimserve.config import Config, ServerConfig
from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import Metrics
from trimserve.trimming.policies.table import POLICIES

KUBERNETES = ROOT / "docker/kubernetes"


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / "docker" / path).read_text())


BASE = {path.stem: read(f"kubernetes/base/{path.name}") for path in sorted((KUBERNETES / "base").glob("*.yaml"))}
DEPLOYMENT, SERVICE, MONITOR = BASE["deployment"], BASE["service"], BASE["monitor"]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
POD = DEPLOYMENT["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
DEFAULTS = ServerConfig()


def sections(variables: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the variables that are trimserve's set: values by knob, by section of the config."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in variables.items():
        if name.startswith("TRIMSERVE"):
            _, section, knob = name.lower().split("__")
            found.setdefault(section, {})[knob] = value
    return found


def test_selectors_select() -> None:
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    assert MONITOR["spec"]["selector"]["matchLabels"] == SERVICE["metadata"]["labels"]
    assert BASE["disruption"]["spec"]["selector"]["matchLabels"] == labels
    assert BASE["network"]["spec"]["podSelector"]["matchLabels"] == labels
    assert read("kubernetes/inference-pool/values.yaml")["inferencePool"]["modelServers"]["matchLabels"] == labels
    for scaler in read("kubernetes/hpa/autoscaler.yaml"), read("kubernetes/keda/scaledobject.yaml"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == DEPLOYMENT["metadata"]["name"]


def test_every_resource_of_the_base_is_applied() -> None:
    assert {Path(name).stem for name in BASE["kustomization"]["resources"]} == BASE.keys() - {"kustomization"}


def test_pods_share_a_volume_of_models() -> None:
    claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in POD["spec"]["volumes"]]
    assert BASE["models"]["metadata"]["name"] in claims


def test_what_scales_replicas_asks_for_metrics_of_one_series_each() -> None:
    texts = [
        path.read_text() for name in ("hpa", "keda", "inference-pool") for path in (KUBERNETES / name).glob("*.yaml")
    ]
    asked = [metric for text in texts for metric in re.findall(r"(?:name: |metric: |sum\()(trimserve_\w+)", text)]
    assert len(asked) == 7
    page = generate_latest(Metrics(POLICIES, RPCS).registry).decode()
    for metric in asked:
        assert len(re.findall(rf"^{metric}(?:\{{| )", page, re.MULTILINE)) == 1, metric


def test_envoy_routes_by_our_header_to_our_service_and_holds_the_largest_request() -> None:
    resources = read("envoy.yaml")["static_resources"]
    [chain] = resources["listeners"][0]["filter_chains"]
    [host] = chain["filters"][0]["typed_config"]["route_config"]["virtual_hosts"]
    assert host["request_body_buffer_limit"] == MAX_MESSAGE_BYTES == DEFAULTS.max_message_bytes
    *_, last = host["routes"]
    assert last["route"]["hash_policy"] == [{"header": {"header_name": IMAGE_HASH}}]
    [cluster] = resources["clusters"]
    [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    address = endpoint["endpoint"]["address"]["socket_address"]
    assert address == {"address": SERVICE["metadata"]["name"], "port_value": DEFAULTS.port}
    health = json.loads(SERVICE_CONFIG.read_text())["healthCheckConfig"]["serviceName"]
    assert cluster["health_checks"][0]["grpc_health_check"]["service_name"] == health


def test_ports_are_the_servers_and_are_found_by_name() -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"grpc": DEFAULTS.port, "metrics": DEFAULTS.metrics_port}
    assert {port["name"]: port["targetPort"] for port in SERVICE["spec"]["ports"]} == {name: name for name in ports}
    assert {endpoint["port"] for endpoint in MONITOR["spec"]["endpoints"]} == {"metrics"}
    assert CONTAINER["startupProbe"]["grpc"]["port"] == CONTAINER["readinessProbe"]["grpc"]["port"] == ports["grpc"]
    assert CONTAINER["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    published = [port.split(":") for port in COMPOSE["trimserve"]["ports"]]
    assert {int(inside) for _, _, inside in published} == set(ports.values())
    assert {host for host, _, _ in published} == {"127.0.0.1"}


def test_a_drain_may_end_before_the_process_is_killed() -> None:
    assert POD["spec"]["terminationGracePeriodSeconds"] > DEFAULTS.drain_grace_seconds
    unit = (ROOT / "docker/trimserve.service").read_text()
    assert int(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > DEFAULTS.drain_grace_seconds
    assert int(COMPOSE["trimserve"]["stop_grace_period"].removesuffix("s")) > DEFAULTS.drain_grace_seconds


def test_the_pod_is_the_images_user() -> None:
    user = POD["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}\n" in DOCKERFILE


POD_VARIABLES = {entry["name"]: entry.get("value", "2") for entry in CONTAINER["env"]}
"""What Kubernetes itself fills in is a number."""
SET_BY_COMPOSE = dict(pair.split("=") for pair in COMPOSE["trimserve"]["environment"] if "=" in pair)
TAKEN_OVER_BY_COMPOSE = {name: "x" for name in COMPOSE["trimserve"]["environment"] if "=" not in name}


@pytest.mark.parametrize("variables", [POD_VARIABLES, SET_BY_COMPOSE, SET_BY_COMPOSE | TAKEN_OVER_BY_COMPOSE])
def test_the_image_starts_with_these_variables(variables: dict[str, Any]) -> None:
    knobs = sections(variables)
    config = Config.model_validate({**knobs, "server": VARIABLES | knobs["server"]})
    assert config.server.allow_plaintext


def test_prometheus_scrapes_the_server_of_the_compose_file() -> None:
    [job] = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["dns_sd_configs"] == [{"names": ["trimserve"], "type": "A", "port": DEFAULTS.metrics_port}]


def test_what_the_compose_file_mounts_is_there() -> None:
    sources = {volume.split(":")[0] for service in COMPOSE.values() for volume in service.get("volumes", [])}
    paths = {source for source in sources if source.startswith(".")}
    assert len(paths) == 3
    assert all((ROOT / "docker" / path).exists() for path in paths)
    assert sources - paths == yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["volumes"].keys()
