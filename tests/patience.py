"""How long a test waits for a condition before it fails: more on a slow machine, which is measured once.

    await asyncio.wait_for(event.wait(), patience())      what takes up to a second on a quiet machine
    subprocess.run(command, timeout=patience(10))          what takes up to ten

A wait ends when its condition holds, so patience costs time only where a test fails anyway.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

MARGIN = 30  # of a wait, over the time that it takes on a quiet machine
REFERENCE_S = 0.035  # what `_work` takes on a quiet core of a server of 2024
VARIABLE = "TEST_SLOWNESS"  # measured by the first process of a session, read by those that it starts


def patience(quiet_s: float = 1.0) -> float:
    """Seconds to wait for what takes at most `quiet_s` seconds on a quiet machine."""
    return quiet_s * MARGIN * slowness()


def slowness() -> float:
    """How many times slower this machine is than the quiet one of REFERENCE_S, at least 1."""
    if VARIABLE not in os.environ:
        slowest_s = max(_work() for _ in range(3))
        os.environ[VARIABLE] = f"{max(1.0, slowest_s / REFERENCE_S):.2f}"
    return float(os.environ[VARIABLE])


def _work() -> float:
    """Seconds that a little arithmetic and the start of a process take."""
    began = time.perf_counter()
    for _ in range(20):
        hashlib.sha256(b"0" * 2**18).hexdigest()
    sum(number * number for number in range(200_000))
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    return time.perf_counter() - began
