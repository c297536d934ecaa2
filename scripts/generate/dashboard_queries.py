"""PromQL for the Grafana dashboard: selectors, sums, rates and quantiles of the instances that it shows."""

__all__ = ["mean", "quantile", "quantiles", "rate", "series", "total"]

CHOSEN = 'instance=~"$instance"'
"""The instances that the dashboard's variable selects; every expression has it."""


def series(metric: str, labels: str = "") -> str:
    """A selector of the chosen instances."""
    return f"{metric}{{{CHOSEN}{',' if labels else ''}{labels}}}"


def total(metric: str, labels: str = "", by: str = "") -> str:
    """A gauge, summed over instances."""
    return f"sum{_by(by)} ({series(metric, labels)})"


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """A counter's increase per second, summed over instances."""
    return f"sum{_by(by)} (rate({series(metric, labels)}[$__rate_interval]))"


def quantile(share: float, metric: str, labels: str = "", by: str = "") -> str:
    """A quantile of a histogram over all chosen instances."""
    return f"histogram_quantile({share}, {rate(f'{metric}_bucket', labels, 'le' + (', ' + by if by else ''))})"


def mean(metric: str, by: str = "", labels: str = "") -> str:
    """The mean of what a histogram saw."""
    return f"{rate(f'{metric}_sum', labels, by)} / {rate(f'{metric}_count', labels, by)}"


def quantiles(metric: str, by: str = "", labels: str = "") -> dict[str, str]:
    """The usual three, by legend."""
    legend = f" {{{{{by}}}}}" if by else ""
    return {f"p{share * 100:g}{legend}": quantile(share, metric, labels, by) for share in (0.5, 0.95, 0.99)}


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""
