"""What a check of `weft doctor` returns, and the two questions that it asks of an address."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum

CONNECT_TIMEOUT_S = 3.0


class Level(StrEnum):
    """How serious a finding is."""

    ok = "ok"
    warn = "warn"
    fail = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    level: Level
    text: str  # what was found; unless ok, also what to do
    check: str = ""  # the subject, for programs that read findings


def about(check: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """The findings with their subject."""
    for finding in findings:
        yield replace(finding, check=check)


def as_json(findings: Sequence[Finding]) -> str:
    """The findings, and how many failed and warned, as JSON."""
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    summary = {"checks": len(findings), "failed": counts[Level.fail], "warned": counts[Level.warn]}
    return json.dumps(summary | {"findings": [asdict(finding) for finding in findings]}, indent=2)


def as_text(findings: Sequence[Finding]) -> str:
    """The findings, one a line, and a last line with how many failed and warned."""
    lines = [f"{finding.level.value:4}  {finding.text}" for finding in findings]
    failed = sum(finding.level is Level.fail for finding in findings)
    warned = sum(finding.level is Level.warn for finding in findings)
    return "\n".join([*lines, f"{len(findings)} checks: {failed} failed, {warned} with a warning"])


def listens(address: str, port: int) -> bool:
    """Whether a server accepts connections at this address."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S):
            return True
    except OSError:
        return False


def status_of(address: str, port: int, path: str) -> int:
    """The HTTP status of a GET without a key. Raises OSError when no server answers."""
    return answer_of(address, port, path)[0]


def answer_of(address: str, port: int, path: str) -> tuple[int, str]:
    """Status and content type of a GET without a key. Raises OSError when no server answers."""
    connection = http.client.HTTPConnection(address, port, timeout=CONNECT_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("content-type", "")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{address}:{port} does not answer with HTTP") from error
    finally:
        connection.close()
