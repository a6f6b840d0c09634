"""The program of a child process that decodes untrusted pictures, with limits on memory, time and open files.

decoder.py starts it by its path. It imports nothing of ours and exchanges binary messages, numbers
big-endian:

in:  mode (1: P picture, M mask, H holes, C check), EXIF orientation (1), length (4), the file
out: K, or W where transparent pixels became white; pixel mode (4), width (4), height (4), length (4), the
     pixels
or:  E, 12 bytes without meaning, length (4), the name of the error

It ends when its input ends.
"""

import io
import os
import resource
import struct
import sys

# everything that opening these formats imports, because no file can be opened after _set_limits
from PIL import (
    Image,
    ImageChops,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

DECODERS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow opens 43 by default; every one is attack surface
MAX_PIXELS = 16_000_000  # checked by validation/image_header.py, and again here before anything is decoded
PICTURE_BYTES = 640 * 2**20  # memory beside the program's own; 16 megapixels need about 400 MiB
CPU_S = 10  # for one picture; 16 megapixels need about one
REQUEST = struct.Struct(">cBI")
ANSWER = struct.Struct(">c4sIII")
UPRIGHT = {  # by EXIF orientation; read by validation/image_header.py, so that both agree on the size
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def main() -> None:
    """Answer requests until the input ends."""
    _set_limits()
    while True:
        header = _read(REQUEST.size)
        if header is None:
            return
        mode, orientation, length = REQUEST.unpack(header)
        data = _read(length)
        if data is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
        try:
            status, picture = _decoded(data, mode, orientation)
            pixels = b"" if mode == b"C" else picture.tobytes()
            pixel_mode, (width, height) = picture.mode.ljust(4).encode(), picture.size
        except MemoryError:
            _write(ANSWER.pack(b"E", b"    ", 0, 0, 11) + b"MemoryError")
            return  # the heap may be too fragmented for the next picture
        except Exception as error:  # Pillow does not document which errors a forged file may raise
            name = type(error).__name__.encode()
            _write(ANSWER.pack(b"E", b"    ", 0, 0, len(name)) + name)
        else:
            _write(ANSWER.pack(status, pixel_mode, width, height, len(pixels)))
            _write(pixels)


def _decoded(data: bytes, mode: bytes, orientation: int) -> tuple[bytes, Image.Image]:
    """The status and the upright picture without metadata, as L or RGB; C: as opened.

    P: RGB, transparency composed on white. M: the brightness of a mask, transparent pixels black.
    H: how transparent each pixel is.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        opened.load()
        if mode == b"C":
            return b"K", opened
        colours, alpha = _colours_and_alpha(opened, data)
    if mode == b"H":
        holes = ImageChops.invert(alpha or Image.new("L", colours.size, 255))
        return b"K", _upright(holes, orientation)
    if mode == b"M":
        grey = colours.convert("L")
        mask = grey if alpha is None else ImageChops.multiply(grey, alpha)
        return b"K", _upright(mask, orientation)
    colours = colours.convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return b"K", _upright(colours, orientation)
    white = Image.new("RGB", colours.size, "white")
    return b"W", _upright(Image.composite(colours, white, alpha), orientation)


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    turn = UPRIGHT.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _colours_and_alpha(opened: Image.Image, data: bytes) -> tuple[Image.Image, Image.Image | None]:
    """The picture without transparency, L or RGB or CMYK, and its alpha as L; None where all is opaque."""
    transparent = opened.info.get("transparency")
    if opened.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        alpha = None if transparent is None else _differs_16(opened, transparent)
        grey = opened.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        return grey, alpha
    if transparent is not None and opened.mode in ("L", "RGB"):
        opened.info["transparency"] = _as_8_bits(transparent, depth=data[24])  # of a PNG, in its own depth
    if not opened.has_transparency_data:
        return (opened.convert("RGB") if opened.mode == "P" else opened), None
    coloured = opened.convert("RGBA")
    return coloured.convert("RGB"), coloured.getchannel("A")


def _as_8_bits(colour: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    """A colour of a PNG file as Pillow decodes it."""
    if isinstance(colour, tuple):
        return tuple(value >> 8 for value in colour) if depth == 16 else colour
    return colour * 255 // ((1 << depth) - 1)


def _differs_16(picture: Image.Image, transparent: int) -> Image.Image:
    """255 where the pixels of 16 bits are another value than `transparent`, else 0."""
    pixels = picture.convert("I;16").tobytes()  # little-endian
    high, low = (Image.frombytes("L", picture.size, pixels[offset::2]) for offset in (1, 0))
    return ImageChops.lighter(
        high.point(lambda value: 255 * (value != transparent >> 8)),
        low.point(lambda value: 255 * (value != transparent & 255)),
    )


def _set_limits() -> None:
    """Allow memory for one picture, no further open files, no written files, no core dumps."""
    Image.preinit()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":  # other kernels do not enforce RLIMIT_AS
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + PICTURE_BYTES, mapped + PICTURE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # stdin, stdout and stderr


def _read(size: int) -> bytes | None:
    """Exactly `size` bytes; None at the end of the input."""
    data = sys.stdin.buffer.read(size)
    return data if len(data) == size else None


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main()
