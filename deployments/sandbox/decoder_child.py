"""The program that decodes untrusted pictures: alone, with little memory, little time and no files.

It is started by decoding.py by its path, imports nothing of ours, and speaks in plain bytes:
    in:  kind (1: P picture, M mask, C check), length (4), the file
    out: K, mode (4), width (4), height (4), length (4), the pixels    or    E, 12 zeros.., length (4), why
Numbers are big-endian. It ends when its input ends.
"""

import io
import os
import resource
import struct
import sys

# all that opening these formats may import, while files can still be opened
from PIL import (
    Image,
    ImageOps,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

DECODERS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 16_000_000  # as pictures.py allows; looked at again here, before anything is decoded
ROOM_BYTES = 640 * 2**20  # over what the program itself has; 16 megapixels need about 400 MiB at once
CPU_S = 10  # of one picture; 16 megapixels need about one
REQUEST = struct.Struct(">cI")
ANSWER = struct.Struct(">c4sIII")


def main() -> None:
    """Answer until there is no more to read."""
    _limit()
    while True:
        header = _read(REQUEST.size)
        if header is None:
            return
        kind, length = REQUEST.unpack(header)
        data = _read(length)
        if data is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
        try:
            picture = _decoded(data, kind)
            pixels = b"" if kind == b"C" else picture.tobytes()
            mode, (width, height) = picture.mode.ljust(4).encode(), picture.size
        except MemoryError:
            _write(ANSWER.pack(b"E", b"    ", 0, 0, 11) + b"MemoryError")
            return  # what is left of the heap may be no use for the next
        except Exception as error:  # Pillow does not say which a forged file may raise
            why = type(error).__name__.encode()
            _write(ANSWER.pack(b"E", b"    ", 0, 0, len(why)) + why)
        else:
            _write(ANSWER.pack(b"K", mode, width, height, len(pixels)))
            _write(pixels)


def _decoded(data: bytes, kind: bytes) -> Image.Image:
    """P: RGB, transparency lies on white. M: L. Both upright; whatever else the file holds is dropped."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        opened.load()
        if kind == b"C":
            return opened
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if kind == b"M":
        return upright.convert("L")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return upright.convert("RGB")


def _limit() -> None:
    """From here on: no more memory than room for one picture, no files, no dumps."""
    Image.preinit()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # elsewhere the kernel does not keep this one
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM_BYTES, mapped + ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # none beyond the three it has


def _read(size: int) -> bytes | None:
    """Exactly so many bytes; None at the end."""
    data = sys.stdin.buffer.read(size)
    return data if len(data) == size else None


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
