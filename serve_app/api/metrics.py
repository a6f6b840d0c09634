"""What this process counts about its HTTP face, for GET /metrics and, in a replica, for Ray."""

from prometheus_client import CollectorRegistry

from serve_app.observability.metrics import LocalMeter, Meter, Meters


class ApiMetrics(Meters):
    """Of one app."""

    def __init__(self, *others: Meter) -> None:
        """others: who is told as well."""
        self._here = LocalMeter()
        super().__init__((self._here, *others))

    @property
    def registry(self) -> CollectorRegistry:
        return self._here.registry

    def text(self) -> bytes:
        """All that was counted here, in Prometheus' text format."""
        return self._here.text()
