"""Makes the packages of one virtual environment importable in another: `link_environment.py VENV OTHER`.

pip in VENV then counts them as installed. The image keeps torch in OTHER, a layer of its own.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def link(venv: Path, other: Path) -> Path:
    """The new file in `venv` that names the packages of `other`. Raises FileNotFoundError without one."""
    own, linked = (_packages(folder.resolve()) for folder in (venv, other))
    file = own / f"{other.name}.pth"
    file.write_text(f"{linked}\n", encoding="utf-8")
    return file


def _packages(venv: Path) -> Path:
    path = Path(sysconfig.get_path("purelib", "venv", {"base": str(venv), "platbase": str(venv)}))
    if not path.is_dir():
        raise FileNotFoundError(f"{venv} is no virtual environment of this Python: {path} is missing")
    return path


if __name__ == "__main__":
    link(Path(sys.argv[1]), Path(sys.argv[2]))
