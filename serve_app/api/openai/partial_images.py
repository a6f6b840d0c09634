"""Previews as OpenAI's clients expect partial images: in the size and format of the image that follows."""

import io

from PIL import Image

from deployments.protocol.request import OutputOptions


def partial_image(preview: bytes, output: OutputOptions, width: int, height: int) -> bytes:
    """A file of width x height pixels. preview: a small file of a replica. Blocks; call it in a thread."""
    buffer = io.BytesIO()
    whole = Image.open(io.BytesIO(preview)).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if output.format == "png":
        whole.save(buffer, "PNG", compress_level=1)
    else:
        whole.save(buffer, output.format.upper(), quality=output.quality)
    return buffer.getvalue()
