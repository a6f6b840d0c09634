"""The metrics of the HTTP API, for GET /metrics and, in a replica, for Ray."""

from prometheus_client import CollectorRegistry

from serve_app.observability.metrics import LocalMeter, Meter, Meters


class ApiMetrics(Meters):
    """The metrics of one app."""

    def __init__(self, *others: Meter) -> None:
        """others: meters that count as well."""
        self._local = LocalMeter()
        super().__init__((self._local, *others))

    @property
    def registry(self) -> CollectorRegistry:
        return self._local.registry

    def text(self) -> bytes:
        """All metrics of this process, in Prometheus' text format."""
        return self._local.text()
