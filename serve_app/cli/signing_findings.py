"""What `weft doctor` finds about the certificate that signs finished files."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from deployments.protocol.errors import WeftError
from deployments.provenance.certificates import last_valid_day
from serve_app.cli.findings import Finding, Level
from serve_app.settings import Settings
from serve_app.signing import TEST_CERTIFICATES, TEST_NOTICE, signing_identity

RENEW_BEFORE = datetime.timedelta(days=30)


def signing_findings(settings: Settings, now: datetime.datetime) -> Iterator[Finding]:
    """Whether files are signed, by a certificate that others trust, and for how long. Makes none."""
    if not settings.content_credentials:
        yield Finding(
            Level.warn,
            "finished files carry no content credentials (WEFT_CONTENT_CREDENTIALS=false); in the EU the law "
            "asks for a marking of generated media that machines can read",
        )
        return
    if settings.signing_certificates is None and not (settings.data_dir / TEST_CERTIFICATES).exists():
        yield Finding(Level.warn, "the next start makes a test certificate for content credentials")
        return
    try:
        identity = signing_identity(settings)
    except WeftError as error:
        yield Finding(Level.fail, error.message)
        return
    assert identity is not None, "content credentials are on"
    if identity.is_test:
        yield Finding(Level.warn, TEST_NOTICE.removeprefix("warning: "))
        return
    try:
        ends = last_valid_day(identity.certificates)
    except ValueError as error:
        yield Finding(Level.fail, f"WEFT_SIGNING_CERTIFICATES holds no certificates in PEM: {error}")
        return
    day = ends.date().isoformat()
    if ends <= now:
        yield Finding(Level.fail, f"the certificate that signs files was valid until {day}; renew it")
    elif ends - now < RENEW_BEFORE:
        yield Finding(Level.warn, f"the certificate that signs files ends on {day}; renew it")
    else:
        yield Finding(Level.ok, f"files are signed by a certificate that is valid until {day}")
