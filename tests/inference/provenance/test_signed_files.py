"""Files of a replica carry manifests that the library's own reader accepts, and no other bytes do."""

from __future__ import annotations

import asyncio
import datetime
import io
import socket
import sys
from pathlib import Path
from typing import Any, Literal

import av
import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from PIL import Image
from pydantic import SecretStr

from deployments.media.movie import encode_segment, join
from deployments.media.video_spec import VideoSpec
from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest, Internal, ModelUnavailable
from deployments.protocol.events import Artifact, Done
from deployments.protocol.request import GenerationRequest, ResolvedRequest, Video
from deployments.protocol.signing_identity import SigningIdentity
from deployments.provenance.certificates import TEST_ORGANISATION, last_valid_day, make_test_chain
from deployments.provenance.manifest import EDITED, GENERATED
from deployments.provenance.signed_events import NO_WEBM, SWITCHED_OFF, sign_event
from deployments.provenance.signing import ManifestSigner
from deployments.provenance.verifying import verify
from deployments.validation.resolve import resolve

CARD = load_card(Path(__file__).parents[3] / "configs/models/tiny-flux-schnell.yaml")
NOW = datetime.datetime.now(datetime.UTC)
CHAIN, KEY = make_test_chain(NOW)
IDENTITY = SigningIdentity(CHAIN, SecretStr(KEY), is_test=True)
DONE = Done(0.0, 0.0)


def picture(media_type: str = "image/png") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, media_type.removeprefix("image/").upper())
    return buffer.getvalue()


def artifact(data: bytes, media_type: str = "image/png") -> Artifact:
    return Artifact(0, "image", media_type, data, 64, 64, 7)


def request(**fields: Any) -> ResolvedRequest:
    given = {"model": CARD.id, "prompt": "a secret red circle", "width": 64, "height": 64, **fields}
    return resolve(GenerationRequest.model_validate(given), CARD, fresh_seed=1)[0]


def signed(data: bytes, media_type: str = "image/png", **fields: Any) -> bytes:
    signer = ManifestSigner(IDENTITY)
    return asyncio.run(signer.sign(artifact(data, media_type), request(**fields))).data


def old_chain() -> tuple[str, SecretStr]:
    """A certificate that has ended, and its key."""
    chain, key = make_test_chain(NOW - datetime.timedelta(days=4000))
    return chain, SecretStr(key)


def video() -> bytes:
    spec = VideoSpec(64, 64, 2, 4, "mp4", 50)
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return join(spec, [encode_segment(spec, 0, [frames], 1)]).video


def edit_of(data: bytes) -> dict[str, object]:
    return {"edit": {"image": data, "strength": 0.5}}


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp"])
def test_a_signed_file_is_trusted_under_its_own_certificates_and_known_nowhere_else(media_type: str) -> None:
    data = picture(media_type)

    file = signed(data, media_type)

    found = verify(file, media_type, CHAIN)
    assert (found.state, found.failures, found.signer) == ("trusted", (), TEST_ORGANISATION)
    assert found.generation == {"model": CARD.id, "kind": "image"}
    assert found.digital_source_type == GENERATED
    assert found.generator.startswith("Weft ")
    elsewhere = verify(file, media_type)
    assert (elsewhere.state, elsewhere.failures) == ("valid", ("signingCredential.untrusted",))


@pytest.mark.parametrize("media_type", ["image/png", "image/jpeg", "image/webp"])
def test_signing_changes_no_pixel(media_type: str) -> None:
    data = picture(media_type)

    file = signed(data, media_type)

    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(file))
    assert np.array_equal(np.asarray(before), np.asarray(after))


def test_a_file_that_was_changed_after_signing_is_invalid() -> None:
    file = bytearray(signed(picture()))
    file[file.index(b"IDAT") + 100] ^= 1

    found = verify(bytes(file), "image/png", CHAIN)

    assert found.state == "invalid"
    assert "assertion.dataHash.mismatch" in found.failures


def test_an_mp4_video_is_signed_and_still_plays() -> None:
    file = signed(video(), "video/mp4")

    assert verify(file, "video/mp4", CHAIN).state == "trusted"
    with av.open(io.BytesIO(file)) as container:
        assert len(list(container.decode(video=0))) == 2


def test_a_manifest_of_another_file_is_invalid() -> None:
    ours, other = signed(picture()), picture("image/png")
    stolen = ours[33 : ours.index(b"IDAT") - 4]  # the chunks between the header and the picture
    brighter = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(brighter, "PNG")
    forged = brighter.getvalue()[:33] + stolen + brighter.getvalue()[33:]

    assert verify(other, "image/png", CHAIN).state == "none"
    assert verify(forged, "image/png", CHAIN).state == "invalid"


def test_a_file_that_is_encoded_again_has_lost_its_manifest() -> None:
    again = io.BytesIO()
    Image.open(io.BytesIO(signed(picture()))).save(again, "PNG")

    assert verify(again.getvalue(), "image/png", CHAIN).state == "none"


def test_an_edit_is_a_composite_with_the_manifest_of_its_input() -> None:
    first = signed(picture())

    found = verify(signed(picture(), **edit_of(first)), "image/png", CHAIN)

    assert (found.state, found.digital_source_type) == ("trusted", EDITED)
    assert [entry["title"] for entry in found.ingredients] == ["given image"]
    assert found.ingredients[0]["active_manifest"]


def test_an_input_without_a_manifest_is_an_ingredient_too() -> None:
    found = verify(signed(picture(), **edit_of(picture("image/jpeg"))), "image/png", CHAIN)

    assert found.state == "trusted"
    assert found.ingredients == ({"title": "given image", "format": "image/jpeg"},)


