"""Durable writes and links of files on a local disk. All functions block."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from mmap import mmap
from pathlib import Path


def write_file(path: Path, data: bytes | mmap) -> None:
    """Write a temporary file, flush it and rename it: a crash leaves the complete file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)  # makes the rename durable


def link_file(source: Path, target: Path) -> None:
    """Give a file a second name; this is safe because files are replaced and never changed.

    Keeps a target that exists. Raises FileNotFoundError without a source.
    """
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:  # an attempt has written it, and its commit is not known here
        return
    except FileNotFoundError:
        with suppress(OSError):
            folder.rmdir()
        raise
    except OSError:  # the file system has no hard links
        write_file(target, source.read_bytes())
        return
    _flush_folder(folder)


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
