"""A codec that is opened does not put threads before all others of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from deployments.media.thread_scheduling import kept_scheduling

# in a process of its own: without the block, its main thread would be real-time until it ends
ENCODE = """
import os, sys
import numpy as np
from deployments.media import movie
from deployments.media.video_spec import VideoSpec

frames = np.zeros((4, 48, 64, 3), np.uint8)
movie.encode_segment(VideoSpec(64, 48, 4, 24, "webm", codec="av1"), 0, [frames], 1)
sys.exit(os.sched_getscheduler(0) != os.SCHED_OTHER)
"""


def may_be_real_time() -> bool:
    """Whether this process may give a thread of its own a real-time policy."""
    if not hasattr(os, "sched_setscheduler"):
        return False
    allowed = []

    def attempt() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except OSError:
            return
        allowed.append(True)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(allowed)


needs_permission = pytest.mark.skipif(
    not may_be_real_time(), reason="this user may not use real-time policies"
)


@contextmanager
def parked_thread() -> Iterator[int]:
    """The native id of a thread that does nothing."""
    end, started = threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        end.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    assert thread.native_id is not None
    yield thread.native_id
    end.set()
    thread.join()


@needs_permission
def test_the_thread_that_encodes_an_av1_video_is_not_real_time() -> None:
    encoded = subprocess.run([sys.executable, "-c", ENCODE], check=False, capture_output=True, text=True)

    assert encoded.returncode == 0, encoded.stderr


@needs_permission
def test_every_thread_gets_back_the_policy_that_it_had() -> None:
    with parked_thread() as ordinary, parked_thread() as real_time:
        os.sched_setscheduler(real_time, os.SCHED_RR, os.sched_param(2))
        with kept_scheduling():
            for thread in (ordinary, real_time):
                os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(99))
        policies = [os.sched_getscheduler(thread) for thread in (ordinary, real_time)]
        priority = os.sched_getparam(real_time).sched_priority

    assert policies == [os.SCHED_OTHER, os.SCHED_RR]
    assert priority == 2


@needs_permission
def test_threads_of_the_codec_are_as_the_one_that_opened_it() -> None:
    with ExitStack() as stack:
        with kept_scheduling():
            started = stack.enter_context(parked_thread())
            os.sched_setscheduler(started, os.SCHED_FIFO, os.sched_param(99))
        policy = os.sched_getscheduler(started)

    assert policy == os.sched_getscheduler(0) == os.SCHED_OTHER
