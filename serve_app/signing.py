"""Who signs the files of this installation: the operator's certificate, or a test certificate made here."""

from __future__ import annotations

import datetime
import fcntl
import logging
import os
from pathlib import Path

from pydantic import SecretStr

from deployments.protocol.errors import BadRequest
from deployments.protocol.signing_identity import SigningIdentity
from deployments.provenance.certificates import make_test_chain
from serve_app.settings import Settings

logger = logging.getLogger(__name__)

TEST_CERTIFICATES, TEST_KEY = "c2pa_test_certificates.pem", "c2pa_test_key.pem"  # in the data folder
TEST_NOTICE = (
    "warning: finished files are signed with a test certificate that no other program trusts; set "
    "WEFT_SIGNING_CERTIFICATES and WEFT_SIGNING_KEY (docs/provenance.md)"
)


def signing_identity(settings: Settings) -> SigningIdentity | None:
    """Who signs; None where content credentials are switched off. The first call makes the test certificate,
    where the operator named none.

    Raises BadRequest for files that cannot be read and for settings that do not belong together.
    """
    if not settings.content_credentials:
        return None
    if settings.signing_certificates is None:
        if settings.signing_key is not None or settings.signing_function:
            raise BadRequest(
                "WEFT_SIGNING_KEY and WEFT_SIGNING_FUNCTION need WEFT_SIGNING_CERTIFICATES, the certificates "
                "of the key"
            )
        certificates, key = _test_chain(settings.data_dir)
        return _identity(settings, certificates, key, is_test=True)
    if (settings.signing_key is None) == (not settings.signing_function):
        raise BadRequest(
            "WEFT_SIGNING_CERTIFICATES needs WEFT_SIGNING_KEY, the file with its key, or "
            "WEFT_SIGNING_FUNCTION, which signs with it; set one of them"
        )
    certificates = _text(settings.signing_certificates, "WEFT_SIGNING_CERTIFICATES")
    if settings.signing_key is None:
        return _identity(settings, certificates, None, is_test=False)
    return _identity(settings, certificates, _text(settings.signing_key, "WEFT_SIGNING_KEY"), is_test=False)


def trust_anchors(settings: Settings) -> str:
    """The certificates (PEM) whose signers `weft verify` trusts: those of this installation, if there are."""
    own = settings.signing_certificates or settings.data_dir / TEST_CERTIFICATES
    return own.read_text(encoding="ascii") if own.exists() else ""


def _identity(settings: Settings, certificates: str, key: str | None, *, is_test: bool) -> SigningIdentity:
    return SigningIdentity(
        certificates,
        None if key is None else SecretStr(key),
        "" if is_test else settings.signing_function,
        "es256" if is_test else settings.signing_algorithm,
        settings.timestamp_url,
        settings.credentials_with_prompt,
        settings.unsigned_users,
        is_test,
    )


def _text(path: Path, variable: str) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{variable} cannot be read: {error}; it names a file in PEM") from None


def _test_chain(folder: Path) -> tuple[str, str]:
    """The test certificates and their key, made by the first start that finds none.

    A folder that cannot be written has a new chain at every start, which is logged.
    """
    certificates, key = folder / TEST_CERTIFICATES, folder / TEST_KEY
    if certificates.exists() and key.exists():
        return certificates.read_text(encoding="ascii"), key.read_text(encoding="ascii")
    made = make_test_chain(datetime.datetime.now(datetime.UTC))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{TEST_KEY}.lock").open("a") as lock:  # models of a fleet are built at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            if certificates.exists() and key.exists():
                return certificates.read_text(encoding="ascii"), key.read_text(encoding="ascii")
            for path, text in zip((key, certificates), reversed(made), strict=True):
                _write_private(path, text)
    except OSError as error:
        logger.warning(
            "the test certificate cannot be kept, so every start has another", extra={"error": str(error)}
        )
    return made


def _write_private(path: Path, text: str) -> None:
    """Write a file that only our user can read; a start that is killed leaves no half of it."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.touch(mode=0o600)
    new.write_text(text, encoding="ascii")
    new.replace(path)
