"""Who signs the files of an installation, and what the signed statement contains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import SecretStr

SigningAlgorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]


@dataclass(frozen=True, slots=True)
class SigningIdentity:
    """A certificate chain, and its key or a function that signs with it.

    It travels to replicas as an argument, as their other secrets do.
    """

    certificates: str  # PEM: the signing certificate, then those of its issuers
    key: SecretStr | None = None  # PEM in PKCS #8; None: `function` signs
    function: str = ""  # `module:function` that takes the bytes to be signed and returns the signature
    algorithm: SigningAlgorithm = "es256"
    timestamp_url: str = ""  # of an RFC 3161 authority, asked for every file; empty: no time stamps
    with_prompt: bool = False  # state prompt and seed, too
    unsigned_users: tuple[str, ...] = ()  # whose files are not signed
    is_test: bool = False  # made by us; no other program trusts it