def test_an_input_whose_manifest_was_forged_does_not_make_the_result_invalid() -> None:
    forged = bytearray(signed(picture()))
    forged[forged.index(b"IDAT") + 100] ^= 1

    found = verify(signed(picture(), **edit_of(bytes(forged))), "image/png", CHAIN)

    assert found.state == "trusted"


def test_an_address_that_an_input_names_for_its_manifest_is_not_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        given = with_manifest_elsewhere(f"http://127.0.0.1:{server.getsockname()[1]}/manifest")
        assert b"/manifest" in given

        file = signed(picture(), **edit_of(given))

        assert verify(file, "image/png", CHAIN).state == "trusted"
        with pytest.raises(BadRequest, match="must fetch remote manifests"):
            verify(given, "image/png", CHAIN)
        with pytest.raises(BlockingIOError):
            server.accept()


def with_manifest_elsewhere(url: str) -> bytes:
    """A signed picture that names an address in place of its manifest."""
    info = c2pa.C2paSignerInfo("es256", CHAIN.encode(), KEY.encode(), None)
    target = io.BytesIO()
    with c2pa.Builder({"title": "elsewhere"}) as builder:
        builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
        builder.set_no_embed()
        builder.set_remote_url(url)
        builder.sign(c2pa.Signer.from_info(info), "image/png", io.BytesIO(picture()), target)
    return target.getvalue()


@pytest.mark.parametrize("allowed", [False, True])
def test_prompt_and_seed_are_stated_only_if_the_operator_allows(allowed: bool) -> None:
    signer = ManifestSigner(SigningIdentity(CHAIN, SecretStr(KEY), with_prompt=allowed))

    file = asyncio.run(signer.sign(artifact(picture()), request())).data

    assert (b"secret red circle" in file) is allowed
    assert ("seed" in verify(file, "image/png").generation) is allowed


def test_a_function_of_the_operator_signs_instead_of_a_key() -> None:
    signer = ManifestSigner(SigningIdentity(CHAIN, function=f"{__name__}:sign_elsewhere"))

    file = asyncio.run(signer.sign(artifact(picture()), request())).data

    assert verify(file, "image/png", CHAIN).state == "trusted"


def sign_elsewhere(data: bytes) -> bytes:
    key = serialization.load_pem_private_key(KEY.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def refuse(data: bytes) -> bytes:
    raise OSError(f"the signing service did not take {len(data)} bytes")


def test_a_file_that_cannot_be_signed_does_not_leave() -> None:
    signer = ManifestSigner(IDENTITY)

    with pytest.raises(Internal, match="could not be signed"):
        asyncio.run(signer.sign(artifact(b"no picture"), request()))


@pytest.mark.parametrize(
    "identity",
    [
        SigningIdentity("no certificate", SecretStr(KEY)),
        SigningIdentity(CHAIN, SecretStr("no key")),
        SigningIdentity(CHAIN, SecretStr(make_test_chain(NOW)[1])),
        SigningIdentity(*old_chain()),
        SigningIdentity(CHAIN, function="no_such_module:sign"),
        SigningIdentity(CHAIN, function=f"{__name__}:refuse"),
        SigningIdentity(CHAIN),
    ],
    ids=["certificates", "key", "key of another", "ended", "function", "refusing function", "nothing"],
)
def test_what_cannot_sign_is_refused_when_the_replica_starts(identity: SigningIdentity) -> None:
    with pytest.raises(ModelUnavailable, match="WEFT_SIGNING_"):
        ManifestSigner(identity)


def test_a_platform_without_the_library_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)

    with pytest.raises(ModelUnavailable, match="WEFT_CONTENT_CREDENTIALS=false"):
        ManifestSigner(IDENTITY)


def test_files_of_a_user_for_whom_signing_is_off_stay_as_they_are_and_the_job_says_so() -> None:
    signer = ManifestSigner(SigningIdentity(CHAIN, SecretStr(KEY), unsigned_users=("u1",)))

    async def events(user: str) -> tuple[object, object]:
        file = await sign_event(signer, artifact(picture()), request(), user)
        return file, await sign_event(signer, DONE, request(), user)

    file, done = asyncio.run(events("u1"))
    assert file == artifact(picture())
    assert isinstance(done, Done)
    assert done.warnings == (SWITCHED_OFF,)
    file, done = asyncio.run(events("u2"))
    assert file != artifact(picture())
    assert done == DONE


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_a_webm_video_warns_that_it_carries_no_manifest(container: Literal["mp4", "webm"]) -> None:
    wan = load_card(Path(__file__).parents[3] / "configs/models/tiny-wan.yaml")
    given = GenerationRequest(model=wan.id, prompt="a ball", video=Video(format=container))
    asked, _ = resolve(given, wan, fresh_seed=1)

    done = asyncio.run(sign_event(ManifestSigner(IDENTITY), DONE, asked, "u"))

    assert isinstance(done, Done)
    assert (NO_WEBM in done.warnings) is (container == "webm")


def test_the_test_certificate_is_valid_for_years() -> None:
    assert last_valid_day(CHAIN) > NOW + datetime.timedelta(days=3000)


@pytest.mark.parametrize(("data", "media_type"), [(b"text", "text/plain"), (b"\x1aE\xdf\xa3", "video/webm")])
def test_a_type_that_cannot_carry_a_manifest_is_refused(data: bytes, media_type: str) -> None:
    with pytest.raises(BadRequest):
        verify(data, media_type)
