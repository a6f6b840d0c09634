"""A pool of child processes that decode untrusted pictures.

A file that crashes Pillow or one of its libraries ends one child process (decoder_child.py), which has a
memory limit, a CPU time limit and no way to open a file; the caller gets BadRequest. Children stay alive
between pictures.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import queue
import select
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path

from PIL import Image

from deployments.protocol.errors import BadRequest
from deployments.sandbox.decoder_child import ANSWER, MAX_PIXELS, REQUEST

PROGRAM = Path(__file__).with_name("decoder_child.py")
PROCESSES = 2  # pictures decoded at once in this process; each may take 400 MiB
TIMEOUT_S = 60.0  # wall-clock, for machines under load; CPU time has its own limit in the child
CHUNK_BYTES = 2**20
ON_WHITE = "on_white"  # key in a decoded picture's `info`: whether transparent pixels became white


class DecodeMode(Enum):
    """What a file is decoded to."""

    picture = b"P"  # RGB
    mask = b"M"  # L: white is 255, black and transparent pixels are 0
    holes = b"H"  # L: transparent pixels are 255, opaque ones 0
    check = b"C"  # no pixels: only whether all of them can be decoded


class DecoderLost(Exception):
    """The child process died, or exceeded its time."""


class DecoderPool:
    """A few child processes, started on first use and replaced when they die. Thread-safe."""

    def __init__(self, processes: int = PROCESSES, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # the last used first
        for _ in range(processes):
            self._idle.put(None)

    def decode(self, data: bytes, mode: DecodeMode, field: str, orientation: int = 1) -> Image.Image:
        """The upright picture in the size of the file; for DecodeMode.check an empty picture.

        data: a file that passed validation.image_header. field: the request's field, for messages.
        orientation: as the header says, 1 to 8; 1: the pixels are stored upright.
        Raises BadRequest for a file that cannot be decoded. Waits for an idle child.
        """
        child = self._idle.get()
        try:
            if child is not None and not child.alive:
                child.kill()  # closes its pipes
                child = None
            if child is None:
                child = _Child()
            error, picture = child.decode(data, mode, orientation, time.monotonic() + self._timeout_s)
        except DecoderLost:
            if child is not None:
                child.kill()
            child = None
            error, picture = "its decoding took too much memory or time", None
        finally:
            self._idle.put(child)
        if picture is None:
            raise BadRequest(
                f"{field} is damaged: its pixels cannot be read ({error}); "
                "save it anew as PNG, JPEG or WebP and send that",
                param=field,
            )
        return picture

    def close(self) -> None:
        """End all idle children."""
        with contextlib.suppress(queue.Empty):
            while True:
                child = self._idle.get_nowait()
                if child is not None:
                    child.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids of the idle children."""
        return [child.pid for child in list(self._idle.queue) if child is not None]


@functools.cache
def decoder_pool() -> DecoderPool:
    """The pool of this process, closed at its exit."""
    pool = DecoderPool()
    atexit.register(pool.close)
    return pool


class _Child:
    """One child process. Used by one thread at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"LC_ALL": "C"},  # none of this process's secrets
            bufsize=0,
            start_new_session=True,  # the terminal sends Ctrl+C to this process only
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._to, self._from):
            if sys.platform == "linux":  # fewer context switches; refused past the limit of the user
                with contextlib.suppress(OSError):
                    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def decode(
        self, data: bytes, mode: DecodeMode, orientation: int, deadline: float
    ) -> tuple[str, Image.Image | None]:
        """("", the picture), or (name of the error, None). deadline: time.monotonic(). Raises DecoderLost."""
        self._write(REQUEST.pack(mode.value, orientation, len(data)), deadline)
        self._write(data, deadline)
        status, pixel_mode, width, height, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if length > 3 * MAX_PIXELS:  # a compromised child may answer anything, here and below
            raise DecoderLost
        body = self._read(length, deadline)
        if status not in (b"K", b"W"):
            return body.decode("ascii", "replace"), None
        if mode is DecodeMode.check:
            return "", Image.new("1", (1, 1))
        try:
            picture = Image.frombytes(pixel_mode.decode("ascii").strip(), (width, height), body)
        except ValueError:
            raise DecoderLost from None
        picture.info[ON_WHITE] = status == b"W"
        return "", picture

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _wait_for_pipe(self._to, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._to, view[:CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise DecoderLost from None

    def _read(self, size: int, deadline: float) -> bytes:
        read = bytearray()
        while len(read) < size:
            _wait_for_pipe(self._from, select.POLLIN, deadline)
            try:
                part = os.read(self._from, min(CHUNK_BYTES, size - len(read)))
            except BlockingIOError:
                continue
            if not part:
                raise DecoderLost
            read += part
        return bytes(read)


def _wait_for_pipe(file: int, event: int, deadline: float) -> None:
    """Return when the pipe is ready or broken. Raises DecoderLost at the deadline."""
    waiting = select.poll()  # select() itself fails past a thousand open files
    waiting.register(file, event)
    left_ms = (deadline - time.monotonic()) * 1000
    if left_ms <= 0 or not waiting.poll(left_ms):
        raise DecoderLost
