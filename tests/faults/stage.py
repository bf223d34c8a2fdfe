"""The stage: a server, two proxies before it, a writer, and three replicas that are put to the same faults."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from tests.faults.child import Child, running
from tests.faults.ledger import KEYS, Ledger
from tests.faults.messages import Command, Kind, ReplicaSettings, Report, WriterSettings
from tests.support.tcp_proxy import TcpProxy

from broadcache.shared.embedded import EmbeddedServer
from broadcache.shared.link import Link, RedisAddress

KINDS: Final[tuple[Kind, ...]] = ("ours", "naive", "clearing")
PATIENCE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02
CALL_TIMEOUT_SECONDS: Final = 5.0
# A key has to rest for longer than the bound: else the next invalidation would hide that one was lost.
REST_IN_BOUNDS: Final = 3.0
# The settings that faults change, as they are by default.
HEALTHY: Final = {
    "maxmemory": "0",
    "maxmemory-policy": "noeviction",
    "client-output-buffer-limit": "pubsub 32mb 8mb 60",
}


class StageSettings(NamedTuple):
    """What the stage is like.

    Units: `bound_seconds` is `max_staleness_seconds`; a load of a control is instantaneous unless `has_slow_loads`.
    """

    bound_seconds: float = 2.0
    seed: int = 0
    has_slow_loads: bool = False
    is_persistent: bool = False


class Front(TcpProxy):
    """A proxy whose new connections can be led to another server."""

    def retarget(self, port: int) -> None:
        self._target = ("127.0.0.1", port)


class Stage:
    """`async with Stage(settings) as stage:` Entering returns when every process is ready and reads.

    Replicas reach the server through `front`, the writer through `back`.
    """

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings
        self.bound_seconds = settings.bound_seconds
        self._directory = Path(tempfile.mkdtemp(prefix="broadcache-faults-"))
        self._exits = AsyncExitStack()
        self.server = self.new_server()
        self.ledger = Ledger.create(self._directory / "ledger")
        self.front: Front
        self.back: Front
        self.writer: Child
        self.replicas: dict[Kind, Child] = {}

    async def __aenter__(self) -> Self:
        try:
            await self._enter()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def _enter(self) -> None:
        self._exits.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._exits.push_async_callback(self._stop_server)
        await asyncio.to_thread(self.server.start)
        self.front = await self._exits.enter_async_context(Front("127.0.0.1", self.server.port))
        self.back = await self._exits.enter_async_context(Front("127.0.0.1", self.server.port))
        async with asyncio.TaskGroup() as tasks:
            starting: dict[Kind, asyncio.Task[Child]] = {
                kind: tasks.create_task(self._start_replica(kind)) for kind in KINDS
            }
            writing = tasks.create_task(self._start_writer())
        for kind, task in starting.items():
            self.replicas[kind] = task.result()
        self.writer = writing.result()
        await self.writes(KEYS // 10)

    async def _stop_server(self) -> None:
        await asyncio.to_thread(self.server.stop)

    async def _start_replica(self, kind: Kind) -> Child:
        # Their loads are at once, so that what the controls break is the fault's doing and not a stale fill.
        quick_seconds = 0.03 if kind == "ours" else 0.0
        settings = ReplicaSettings(
            kind=kind,
            url=self.front.url,
            ledger_path=str(self._directory / "ledger"),
            bound_seconds=self.bound_seconds,
            load_seconds_max=0.2 if self.settings.has_slow_loads else quick_seconds,
            seed=self.settings.seed,
        )
        child = running("tests.faults.replica", settings, self._directory / f"{kind}.log")
        return await self._exits.enter_async_context(child)

    async def _start_writer(self) -> Child:
        settings = WriterSettings(
            url=self.back.url,
            ledger_path=str(self._directory / "ledger"),
            changes_per_second=KEYS / (REST_IN_BOUNDS * self.bound_seconds),
            seed=self.settings.seed,
        )
        child = running("tests.faults.writer", settings, self._directory / "writer.log")
        return await self._exits.enter_async_context(child)

    def new_server(self) -> EmbeddedServer:
        """A server like the stage's first one; not started."""
        is_persistent = self.settings.is_persistent
        return EmbeddedServer(extra_arguments=("--appendonly", "yes", "--appendfsync", "no") if is_persistent else ())

    # --- what faults and runs ask of it ------------------------------------------------------------------------------

    async def writes(self, count: int) -> None:
        """Wait until so many more changes have been accepted."""
        goal = self.ledger.accepted + count
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.ledger.accepted < goal:
                await asyncio.sleep(POLL_SECONDS)

    async def outlast_bound(self) -> None:
        """Wait until what has been accepted until now may not be served stale by anybody."""
        await asyncio.sleep(self.bound_seconds + 0.5)

    async def admin(self, *commands: tuple[str | int, ...]) -> list[Any]:
        """Send commands to the server, past the proxies. Raises: LinkLost, Refused, TimeoutError."""
        link = await Link.open(
            RedisAddress(self.server.url), client_name="faults", timeout_seconds=CALL_TIMEOUT_SECONDS
        )
        try:
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                return await link.call_all(commands)
        finally:
            await link.close()

    async def reports(self) -> dict[Kind, Report]:
        """Return what each replica has counted."""
        return {kind: await child.ask(Command("report")) for kind, child in self.replicas.items()}

    async def cut_off(self) -> None:
        """Cut the replicas' connections, and refuse new ones."""
        await self.front.refuse()
        await self.front.cut()

    async def move_to(self, server: EmbeddedServer) -> None:
        """Make another server the primary; the one before is stopped."""
        former, self.server = self.server, server
        self.front.retarget(server.port)
        self.back.retarget(server.port)
        await asyncio.to_thread(former.stop)

    async def heal(self) -> None:
        """End whatever still is broken, and let our replica count from now how long it takes to recover."""
        if self.server.is_running:
            self.server.resume()
        else:
            await asyncio.to_thread(self.server.restart)
        for child in (self.writer, *self.replicas.values()):
            child.wake()
        await self.admin(*(("CONFIG", "SET", name, value) for name, value in HEALTHY.items()))
        for proxy in (self.front, self.back):
            proxy.heal()
            await proxy.accept()
        await self.replicas["ours"].ask(Command("heal", time.monotonic()))

    async def recovered(self) -> bool:
        """Wait until our replica is coherent again; return whether it came to that."""
        return await self._comes_true(lambda reports: reports["ours"].is_coherent)

    async def broken_by(self, kinds: Collection[Kind]) -> bool:
        """Wait until each of these controls has broken the promise; return whether they all did."""
        return await self._comes_true(lambda reports: all(reports[kind].broken for kind in kinds))

    async def _comes_true(self, condition: Callable[[dict[Kind, Report]], bool]) -> bool:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while not condition(await self.reports()):
            if time.monotonic() > give_up_at:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True
