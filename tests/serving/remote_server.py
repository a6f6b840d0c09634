"""A remote web server for tests: TLS on loopback, under names that resolve to public addresses."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import httpcore
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PUBLIC = "93.184.216.34"
NAMES = (
    "files.example.org", "other.example.org", "cdn.example.net", "huggingface.co", "cdn-lfs.hf.co",
)  # fmt: skip

Page = Callable[[asyncio.StreamWriter], Awaitable[None]]


def certificate(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Contexts of a server called NAMES, and of a client that trusts it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAMES[0])])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in NAMES]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    file = directory / "far.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + built.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    client = ssl.create_default_context(cadata=built.public_bytes(serialization.Encoding.PEM).decode())
    return server, client


class RemoteServer(httpcore.AsyncNetworkBackend):
    """Pages by path, and the network that leads to them from the public address of every name.

    addresses: what DNS says of a name, one answer for each time it is asked, the last for ever.
    """

    def __init__(self, certified: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
        """certified: what `certificate` made."""
        self.pages: dict[str, Page] = {}
        self.addresses: dict[str, list[list[str]]] = {}
        self.heads: list[str] = []  # of the requests, as they came
        self.bodies: list[bytes] = []
        self.dialled: list[str] = []
        self._tls, self.trusted = certified  # trusted: what a client needs to know this server
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._network = httpcore.AnyIOBackend()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def resolve(self, host: str, port: int) -> list[str]:
        answers = self.addresses.get(host, [[PUBLIC]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        if host != PUBLIC:
            raise httpcore.ConnectError("no server listens here")
        assert self._server is not None
        own = self._server.sockets[0].getsockname()[1]
        return await self._network.connect_tcp("127.0.0.1", own, timeout=timeout)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            for line in head.lower().split("\r\n"):
                if line.startswith("content-length: "):
                    self.bodies.append(await reader.readexactly(int(line.split()[1])))
            await self.pages[head.split()[1]](writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the caller hung up
        finally:
            self._serving.discard(task)
            writer.close()


def page(data: bytes, *headers: str, status: str = "200 OK") -> Page:
    """A page that is sent at once."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", "Connection: close", *headers)

    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)

    return send


def redirect(where: str, status: str = "302 Found") -> Page:
    return page(b"", f"Location: {where}", status=status)
