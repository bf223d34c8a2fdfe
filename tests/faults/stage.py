"""The stage: a server, two proxies before it, a writer, and three replicas that are put to the same faults.

Here are what all stages have in common, and the stage of one server. Those of several are in tests/faults/stages.py.
"""

import asyncio
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias

from tests.faults.child import Child, running
from tests.faults.ledger import KEYS, NAMESPACE, Ledger
from tests.faults.messages import Command, ForgerSettings, Kind, ReplicaSettings, Report, WriterSettings
from tests.support.hiding_proxy import HidingProxy
from tests.support.servers import Server, ServerName
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, RedisAddress
from broadcache.shared.transport.redis.names import names_of

KINDS: Final[tuple[Kind, ...]] = ("ours", "naive", "clearing")
PATIENCE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02
CALL_TIMEOUT_SECONDS: Final = 5.0
FORGER: Final = "forger"
# A key has to rest for longer than the bound: else the next invalidation would hide that one was lost.
REST_IN_BOUNDS: Final = 3.0
# The settings that faults change, as they are by default.
HEALTHY: Final = {
    "maxmemory": "0",
    "maxmemory-policy": "noeviction",
    "client-output-buffer-limit": "pubsub 32mb 8mb 60",
}


Topology: TypeAlias = Literal["one server", "sentinels", "cluster"]


class StageSettings(NamedTuple):
    """What the stage is like.

    Shape: `hides_identity`: replicas are told neither run id nor replication id. For `has_raising_mapping` see
           ReplicaSettings.
    Units: `bound_seconds` is `max_staleness_seconds`; a load of a control is instantaneous unless `has_slow_loads`.
           `link_bytes_per_second` is of each replica's connection, None for no limit.
    """

    bound_seconds: float = 2.0
    seed: int = 0
    topology: Topology = "one server"
    server: ServerName = "valkey"
    has_slow_loads: bool = False
    is_persistent: bool = False
    hides_identity: bool = False
    link_bytes_per_second: float | None = None
    has_raising_mapping: bool = False


class Front(TcpProxy):
    """A proxy whose new connections can be led to another server."""

    def retarget(self, port: int) -> None:
        self._target = ("127.0.0.1", port)


class HidingFront(HidingProxy, Front):
    """The same, and replicas do not learn which server it is."""


