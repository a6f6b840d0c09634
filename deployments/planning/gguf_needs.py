"""What components take whose weights come from GGUF files: by the files' headers, where these are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from deployments.gguf_format.header import GgufHeader, read_header
from deployments.gguf_format.sizes import form, is_plain, loaded_bytes, workspace_bytes
from deployments.planning.device_limit import GIB
from deployments.planning.local_files import gguf_file_here
from deployments.protocol.card import Weights
from deployments.protocol.errors import ModelFailed
from deployments.protocol.gguf_file import GgufFile


@dataclass(frozen=True, slots=True)
class GgufNeeds:
    """What one component takes in memory."""

    name: str  # of the file, as the card writes it
    form: str = ""  # type of most of its values, such as "Q4_K"; empty: the file is not here
    weight_bytes: int | None = None  # None: not known
    workspace_bytes: int | None = None  # while a layer's weight is brought into floats; None: not known
    is_exact: bool = False  # whether its values are those of a file in 16 or 32 bits

    @property
    def is_read(self) -> bool:
        """Whether the bytes are those of the file's own tensors, not what the card states."""
        return bool(self.form)


def gguf_needs(weights: Weights, itemsize: int) -> Mapping[str, GgufNeeds]:
    """By component, what it takes. itemsize: bytes of a value in the dtype that it computes in.

    Raises ModelFailed for a file that is here and cannot be used, and for a local one that is missing.
    """
    return {name: _needs(file, itemsize) for name, file in weights.gguf.items()}


def _needs(file: GgufFile, itemsize: int) -> GgufNeeds:
    path = gguf_file_here(file)
    if path is None:
        return GgufNeeds(file.name, weight_bytes=None if file.gib is None else int(file.gib * GIB))
    header = header_of(path)
    return GgufNeeds(
        file.name,
        form(header),
        loaded_bytes(header, itemsize),
        workspace_bytes(header, itemsize),
        is_plain(header),
    )


def header_of(path: Path) -> GgufHeader:
    """The header of the file at this path; it is read again when the file has changed.

    Raises ModelFailed for one that cannot be used or is not there.
    """
    try:
        status = path.stat()
        return _read(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ModelFailed(
            f"the GGUF file {path} cannot be read ({error.strerror}); put it there, or correct weights.gguf "
            "in the card"
        ) from error


@lru_cache(maxsize=64)
def _read(path: Path, _size: int, _mtime_ns: int) -> GgufHeader:
    return read_header(path)
