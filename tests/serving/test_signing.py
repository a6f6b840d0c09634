"""Who signs: the settings, the test certificate, `weft verify` and what `weft doctor` says of it."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from pydantic import SecretStr

from deployments.protocol.card import load_card
from deployments.protocol.errors import BadRequest
from deployments.protocol.events import Artifact
from deployments.protocol.request import GenerationRequest
from deployments.protocol.signing_identity import SigningIdentity
from deployments.provenance.certificates import make_test_chain
from deployments.provenance.signing import ManifestSigner
from deployments.validation.resolve import resolve
from serve_app.cli.findings import Level
from serve_app.cli.main import main
from serve_app.cli.signing_findings import signing_findings
from serve_app.settings import ROOT, Settings
from serve_app.signing import TEST_CERTIFICATES, TEST_KEY, signing_identity

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, object]:
    """Settings with certificates and key of the operator."""
    chain, key = make_test_chain(NOW)
    (tmp_path / "chain.pem").write_text(chain)
    (tmp_path / "key.pem").write_text(key)
    return {
        "data_dir": tmp_path / "data",
        "signing_certificates": tmp_path / "chain.pem",
        "signing_key": tmp_path / "key.pem",
    }


def signed_png(identity: SigningIdentity) -> bytes:
    card = load_card(ROOT / "configs/models/tiny-flux-schnell.yaml")
    request, _ = resolve(GenerationRequest(model=card.id, prompt="red"), card, fresh_seed=1)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    artifact = Artifact(0, "image", "image/png", buffer.getvalue(), 64, 64, 1)
    return asyncio.run(ManifestSigner(identity).sign(artifact, request)).data


def test_starts_at_the_same_time_agree_on_one_test_certificate(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path)
    at_once = threading.Barrier(8)

    def start() -> SigningIdentity | None:
        at_once.wait()
        return signing_identity(settings)

    with ThreadPoolExecutor(8) as starts:
        identities = [started.result() for started in [starts.submit(start) for _ in range(8)]]

    assert all(identity == identities[0] for identity in identities)
    assert identities[0] is not None
    ManifestSigner(identities[0])  # its certificate is that of its key


def test_the_first_start_makes_a_test_certificate_that_the_next_ones_use(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path)

    first, again = signing_identity(settings), signing_identity(settings)

    assert first is not None
    assert first.is_test
    assert first == again
    assert stat.S_IMODE((tmp_path / TEST_KEY).stat().st_mode) == 0o600


def test_a_data_folder_that_cannot_be_written_is_no_reason_not_to_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()

    identity = signing_identity(Settings.load(data_dir=tmp_path / "file" / "data"))

    assert identity is not None
    assert "cannot be kept" in caplog.text


def test_switched_off_there_is_no_signer_and_no_certificate(tmp_path: Path) -> None:
    settings = Settings.load(data_dir=tmp_path, content_credentials=False)

    assert signing_identity(settings) is None
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_the_operator_is_in_no_text(own: dict[str, object]) -> None:
    identity = signing_identity(Settings.load(**own))

    assert identity is not None
    assert not identity.is_test
    assert isinstance(identity.key, SecretStr)
    assert "BEGIN PRIVATE" in identity.key.get_secret_value()
    assert "BEGIN PRIVATE" not in repr(identity)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"signing_key": None}, "WEFT_SIGNING_KEY"),
        ({"signing_function": "hsm:sign"}, "set one of them"),
        ({"signing_certificates": None}, "need WEFT_SIGNING_CERTIFICATES"),
        ({"signing_key": Path("/nowhere.pem")}, "WEFT_SIGNING_KEY cannot be read"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(
    own: dict[str, object], changed: dict[str, object], named: str
) -> None:
    with pytest.raises(BadRequest, match=named):
        signing_identity(Settings.load(**(own | changed)))


def test_doctor_names_the_test_certificate_and_one_that_ends(tmp_path: Path, own: dict[str, object]) -> None:
    def found(settings: Settings, after_days: int = 0) -> list[Level]:
        later = NOW + datetime.timedelta(days=after_days)
        return [finding.level for finding in signing_findings(settings, later)]

    fresh = Settings.load(data_dir=tmp_path / "fresh")
    assert found(fresh) == [Level.warn]
    assert not (tmp_path / "fresh" / TEST_CERTIFICATES).exists()
    signing_identity(fresh)
    assert found(fresh) == [Level.warn]
    ours = Settings.load(**own)
    assert [found(ours, days) for days in (0, 3640, 3700)] == [[Level.ok], [Level.warn], [Level.fail]]
    assert found(Settings.load(**(own | {"signing_key": None}))) == [Level.fail]
    assert found(Settings.load(data_dir=tmp_path, content_credentials=False)) == [Level.warn]


def test_weft_verify_distinguishes_signed_files_from_changed_and_unsigned_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WEFT_DATA_DIR", str(tmp_path / "data"))
    identity = signing_identity(Settings.load())
    assert identity is not None
    good = signed_png(identity)
    changed = bytearray(good)
    changed[changed.index(b"IDAT") + 10] ^= 1
    bare = io.BytesIO()
    Image.new("RGB", (8, 8)).save(bare, "PNG")
    files = {"good": good, "changed": bytes(changed), "bare": bare.getvalue()}
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)

    statuses = {name: main(["verify", str(tmp_path / f"{name}.png")]) for name in files}

    shown = capsys.readouterr().out
    assert statuses == {"good": 0, "changed": 1, "bare": 1}
    assert "trusted: unchanged" in shown
    assert "source: trainedAlgorithmicMedia" in shown
    assert "wrong: assertion.dataHash.mismatch" in shown
    assert "none: no content credentials" in shown
    assert main(["verify", "--json", str(tmp_path / "good.png")]) == 0
    assert json.loads(capsys.readouterr().out)["generation"]["model"] == "tiny-flux-schnell"


def test_weft_verify_says_which_files_it_can_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path / "video.webm")]) == 1
    assert main(["verify", str(tmp_path / "nothing.png")]) == 1

    assert ".mp4" in capsys.readouterr().err
