"""Dashboard, rules and alerts use the metrics that there are; scripts/verify/monitoring.py asks a real Prometheus."""

import json
import re
from collections.abc import Iterator

import yaml

from tests.test_repository import ROOT
from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import Metrics
from trimserve.trimming.policies.table import POLICIES

DASHBOARD = json.loads((ROOT / "docker/grafana/trimserve.json").read_text())
RULES = [
    rule
    for file in ("recording.yml", "alerts.yml")
    for group in yaml.safe_load((ROOT / "docker/prometheus" / file).read_text())["groups"]
    for rule in group["rules"]
]
METRIC = re.compile(r"(?<![\w:])(?:grpc_server|trimserve)_\w+")


def shown() -> Iterator[str]:
    """The expressions of the dashboard."""
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


def named(expressions: Iterator[str]) -> set[str]:
    """The metrics that they ask for, without the suffixes of a histogram."""
    names = {name for expression in expressions for name in METRIC.findall(expression)}
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    assert named(shown()) == {metric.name for metric in Metrics(POLICIES, RPCS).declared}


def test_rules_and_alerts_use_only_metrics_that_there_are() -> None:
    assert named(rule["expr"] for rule in RULES) <= {metric.name for metric in Metrics(POLICIES, RPCS).declared}


def test_alerts_use_only_rules_that_there_are() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = {name for rule in RULES for name in re.findall(r"instance:[\w:]+", rule["expr"])}
    assert used <= recorded


def test_every_expression_of_the_dashboard_follows_its_variables() -> None:
    for expression in shown():
        assert len(re.findall(r'instance=~"\$instance"', expression)) == len(re.findall(r"\{", expression)), expression


def test_all_instances_are_those_of_the_chosen_models() -> None:
    model, instance = (each for each in DASHBOARD["templating"]["list"] if each["type"] == "query")
    assert model["allValue"] == ".*"
    assert instance["query"] == 'label_values(trimserve_model_info{model_id=~"$model"}, instance)'
    assert "allValue" not in instance  # which would be all instances, whatever the model


RATE = re.compile(r"sum( by \([^)]*\))? \(rate\([^)]*\)\)")


def test_rates_are_shown_per_second() -> None:
    for panel in DASHBOARD["panels"]:
        is_rate = any(RATE.fullmatch(target["expr"]) for target in panel.get("targets", []))
        if is_rate and panel["type"] != "heatmap":
            assert panel["fieldConfig"]["defaults"]["unit"] in {"reqps", "cps", "binBps"}, panel["title"]


def test_every_rule_and_every_alert_has_a_unit_test() -> None:
    tests = yaml.safe_load((ROOT / "docker/prometheus/tests.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    quiet = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if not case["exp_alerts"]}
    computed = {case["expr"] for test in tests for case in test.get("promql_expr_test", [])}
    assert fired == quiet == {rule["alert"] for rule in RULES if "alert" in rule}
    assert {rule["record"] for rule in RULES if "record" in rule} <= computed
