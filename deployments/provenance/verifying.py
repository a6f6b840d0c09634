"""Reading: whether a file carries a manifest, whether that is unchanged and valid, and what it states."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.protocol.errors import BadRequest
from deployments.provenance.library import load_library
from deployments.provenance.manifest import GENERATION

State = Literal["trusted", "valid", "invalid", "none"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What the manifest of a file says.

    state: `trusted` is valid and signed under the given anchors; `valid` is unchanged, by a signer that is
    not known here; `invalid` was changed after signing, or its signature or certificate is wrong; `none`
    means that the file has no manifest.
    """

    state: State
    failures: tuple[str, ...] = ()  # C2PA's codes, such as assertion.dataHash.mismatch
    generator: str = ""
    title: str = ""
    signer: str = ""  # organisation of the certificate
    signed_at: str = ""  # by a time-stamp authority; empty without one
    digital_source_type: str = ""  # IPTC's address
    generation: dict[str, Any] = field(default_factory=dict)  # what Weft states: model, kind, seed and prompt
    ingredients: tuple[dict[str, str], ...] = ()  # title, format and the label of the manifest of each input


def verify(data: bytes, media_type: str, anchors: str = "") -> Verification:
    """Check the manifest in these bytes. Nothing is fetched.

    anchors: certificates (PEM) whose signers are trusted. Raises BadRequest for a type that cannot carry a
    manifest, or a file that cannot be read.
    """
    library = load_library()
    settings: dict[str, object] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if anchors:
        settings["trust"] = {"user_anchors": anchors}
    context = library.Context(library.Settings.from_dict(settings))
    try:
        with library.Reader(media_type, io.BytesIO(data), context=context) as reader:
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except library.C2paError.ManifestNotFound:
        return Verification("none")
    except library.C2paError.NotSupported:
        raise BadRequest(
            f"files of type {media_type} carry no manifest; PNG, JPEG, WebP and MP4 do"
        ) from None
    except library.C2paError as error:
        raise BadRequest(f"the file cannot be read: {error}") from error
    return _verification(store, state)


def _verification(store: dict[str, Any], state: str | None) -> Verification:
    manifest = store["manifests"][store["active_manifest"]]
    assertions = {entry["label"]: entry["data"] for entry in manifest.get("assertions", ())}
    actions = assertions.get("c2pa.actions.v2", {}).get("actions", [])
    generator = manifest.get("claim_generator_info", [{}])[0]
    signature = manifest.get("signature_info", {})
    sources = [action["digitalSourceType"] for action in actions if "digitalSourceType" in action]
    states: dict[str | None, State] = {"Trusted": "trusted", "Valid": "valid"}
    return Verification(
        states.get(state, "invalid"),
        failures=tuple(status["code"] for status in store.get("validation_status", ())),
        generator=f"{generator.get('name', '')} {generator.get('version', '')}".strip(),
        title=manifest.get("title", ""),
        signer=signature.get("issuer", ""),
        signed_at=signature.get("time", ""),
        digital_source_type=sources[0] if sources else "",
        generation=assertions.get(GENERATION, {}),
        ingredients=tuple(_ingredient(entry) for entry in manifest.get("ingredients", ())),
    )


def _ingredient(entry: dict[str, Any]) -> dict[str, str]:
    return {name: entry[name] for name in ("title", "format", "active_manifest") if name in entry}
