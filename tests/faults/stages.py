"""The stages of several servers: a primary and its replica with three sentinels, and a cluster of six."""

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress

from redis.exceptions import RedisError
from tests.faults.ledger import NAMESPACE
from tests.faults.stage import PATIENCE_SECONDS, POLL_SECONDS, OneServerStage, Stage, StageSettings
from tests.support.topologies import ClusterOfSix, Watched, asked, cluster_of_six, watched
from tests.support.waiting import until

from broadcache.shared.transport.redis.embedded import EmbeddedServer


class FailoverStage(Stage):
    """A stage on which another server takes the place of a primary that is gone. Every process dials the servers."""

    @property
    @abstractmethod
    def servers(self) -> Sequence[EmbeddedServer]: ...

    @abstractmethod
    def _is_whole(self) -> bool: ...

    @property
    def writer_url(self) -> str:
        return self.replica_url

    async def other_primary_than(self, former: EmbeddedServer) -> EmbeddedServer:
        """Wait until another server is the primary, and return it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                with suppress(LookupError, RedisError):
                    primary = await asyncio.to_thread(lambda: self.server)
                    if primary is not former:
                        return primary
                await asyncio.sleep(POLL_SECONDS)

    async def demoted(self, server: EmbeddedServer) -> None:
        """Wait until the server knows that it is the primary no more."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await asyncio.to_thread(_is_demoted, server):
                await asyncio.sleep(0)

    async def whole(self) -> None:
        """Wait until every server is there, and takes part."""
        await until(lambda: asyncio.to_thread(self._is_whole_now), "a topology that is whole")

    def _is_whole_now(self) -> bool:
        with suppress(RedisError):
            return self._is_whole()
        return False

    async def _heal_servers(self) -> None:
        for server in self.servers:
            if server.is_running:
                server.resume()
            else:
                await asyncio.to_thread(server.restart)
        await self.whole()


class SentinelStage(FailoverStage):
    """A primary and its replica, watched by three sentinels."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self._watched: Watched

    @property
    def server(self) -> EmbeddedServer:
        return self._watched.current_primary()

    @property
    def servers(self) -> Sequence[EmbeddedServer]:
        return self._watched.servers

    @property
    def replica_url(self) -> str:
        return self._watched.url

    def _is_whole(self) -> bool:
        return self._watched.is_whole()

    async def _enter_servers(self) -> None:
        entered = watched(self._directory, server=self.settings.server)
        self._watched = await asyncio.to_thread(entered.__enter__)
        self._exits.push_async_callback(asyncio.to_thread, entered.__exit__, None, None, None)


class ClusterStage(FailoverStage):
    """A cluster of three primaries, each with a replica."""

    def __init__(self, settings: StageSettings) -> None:
        super().__init__(settings)
        self.cluster: ClusterOfSix

    @property
    def server(self) -> EmbeddedServer:
        return self.cluster.primary_of(NAMESPACE)

    @property
    def servers(self) -> Sequence[EmbeddedServer]:
        return self.cluster.nodes

    @property
    def replica_url(self) -> str:
        return self.cluster.url

    def _is_whole(self) -> bool:
        return self.cluster.is_whole()

    async def _enter_servers(self) -> None:
        entered = cluster_of_six(server=self.settings.server)
        self.cluster = await asyncio.to_thread(entered.__enter__)
        self._exits.push_async_callback(asyncio.to_thread, entered.__exit__, None, None, None)


def _is_demoted(server: EmbeddedServer) -> bool:
    # A server that changes its role closes connections.
    with suppress(RedisError):
        return bool(asked(server.port, "ROLE")[0] == b"slave")
    return False


def stage_of(settings: StageSettings) -> Stage:
    """Return the stage of this topology; not entered yet."""
    if settings.topology == "one server":
        return OneServerStage(settings)
    return SentinelStage(settings) if settings.topology == "sentinels" else ClusterStage(settings)
