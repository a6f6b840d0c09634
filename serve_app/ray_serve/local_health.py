"""Whether what `weft serve` has started is still there: Ray's node, Serve's controller and its HTTP proxy."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable

from serve_app.ray_serve.private_api import ended_node_processes, query_serve_details

PROBE_EVERY_S = 5.0
PROBE_LIMIT_S = 10.0
GONE_POLLS = 360  # without one answer: three minutes. Ray restarts the controller in seconds, a proxy in 32 s
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


class Pulse:
    """Counts the polls since `probe` last succeeded, which is called again and again in a thread of its own.

    Polls and not seconds: a machine that slept has missed none. A probe that never succeeded misses none.
    """

    def __init__(self, probe: Callable[[], bool], every_s: float = PROBE_EVERY_S) -> None:
        self._probe = probe
        self._every_s = every_s
        self._missed = 0
        self._seen = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current probe."""
        self._ended.set()

    def poll(self) -> int:
        """How many polls, this one included, have come since the last success."""
        if self._seen:
            self._missed += 1
        return self._missed

    def _beat(self) -> None:
        while not self._ended.is_set():
            if self._probe():
                self._seen = True
                self._missed = 0
            self._ended.wait(self._every_s)


class LocalHealth:
    """Finds what has gone for good. host, port: where Serve answers HTTP."""

    def __init__(self, host: str, port: int) -> None:
        self._pulses = {
            "Serve's HTTP proxy": Pulse(lambda: answers_http(WILDCARDS.get(host, host), port)),
            "Serve's controller": Pulse(controller_answers),
        }

    def watch_service(self) -> None:
        """Watch the controller and the proxy too; call it when the service is ready."""
        for pulse in self._pulses.values():
            pulse.start()

    def fault(self) -> str | None:
        """One sentence on what has gone for good; None while all is there. Does not block."""
        for name, status in ended_node_processes().items():
            how = f"was ended by signal {-status}" if status < 0 else f"has ended with status {status}"
            return (
                f"Ray's {name} {how}, and nothing can be served without it; start again (dmesg shows whether "
                "memory ran out)"
            )
        for name, pulse in self._pulses.items():
            if pulse.poll() > GONE_POLLS:
                return f"{name} has given no answer for minutes and does not come back; start again"
        return None


def answers_http(host: str, port: int) -> bool:
    """Whether a server answers at this address, whatever it answers."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_LIMIT_S)
    try:
        connection.request("GET", "/-/healthz")
        connection.getresponse()
    except http.client.HTTPException:
        return True  # it speaks TLS
    except OSError:
        return False
    finally:
        connection.close()
    return True


def controller_answers() -> bool:
    """Whether Serve's controller answers. Blocks while it is restarted."""
    try:
        return query_serve_details() is not None
    except Exception:  # of Ray: many, and bare ones; this is the outermost call of a thread
        return False
