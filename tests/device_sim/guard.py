"""A device guard for CUDA, so that a torch without CUDA may hold tensors that say they are on it.

copy_ and assignments by index ask for the guard of their tensors' device. Ours does nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
struct OneDevice final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
};
C10_REGISTER_GUARD_IMPL(CUDA, OneDevice)
}
"""


def compiler() -> str | None:
    """The C++ compiler that the guard needs; None where there is none."""
    return shutil.which("g++")


def load_guard() -> None:
    """Register the guard in this process, built first if it is not there.

    Raises RuntimeError without a compiler.
    """
    folder = Path(tempfile.gettempdir()) / f"simulated-cuda-{os.getuid()}-{torch.__version__}-{_digest()}"
    library = folder / "guard.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        _build(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _digest() -> str:
    return hashlib.sha256(SOURCE.encode()).hexdigest()[:12]


def _build(library: Path) -> None:
    """Under a name of its own first: other processes may be building, too."""
    program = compiler()
    if program is None:
        raise RuntimeError("the simulated device needs g++")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        source, built = Path(scratch) / "guard.cpp", Path(scratch) / "guard.so"
        source.write_text(SOURCE, encoding="ascii")
        options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
        subprocess.run([program, *options, str(source), "-lc10", "-o", str(built)], check=True)
        built.replace(library)
