"""Signatures of links: any change of a link invalidates it."""

from __future__ import annotations

from serve_app.jobs import signed_links

JOB = "f" * 32


def test_a_signature_is_of_one_file_one_time_and_one_installation():
    ours = signed_links.signature(b"s" * 32, JOB, 0, "image", 1000)

    def is_valid(
        secret: bytes = b"s" * 32, index: int = 0, expires_at: int = 1000, now: float = 999.0
    ) -> bool:
        return signed_links.is_valid(secret, JOB, index, "image", expires_at, ours, now)

    assert is_valid()
    assert not is_valid(now=1000.0)
    assert not is_valid(expires_at=2000)
    assert not is_valid(index=1)
    assert not is_valid(secret=b"t" * 32)


def test_a_signature_is_the_same_in_every_version_and_needs_no_escapes_in_a_url():
    signature = "to9YsHUOOVLjKiRyETGsaWXDhhCTaFFUa0_0uo7MKtY"

    assert signed_links.signature(b"s" * 32, JOB, 0, "image", 1000) == signature


def test_what_is_no_text_is_no_signature():
    assert not signed_links.is_valid(b"s" * 32, JOB, 0, "image", 1000, "\ud800", 999.0)
