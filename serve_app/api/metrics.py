"""What this process counts about its HTTP face; no prompt, key or id ever becomes a label."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)


class ApiMetrics:
    """Declared once per app with a registry of their own, so two apps in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "weft_http_requests",
            "Answers sent, by route template and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "weft_http_request_seconds",
            "Time to the last byte of the answer; event streams last as long as their job.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.submitted = Counter(
            "weft_jobs_submitted",
            "Jobs accepted by this process.",
            ("model", "task"),
            registry=self.registry,
        )
        self.finished = Counter(
            "weft_jobs_finished_observed",
            "Ends of jobs this process told a waiting or listening client of.",
            ("state",),
            registry=self.registry,
        )
        self.submit_seconds = Histogram(
            "weft_job_submit_seconds",
            "From the parsed request to the durable job.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
