"""Untrusted pictures decoded in processes of their own, which may die without anybody else noticing.

A file that Pillow or its libraries stumble over costs one small program (decoder_child.py) with a memory
limit, a time limit and no way to open a file; the caller hears BadRequest. The programs stay warm.
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
LIMIT_S = 60.0  # by the clock, on a machine however busy; the processor's time has its own limit
CHUNK_BYTES = 2**20


class DecodeMode(Enum):
    """What is wanted of a file."""

    picture = b"P"  # RGB
    mask = b"M"  # L
    check = b"C"  # nothing but that it can be decoded to its last pixel


class DecoderLost(Exception):
    """The program died, or was too slow."""


class DecoderPool:
    """A few decoding programs, started when first needed and replaced when they die. For many threads."""

    def __init__(self, processes: int = PROCESSES, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # the warmest first
        for _ in range(processes):
            self._idle.put(None)

    def decode(self, data: bytes, kind: DecodeMode, field: str) -> Image.Image:
        """The file's pixels, upright, in the size it has. Of a check: an empty picture.

        data: judged by pictures.inspect before. Raises BadRequest for whatever cannot be decoded.
        """
        child = self._idle.get()
        try:
            if child is None or not child.alive:
                child = _Child()
            error, picture = child.ask(data, kind, time.monotonic() + self._limit_s)
        except DecoderLost:
            if child is not None:
                child.end()
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
        """End the programs that are idle."""
        with contextlib.suppress(queue.Empty):
            while True:
                child = self._idle.get_nowait()
                if child is not None:
                    child.end()

    @property
    def pids(self) -> list[int]:
        """Of the idle programs."""
        return [child.pid for child in list(self._idle.queue) if child is not None]


@functools.cache
def decoder_pool() -> DecoderPool:
    """This process's own."""
    ours = DecoderPool()
    atexit.register(ours.close)
    return ours


class _Child:
    """One program. One thread at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"LC_ALL": "C"},  # no secrets of ours
            bufsize=0,
            start_new_session=True,  # the terminal's Ctrl+C is for us; it ends with its input
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._to, self._from):
            if sys.platform == "linux":  # fewer switches between the two; refused where pipes are rationed
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

    def ask(self, data: bytes, kind: DecodeMode, deadline: float) -> tuple[str, Image.Image | None]:
        """(why not, None) or ("", the picture). Raises Lost."""
        self._write(REQUEST.pack(kind.value, len(data)), deadline)
        self._write(data, deadline)
        status, mode, width, height, length = ANSWER.unpack(self._read(ANSWER.size, deadline))
        if length > 3 * MAX_PIXELS:  # a program that was taken over may say anything, here and below
            raise DecoderLost
        body = self._read(length, deadline)
        if status != b"K":
            return body.decode("ascii", "replace"), None
        if kind is DecodeMode.check:
            return "", Image.new("1", (1, 1))
        try:
            return "", Image.frombytes(mode.decode("ascii").strip(), (width, height), body)
        except ValueError:
            raise DecoderLost from None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            _await(self._to, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._to, view[:CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise DecoderLost from None

    def _read(self, size: int, deadline: float) -> bytes:
        read = bytearray()
        while len(read) < size:
            _await(self._from, select.POLLIN, deadline)
            try:
                part = os.read(self._from, min(CHUNK_BYTES, size - len(read)))
            except BlockingIOError:
                continue
            if not part:
                raise DecoderLost
            read += part
        return bytes(read)


def _await(file: int, what: int, deadline: float) -> None:
    """Return when the pipe is ready or broken. Raises Lost at the deadline."""
    waiting = select.poll()  # select() itself fails past a thousand open files
    waiting.register(file, what)
    left_ms = (deadline - time.monotonic()) * 1000
    if left_ms <= 0 or not waiting.poll(left_ms):
        raise DecoderLost
