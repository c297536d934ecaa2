"""Names, labels and first values of the metrics, before anything happened."""

from prometheus_client import CollectorRegistry, Counter

from trimserve.server.grpc.services import RPCS
from trimserve.server.metrics import RPC_CODES, Metrics
from trimserve.trimming.policies.table import POLICIES

LATER = {
    "trimserve_model_info",
    "trimserve_credentials_loaded_timestamp_seconds",
    "trimserve_tls_certificate_expiry_timestamp_seconds",
    "trimserve_http_requests_total",
}
"""Known once a model, clients or certificates are loaded, or a request came over HTTP."""


def test_every_known_label_value_starts_at_zero() -> None:
    metrics = Metrics(POLICIES, RPCS)
    samples = {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in metrics.registry.collect()
        for sample in family.samples
    }
    for declared in metrics.declared:
        suffix = "_count" if declared.kind == "histogram" else ""
        series = [labels for name, labels in samples if name == declared.name + suffix]
        known = 1
        for values in declared.labels.values():
            known *= max(1, len(values))
        if declared.name.startswith("grpc_server_"):
            known = len(RPCS) * (len(RPC_CODES) if "grpc_code" in declared.labels else 1)
        if declared.name in LATER:
            known = 0
        assert len(series) == known, declared.name


def test_series_that_no_dashboard_reads_are_left_out_here_and_nowhere_else() -> None:
    def names(registry: CollectorRegistry) -> list[str]:
        return [sample.name for family in registry.collect() for sample in family.samples]

    assert not [name for name in names(Metrics(POLICIES, RPCS).registry) if name.endswith("_created")]
    other = CollectorRegistry()
    Counter("other", "Of a program that embeds the server.", registry=other)
    assert names(other) == ["other_total", "other_created"]


def test_names_end_in_their_unit() -> None:
    for declared in Metrics(POLICIES, RPCS).declared:
        assert declared.name.startswith(("trimserve_", "grpc_server_"))
        assert declared.name.endswith("_total") == (declared.kind == "counter"), declared.name
        assert list(declared.buckets) == sorted(set(declared.buckets))