class Stage(ABC):
    """`async with stage:` Entering returns when every process is ready and reads.

    Shape: `has_recovered` becomes false when our replica was waited for and did not become coherent.
    """

    def __init__(self, settings: StageSettings) -> None:
        self.settings = settings
        self.bound_seconds = settings.bound_seconds
        self.has_recovered = True
        self._directory = Path(tempfile.mkdtemp(prefix="broadcache-faults-"))
        self._exits = AsyncExitStack()
        self.ledger = Ledger.create(self._directory / "ledger")
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
        await self._enter_servers()
        async with asyncio.TaskGroup() as tasks:
            starting: dict[Kind, asyncio.Task[Child]] = {
                kind: tasks.create_task(self._start_replica(kind)) for kind in KINDS
            }
            writing = tasks.create_task(self._start_writer())
        for kind, task in starting.items():
            self.replicas[kind] = task.result()
        self.writer = writing.result()
        await self.writes(KEYS // 10)

    async def _start_replica(self, kind: Kind) -> Child:
        # Their loads are at once, so that what the controls break is the fault's doing and not a stale fill.
        quick_seconds = 0.03 if kind == "ours" else 0.0
        settings = ReplicaSettings(
            kind=kind,
            url=self.replica_url,
            ledger_path=str(self._directory / "ledger"),
            bound_seconds=self.bound_seconds,
            load_seconds_max=0.2 if self.settings.has_slow_loads else quick_seconds,
            seed=self.settings.seed,
            has_raising_mapping=kind == "ours" and self.settings.has_raising_mapping,
        )
        child = running("tests.faults.replica", settings, self._directory / f"{kind}.log")
        return await self._exits.enter_async_context(child)

    async def _start_writer(self) -> Child:
        settings = WriterSettings(
            url=self.writer_url,
            ledger_path=str(self._directory / "ledger"),
            changes_per_second=KEYS / (REST_IN_BOUNDS * self.bound_seconds),
            seed=self.settings.seed,
        )
        child = running("tests.faults.writer", settings, self._directory / "writer.log")
        return await self._exits.enter_async_context(child)

    @abstractmethod
    async def _enter_servers(self) -> None:
        """Start the servers; `_exits` ends them."""

    @property
    @abstractmethod
    def server(self) -> EmbeddedServer:
        """The primary. Raises: LookupError while there is none."""

    @property
    @abstractmethod
    def replica_url(self) -> str: ...

    @property
    @abstractmethod
    def writer_url(self) -> str: ...

    @abstractmethod
    async def _heal_servers(self) -> None:
        """Bring back every server and every link."""

    # --- what faults and runs ask of it ------------------------------------------------------------------------------

    async def writes(self, count: int) -> None:
        """Wait until so many more changes have been accepted."""
        goal = self.ledger.accepted + count
        await until(lambda: self.ledger.accepted >= goal, f"{count} accepted changes")

    async def outlast_bound(self) -> None:
        """Wait until what has been accepted until now may not be served stale by any replica."""
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

    async def version(self) -> str:
        """Return what the primary calls itself: `valkey 9.1.2`."""
        [info] = await self.admin(("INFO", "server"))
        fields = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        name = fields.get("server_name", "redis")
        return f"{name} {fields.get(f'{name}_version', fields['redis_version'])}"

    async def head(self) -> int:
        """Return the sequence of the log's head."""
        [sequence] = await self.admin(("HGET", names_of(NAMESPACE).head, "seq"))
        return int(sequence or 0)

    async def burst(self, count: int, *, spacing_seconds: float = 0.0) -> None:
        """Have the writer, which is paused, change so many keys; return when all are accepted."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self.writer.ask(Command("burst", count, spacing_seconds))

    async def pause_writes(self) -> None:
        """Let the writer finish what is under way, and make no changes but those of bursts."""
        await self.writer.ask(Command("pause"))

    async def resume_writes(self) -> None:
        """Let the writer go on."""
        await self.writer.ask(Command("go"))

    async def all_cached(self) -> bool:
        """Wait until our replica serves every key locally; return whether it came to that."""
        return await self._comes_true(lambda reports: reports["ours"].cached == KEYS)

    async def next_echo(self) -> None:
        """Wait until an echo of our replica has come back: the next one is the longest away that it can be."""
        ours, command = self.replicas["ours"], Command("report")
        before = (await ours.ask(command)).echoes
        async with asyncio.timeout(PATIENCE_SECONDS):
            while (await ours.ask(command)).echoes == before:
                await asyncio.sleep(0)

    @asynccontextmanager
    async def forging(self, *kinds: str) -> AsyncIterator[None]:
        """Let a forger publish on the channel, until the block ends."""
        rights = ("resetchannels", f"&{names_of(NAMESPACE).channel}", "+publish")
        await self.admin(("ACL", "SETUSER", FORGER, "reset", "on", "nopass", *rights))
        url = self.server.url.replace("redis://", f"redis://{FORGER}:any@")
        settings = ForgerSettings(url=url, view_url=self.server.url, kinds=list(kinds), seed=self.settings.seed)
        async with running("tests.faults.forger", settings, self._directory / "forger.log"):
            yield

    async def heal(self) -> None:
        """End whatever still is broken, and let our replica count from now how long it takes to recover."""
        for child in (self.writer, *self.replicas.values()):
            child.wake()
        await self._heal_servers()
        await self.replicas["ours"].ask(Command("heal", time.monotonic()))

    async def recovered(self) -> bool:
        """Wait until our replica is coherent again; return whether it came to that, as `has_recovered` will say."""
        is_coherent = await self._comes_true(lambda reports: reports["ours"].is_coherent)
        self.has_recovered = self.has_recovered and is_coherent
        return is_coherent

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


class OneServerStage(Stage):
    """One server. Replicas reach it through `front`, the writer through `back`."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self._server = self.new_server()
        self.front: Front
        self.back: Front

    def new_server(self) -> EmbeddedServer:
        """A server like the stage's first one; not started."""
        persistent = ("--appendonly", "yes", "--appendfsync", "no") if self.settings.is_persistent else ()
        return Server(self.settings.server, extra_arguments=persistent)

    @property
    def server(self) -> EmbeddedServer:
        return self._server

    @property
    def replica_url(self) -> str:
        return self.front.url

    @property
    def writer_url(self) -> str:
        return self.back.url

    async def cut_off(self) -> None:
        """Cut the replicas' connections, and refuse new ones."""
        await self.front.refuse()
        await self.front.cut()

    async def reconnect(self) -> None:
        """Let the replicas, which were cut off, come back."""
        await self.front.accept()

    async def move_to(self, server: EmbeddedServer) -> None:
        """Make another server the primary; the one before is stopped."""
        former, self._server = self._server, server
        self.front.retarget(server.port)
        self.back.retarget(server.port)
        await asyncio.to_thread(former.stop)

    async def _enter_servers(self) -> None:
        self._exits.push_async_callback(self._stop_server)
        await asyncio.to_thread(self._server.start)
        front_class = HidingFront if self.settings.hides_identity else Front
        front = front_class("127.0.0.1", self._server.port, bytes_per_second=self.settings.link_bytes_per_second)
        self.front = await self._exits.enter_async_context(front)
        self.back = await self._exits.enter_async_context(Front("127.0.0.1", self._server.port))

    async def _heal_servers(self) -> None:
        if self._server.is_running:
            self._server.resume()
        else:
            await asyncio.to_thread(self._server.restart)
        await self.admin(*(("CONFIG", "SET", name, value) for name, value in HEALTHY.items()))
        for proxy in (self.front, self.back):
            proxy.heal()
            await proxy.accept()

    async def _stop_server(self) -> None:
        await asyncio.to_thread(self._server.stop)
