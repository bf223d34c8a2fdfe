"""TLS in front of a real server, with certificates of an authority that exists for one test."""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Authority:
    """A certificate authority, with the certificates that it has given to a server of one host name and to a client."""

    directory: Path

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def client_options(self) -> str:
        return f"ssl_certfile={self.directory / 'client.crt'}&ssl_keyfile={self.directory / 'client.key'}"

    def server_context(self, *, wants_client_certificate: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.ca_file))
        context.load_cert_chain(self.directory / "server.crt", self.directory / "server.key")
        if wants_client_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def new_authority(directory: Path, host: str = "127.0.0.1") -> Authority:
    """Make one. Needs the program openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    directory.mkdir()
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    # Python takes no authority from 3.13 on that does not say what its key is for.
    usage = ("-addext", "keyUsage=critical,keyCertSign")
    _openssl(directory, "req", "-x509", *key, "-subj", "/CN=authority", *usage, "-keyout", "ca.key", "-out", "ca.crt")
    name = f"IP:{host}" if host[0].isdigit() else f"DNS:{host}"
    for owner, purpose in (("server", "serverAuth"), ("client", "clientAuth")):
        extensions = ("-addext", f"subjectAltName={name}", "-addext", f"extendedKeyUsage={purpose}")
        issuer = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
        files = ("-keyout", f"{owner}.key", "-out", f"{owner}.crt")
        _openssl(directory, "req", "-x509", *key, "-subj", f"/CN={owner}", *issuer, *extensions, *files)
    return Authority(directory)


@asynccontextmanager
async def tls_proxy(context: ssl.SSLContext, target_port: int) -> AsyncIterator[int]:
    """Take TLS on a port of 127.0.0.1, and pass on what comes to another one."""
    links: set[asyncio.Task[None]] = set()

    async def serve(client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        links.add(task)
        writers = [client_writer]
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target_port)
            writers.append(server_writer)
            await asyncio.wait(
                [
                    asyncio.create_task(_pump(client_reader, server_writer)),
                    asyncio.create_task(_pump(server_reader, client_writer)),
                ],
                return_when=asyncio.ALL_COMPLETED,
            )
        finally:
            for writer in writers:
                writer.transport.abort()
            links.discard(task)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await asyncio.gather(*links, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    # TLS knows no half-closed connection: when one direction has ended, both have.
    writer.transport.abort()


def _openssl(directory: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)
