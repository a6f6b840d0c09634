"""The place of a GGUF file that a card names for one component of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Self

from pydantic import Field, model_validator

from deployments.protocol.request import Strict

SUFFIX = ".gguf"
EXAMPLE = "city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf"


class GgufFile(Strict):
    """A file in a hub repository (`repo` and `file`), or its path: on this node (a relative one is under the
    repository of Weft), or the URL of a file that fsspec opens (s3://bucket/file.gguf).

    A card may write it as one text: owner/name/file.gguf is on the hub; what begins with /, ./ or ~, or has
    ://, is a path.
    """

    repo: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    file: str | None = None  # in the repository, such as "flux1-dev-Q4_K_S.gguf"
    revision: str = "main"
    path: str | None = None
    gib: float | None = Field(None, gt=0)  # of the file, for plans where it is not on the machine

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        return _from_text(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if (self.path is None) == (self.repo is None) or (self.repo is None) != (self.file is None):
            raise ValueError(f"a GGUF file needs repo and file, or path; for example {EXAMPLE}")
        name = str(self.path or self.file)
        if not name.endswith(SUFFIX):
            raise ValueError(f"{name!r} is no GGUF file: its name does not end in {SUFFIX}")
        if self.file is not None and (self.file.startswith("/") or ".." in PurePosixPath(self.file).parts):
            raise ValueError(f"{self.file!r} is no file of a repository")
        return self

    @property
    def name(self) -> str:
        """As a card writes it."""
        return self.path or f"{self.repo}/{self.file}"

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched before it can be read."""
        return self.repo is not None or "://" in str(self.path)


def _from_text(text: str) -> Mapping[str, str]:
    if "://" in text or text.startswith(("/", "./", "../", "~")):
        return {"path": text}
    owner, _, rest = text.partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise ValueError(
            f"{text!r} names no GGUF file; write {EXAMPLE} for one of the hub, ./{text} for one on this node"
        )
    return {"repo": f"{owner}/{name}", "file": file}
