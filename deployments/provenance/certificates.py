"""A certificate chain for installations without one of their own: valid in form and not trusted."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TEST_ORGANISATION = "Weft test certificate, not trusted"
VALID_FOR = datetime.timedelta(days=3650)


def make_test_chain(now: datetime.datetime) -> tuple[str, str]:
    """The chain of a new signing certificate and its issuer, and the key (P-256), as PEM.

    The certificate has the extensions that C2PA 2.x (section 14.5.1) requires of a signer.
    """
    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _certificate("Weft test issuer", issuer_key.public_key(), issuer_key, now, is_issuer=True)
    signer = _certificate("Weft test signer", key.public_key(), issuer_key, now, is_issuer=False)
    pem = serialization.Encoding.PEM
    chain = signer.public_bytes(pem) + issuer.public_bytes(pem)
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return chain.decode(), text.decode()


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, TEST_ORGANISATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime.datetime,
    *,
    is_issuer: bool,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("Weft test issuer"))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks of other machines may be behind
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=is_issuer, path_length=None), critical=True)
        .add_extension(_key_usage(is_issuer=is_issuer), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
    )
    if not is_issuer:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _key_usage(*, is_issuer: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_issuer,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_issuer,
        crl_sign=is_issuer,
        encipher_only=False,
        decipher_only=False,
    )


def last_valid_day(certificates: str) -> datetime.datetime:
    """When the first of these certificates that ends does so (UTC). Raises ValueError for what is no PEM."""
    return min(
        certificate.not_valid_after_utc
        for certificate in x509.load_pem_x509_certificates(certificates.encode())
    )
