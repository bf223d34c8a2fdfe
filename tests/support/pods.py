"""Pods for the fan-out to call: raw HTTP/1.1 servers on 127.0.0.2, 127.0.0.3 …, all on one port."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

__all__ = ["Behaviour", "Pod", "Pods", "Received", "answers", "as_replica", "hangs", "resets", "says"]


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came, byte for byte but for the framing of its body."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of the header, or those of several with commas; None when there is none."""
        values = [value for each, value in self.headers if each.lower() == name.lower()]
        return ", ".join(values) if values else None


Behaviour = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


def answers(status: int = 200, body: bytes = b"", *headers: str) -> Behaviour:
    """Answer with this status."""
    lines = "".join(f"{header}\r\n" for header in headers)

    async def behave(received: Received, writer: asyncio.StreamWriter) -> None:
        shown = b"" if received.method == "HEAD" else body
        writer.write(f"HTTP/1.1 {status} Any\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + shown)

    return behave


def as_replica(outcome: object = "applied", *, replica: str = "", **fields: object) -> Behaviour:
    """Answer a posted frame as the one process of a replica does. `fields` take the place of what it would say."""

    async def behave(received: Received, writer: asyncio.StreamWriter) -> None:
        id = json.loads(received.body)["id"] if received.body else None
        answer = {
            "replica": replica or "web",
            "state": "coherent",
            "outcome": outcome,
            "id": id,
            "dropped": 1,
            "processes": [{"pid": 7, "outcome": str(outcome), "replicas": [replica or "web"], "dropped": 1}],
            "doubt": None,
            **fields,
        }
        await answers(200, json.dumps(answer).encode())(received, writer)

    return behave


def says(raw: bytes) -> Behaviour:
    """Answer with these bytes."""

    async def behave(received: Received, writer: asyncio.StreamWriter) -> None:
        writer.write(raw)

    return behave


async def hangs(received: Received, writer: asyncio.StreamWriter) -> None:
    """Never answer."""
    await asyncio.Event().wait()


async def resets(received: Received, writer: asyncio.StreamWriter) -> None:
    """Cut the connection without an answer."""
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


@dataclass(slots=True)
class Pod:
    """One pod: what it does with a request, and what it received."""

    host: str
    behaviour: Behaviour = field(default_factory=answers)
    received: list[Received] = field(default_factory=list)
    connections: int = 0


class Pods:
    """Several pods on one port, of 127.0.0.2 and so on. An asynchronous context manager.

    Shape: `pods.port`, `pods[0].received`; `await pods.add("127.0.0.9")`, `await pods.remove("127.0.0.9")`.
    """

    def __init__(self, count: int = 3, *, hosts: Sequence[str] = (), tls: ssl.SSLContext | None = None) -> None:
        self.port = 0
        self.all: Final[list[Pod]] = [Pod(host) for host in hosts or [f"127.0.0.{n}" for n in range(2, count + 2)]]
        self._tls = tls
        self._servers: dict[str, asyncio.Server] = {}
        self._serving: set[asyncio.Task[None]] = set()

    def __getitem__(self, index: int) -> Pod:
        return self.all[index]

    def __len__(self) -> int:
        return len(self.all)

    @property
    def hosts(self) -> list[str]:
        """The addresses of all of them."""
        return [pod.host for pod in self.all]

    @property
    def received(self) -> list[int]:
        """How many requests each of them got."""
        return [len(pod.received) for pod in self.all]

    async def __aenter__(self) -> Self:
        for _ in range(50):
            with contextlib.closing(socket.create_server((self.all[0].host, 0))) as free:
                self.port = free.getsockname()[1]
            try:
                for pod in self.all:
                    await self._listen(pod)
            except OSError:  # another process has this port at one of the addresses
                await self._close()
                continue
            return self
        raise OSError("expected a port that is free at all addresses of the pods, found none")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def add(self, host: str) -> Pod:
        """Start one more."""
        pod = Pod(host)
        await self._listen(pod)
        self.all.append(pod)
        return pod

    async def remove(self, host: str) -> None:
        """Stop listening at one address: connections to it are refused from now on."""
        self._servers.pop(host).close()

    async def _listen(self, pod: Pod) -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._serving.add(task)
            pod.connections += 1
            try:
                received = await _read(reader)
                if received is not None:
                    pod.received.append(received)
                    await pod.behaviour(received, writer)
                    await writer.drain()
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                self._serving.discard(task)
                writer.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await writer.wait_closed()

        self._servers[pod.host] = await asyncio.start_server(serve, pod.host, self.port, ssl=self._tls, backlog=512)

    async def _close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for task in self._serving:
            task.cancel()
        while self._serving:
            await asyncio.wait(self._serving)


async def _read(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.split("\r\n")[:-2]
    method, target, _ = first.split(" ")
    headers = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
    length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
    return Received(method, target, headers, await reader.readexactly(length))
