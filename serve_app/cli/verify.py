"""`weft verify`: what the content credentials of a file say, and whether they are true."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deployments.protocol.errors import BadRequest
from deployments.provenance.verifying import Verification, verify
from serve_app.settings import Settings
from serve_app.signing import trust_anchors

MEDIA_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".mp4": "video/mp4",
}
STATES = {
    "trusted": "unchanged, and signed by this installation or under the given certificates",
    "valid": "unchanged, but the signer is not known here",
    "invalid": "CHANGED after it was signed, or signed wrongly",
    "none": "no content credentials",
}

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A PNG, JPEG, WebP or MP4 file.")],
    trust: Annotated[
        Path | None,
        typer.Option(help="Certificates (PEM) to trust.  Default: those of this installation."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what the content credentials of a file say; exit status 1 unless it is signed and unchanged."""
    media_type = MEDIA_TYPES.get(file.suffix.lower())
    if media_type is None:
        raise BadRequest(f"{file}: files with the endings {', '.join(MEDIA_TYPES)} can be checked")
    try:
        anchors = trust_anchors(Settings.load()) if trust is None else trust.read_text(encoding="ascii")
        data = file.read_bytes()
    except OSError as error:
        raise BadRequest(f"cannot be read: {error}") from None
    found = verify(data, media_type, anchors)
    print(json.dumps(asdict(found), indent=2) if as_json else as_text(found))
    if found.state in ("invalid", "none"):
        raise typer.Exit(1)


def as_text(found: Verification) -> str:
    """One line for the state and one for each thing that the manifest states."""
    facts = {
        "wrong": ", ".join(found.failures) if found.state == "invalid" else "",
        "made by": found.generator,
        "model": str(found.generation.get("model", "")),
        "source": found.digital_source_type.rsplit("/", 1)[-1],
        "signer": found.signer,
        "signed at": found.signed_at,
        "inputs": ", ".join(entry.get("title", "") for entry in found.ingredients),
    }
    lines = [f"{name}: {value}" for name, value in facts.items() if value]
    return "\n".join([f"{found.state}: {STATES[found.state]}", *lines])
