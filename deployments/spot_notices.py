"""Whether the cloud is about to take this node back, as its metadata service says some time before.

Amazon's says it two minutes before, Google's and Azure's thirty seconds. Sources: "Spot Instance interruption
notices" of Amazon EC2, "Preemption process" of Compute Engine, "Scheduled Events" of Azure.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

POLL_S = 5.0  # what Amazon recommends
ANSWER_TIMEOUT_S = 2.0
SHORT_NOTICE_S = 30.0  # where the service names no time
AZURE_ENDS = frozenset({"Preempt", "Terminate"})

DrainNode = Callable[[str, float], object]  # takes the reason and the deadline (Unix seconds)

logger = logging.getLogger(__name__)

# the service is on the node's own link: a proxy of the environment must not be asked for it
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, slots=True)
class Notice:
    """The node ends at this time."""

    reason: str  # for logs, such as "Amazon EC2: terminate"
    deadline: float  # Unix seconds


class NoSuchService(Exception):
    """This metadata service is not that of the cloud that was tried."""


def start_watching(metadata_url: str, drain_node: DrainNode, *, poll_s: float = POLL_S) -> None:
    """Have a thread watch for a notice, for as long as this process lives. See `watch`."""
    options = {"metadata_url": metadata_url, "drain_node": drain_node, "poll_s": poll_s}
    threading.Thread(target=watch, kwargs=options, name="spot-notices", daemon=True).start()


def watch(metadata_url: str, drain_node: DrainNode, *, poll_s: float = POLL_S) -> None:
    """Ask until there is a notice, then drain this node and return.

    metadata_url: of the service, http://169.254.169.254 on all three clouds.
    """
    read: Callable[[str], Notice | None] | None = None
    silent = False
    while True:
        read = read or find_service(metadata_url)
        if read is None and not silent:
            silent = True
            logger.warning("no metadata service answers there", extra={"metadata_url": metadata_url})
        try:
            notice = None if read is None else read(metadata_url)
            if notice is not None:
                about = {"reason": notice.reason, "in_s": round(notice.deadline - time.time(), 1)}
                logger.warning("the cloud takes this node back; it is drained", extra=about)
                drain_node(notice.reason, notice.deadline)
                return
        except Exception:  # of the service, or of Ray: asked again
            logger.warning("a notice could not be read, or this node not drained", exc_info=True)
        time.sleep(poll_s)


def find_service(metadata_url: str) -> Callable[[str], Notice | None] | None:
    """The function that reads the notice of the cloud that answers there; None where none does."""
    for read in (read_amazon, read_google, read_azure):
        try:
            read(metadata_url)
        except (OSError, ValueError, NoSuchService):
            continue
        return read
    return None


def read_amazon(url: str) -> Notice | None:
    """The notice of Amazon EC2, None if there is none. Raises NoSuchService, OSError, ValueError."""
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask(f"{url}/latest/api/token", lifetime, method="PUT")
    if token is None:
        raise NoSuchService
    text = _ask(f"{url}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if text is None:  # 404 until there is a notice
        return None
    action = json.loads(text)
    deadline = datetime.fromisoformat(action["time"]).timestamp()
    return Notice(f"Amazon EC2: {action['action']}", deadline)


def read_google(url: str) -> Notice | None:
    """The notice of Compute Engine, None if there is none. Raises NoSuchService, OSError."""
    text = _ask(f"{url}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if text not in ("TRUE", "FALSE"):
        raise NoSuchService
    return Notice("Compute Engine: preempted", time.time() + SHORT_NOTICE_S) if text == "TRUE" else None


def read_azure(url: str) -> Notice | None:
    """The notice of Azure, None if there is none. Raises NoSuchService, OSError, ValueError."""
    text = _ask(f"{url}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    found = json.loads(text or "null")
    if not isinstance(found, dict) or "Events" not in found:
        raise NoSuchService
    ends = [event for event in found["Events"] if event.get("EventType") in AZURE_ENDS]
    deadlines = [_azure_time(event.get("NotBefore", "")) for event in ends]
    return Notice(f"Azure: {ends[0]['EventType']}", min(deadlines)) if ends else None


def _azure_time(text: str) -> float:
    """Unix seconds of "Mon, 19 Sep 2016 18:29:47 GMT"; empty: the event has begun."""
    return parsedate_to_datetime(text).astimezone(UTC).timestamp() if text else time.time()


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """The text there, None for an answer that is an error. Raises OSError without an answer."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with _opener.open(request, timeout=ANSWER_TIMEOUT_S) as answer:
            return str(answer.read(65_536).decode().strip())
    except urllib.error.HTTPError:
        return None
