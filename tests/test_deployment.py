"""The Kubernetes manifest and the compose file fit the image and each other; verify_deployment.sh validates them."""

from typing import Any

import yaml

from tests.test_repository import ROOT
from trimserve.config import Config, ServerConfig

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
DEPLOYMENT, SERVICE, MONITOR = yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text())
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
POD = DEPLOYMENT["spec"]["template"]
[CONTAINER] = POD["spec"]["containers"]
DEFAULTS = ServerConfig()


def variables(names: list[str]) -> list[str]:
    """Those that are trimserve's."""
    return [name for name in names if name.startswith("TRIMSERVE")]


def is_knob(variable: str) -> bool:
    """Whether a variable sets a knob."""
    _, section, knob = variable.lower().split("__")
    return knob in type(getattr(Config(), section)).model_fields


def test_selectors_select() -> None:
    labels = POD["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == SERVICE["spec"]["selector"] == labels
    assert MONITOR["spec"]["selector"]["matchLabels"] == SERVICE["metadata"]["labels"]


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
    assert int(COMPOSE["trimserve"]["stop_grace_period"].removesuffix("s")) > DEFAULTS.drain_grace_seconds


def test_the_pod_is_the_images_user() -> None:
    user = POD["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}\n" in DOCKERFILE


def test_variables_are_knobs() -> None:
    names = variables([entry["name"] for entry in CONTAINER["env"]]) + variables(COMPOSE["trimserve"]["environment"])
    assert names
    assert all(is_knob(name) for name in names)


def test_prometheus_scrapes_the_server_of_the_compose_file() -> None:
    [job] = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["dns_sd_configs"] == [{"names": ["trimserve"], "type": "A", "port": DEFAULTS.metrics_port}]


def test_what_the_compose_file_mounts_is_there() -> None:
    def sources(service: dict[str, Any]) -> list[str]:
        return [volume.split(":")[0] for volume in service.get("volumes", [])]

    paths = [source for service in COMPOSE.values() for source in sources(service) if source.startswith(".")]
    assert len(paths) == 3
    assert all((ROOT / "docker" / path).exists() for path in paths)
