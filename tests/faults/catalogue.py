"""The faults: each breaks the stage in one way, long enough to matter, and `Stage.heal` mends it.

What keeps the writer from writing is mended by the fault itself: another one, at the same time, may wait for writes.
"""

import asyncio
import itertools
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from tests.faults import failovers, foreign
from tests.faults.fault import BOTH, NAIVE, SOME_WRITES, Fault, Inject
from tests.faults.ledger import NAMESPACE
from tests.faults.messages import Command
from tests.faults.stage import PATIENCE_SECONDS, OneServerStage, StageSettings
from tests.support.tcp_proxy import Directions
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared.errors import BroadcacheError
from broadcache.shared.invalidation import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link, RedisAddress, Refused
from broadcache.shared.transport.redis.log import names_of

KILLS: Final = 5
HOUR_SECONDS: Final = 3_600
FILLER_BYTES: Final = 2_000
SLOW_LINK_BYTES_PER_SECOND: Final = 1_000_000
# 4 MB in all, each frame near to the limit of 64 KiB.
LARGE_FRAMES, LARGE_KEYS, LARGE_KEY_BYTES = 64, 60, 1_000

# --- the link --------------------------------------------------------------------------------------------------------


async def nothing(stage: OneServerStage) -> None:
    await stage.writes(SOME_WRITES)


async def raising_mapping(stage: OneServerStage) -> None:
    """Nothing but writes: the fault is within the replica."""
    await stage.writes(5 * SOME_WRITES)


async def client_kill(stage: OneServerStage) -> None:
    for _ in range(KILLS):
        await stage.writer.ask(Command("kill_and_write", SOME_WRITES))
        await stage.writes(SOME_WRITES // 2)


async def cut(stage: OneServerStage) -> None:
    await stage.cut_off()
    await stage.writes(SOME_WRITES)


def black_hole(directions: Directions) -> Inject:
    async def inject(stage: OneServerStage) -> None:
        stage.front.black_hole(directions)
        await stage.writes(SOME_WRITES)
        await stage.outlast_bound()

    return inject


async def delay(stage: OneServerStage) -> None:
    stage.front.stall("to_client")
    await stage.writes(SOME_WRITES)
    await stage.outlast_bound()


async def buffer_overflow(stage: OneServerStage) -> None:
    """The readers stall, so the server's buffer fills up, and it kills the subscriptions."""
    await stage.admin(("CONFIG", "SET", "client-output-buffer-limit", "pubsub 32kb 16kb 1"))
    stage.front.stall("to_client")
    filler = Keys(*(f"filler:{number:0240d}" for number in range(240)))
    async with Publisher(stage.server.url) as publisher, asyncio.timeout(PATIENCE_SECONDS):
        while (await publisher.publish(filler, namespace=NAMESPACE)).receivers:
            pass
    await stage.writes(SOME_WRITES)


# --- the processes ---------------------------------------------------------------------------------------------------


async def server_stopped(stage: OneServerStage) -> None:
    stage.server.pause()
    await stage.outlast_bound()
    stage.server.resume()


async def replica_stopped(stage: OneServerStage) -> None:
    replicas = stage.replicas.values()
    for replica in replicas:
        replica.freeze()
    await stage.writes(SOME_WRITES)
    await stage.outlast_bound()
    for replica in replicas:
        replica.wake()


async def publisher_stopped(stage: OneServerStage) -> None:
    stage.writer.freeze()
    await stage.outlast_bound()
    stage.writer.wake()


async def loop_blocked(stage: OneServerStage) -> None:
    command = Command("block", stage.bound_seconds + 0.5)
    await asyncio.gather(*(replica.ask(command) for replica in stage.replicas.values()))
    await stage.writes(SOME_WRITES)
    await stage.outlast_bound()


def wall_clock(seconds: float) -> Inject:
    async def inject(stage: OneServerStage) -> None:
        for amount in (seconds, 0):
            for replica in stage.replicas.values():
                await replica.ask(Command("wall", amount))
            await stage.writes(SOME_WRITES)
            await stage.outlast_bound()

    return inject


# --- the server and its memory ---------------------------------------------------------------------------------------


async def server_killed(stage: OneServerStage) -> None:
    await asyncio.to_thread(stage.server.kill)
    await asyncio.to_thread(stage.server.restart)


async def tail_lost(stage: OneServerStage) -> None:
    """Killed and restarted with an append-only file that lacks the last writes: the sequences are given out again."""
    directory = Path(await _config(stage, "dir"))
    # Redis 6.2 has one file.
    folder = next(each for name in ("appendonlydir", "appendonly.aof") if (each := directory / name).exists())
    kept = folder.with_name("kept")
    await asyncio.to_thread(_copy, folder, kept)
    await stage.writes(SOME_WRITES)
    await stage.cut_off()
    await asyncio.to_thread(stage.server.kill)
    await asyncio.to_thread(_copy, kept, folder)
    await asyncio.to_thread(stage.server.restart)
    await _catch_up_with_lost_sequences(stage)


async def _catch_up_with_lost_sequences(stage: OneServerStage) -> None:
    """Let the head pass the position of the replicas: who compares no more than numbers believes to have missed few."""
    await stage.writes(3 * SOME_WRITES)


async def _config(stage: OneServerStage, name: str) -> str:
    [answer] = await stage.admin(("CONFIG", "GET", name))
    value = answer[name.encode()]
    assert isinstance(value, bytes)
    return value.decode()


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, target)
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


async def backlog_on_slow_link(stage: OneServerStage) -> None:
    """What was missed is large, and takes longer over this link than an echo may."""
    await stage.cut_off()
    async with Publisher(stage.server.url) as publisher:
        for number in range(LARGE_FRAMES):
            keys = (f"{number}:{each}:".ljust(LARGE_KEY_BYTES, "x") for each in range(LARGE_KEYS))
            await publisher.publish(Keys(*keys), namespace=NAMESPACE)
    await stage.writes(SOME_WRITES)


async def promoted(stage: OneServerStage) -> None:
    """A copy that has not seen the last accepted writes becomes the primary, and gives out their sequences again."""
    copy = stage.new_server()
    await asyncio.to_thread(copy.start)
    try:
        await _become_copy(stage, copy)
        await _call(copy, "REPLICAOF", "NO", "ONE")
        # Accepted by the primary, and heard by the replicas, but not by the copy.
        await stage.writes(SOME_WRITES)
        await stage.cut_off()
        await asyncio.to_thread(stage.server.kill)
    except BaseException:
        await asyncio.to_thread(copy.stop)
        raise
    await stage.move_to(copy)
    await _catch_up_with_lost_sequences(stage)


async def _become_copy(stage: OneServerStage, copy: EmbeddedServer) -> None:
    await stage.admin(("CONFIG", "SET", "repl-diskless-sync-delay", 0))
    await _call(copy, "REPLICAOF", "127.0.0.1", stage.server.port)

    async def is_connected() -> bool:
        return b"master_link_status:up" in await _call(copy, "INFO", "replication")

    await until(is_connected, "replication")


async def _call(server: EmbeddedServer, *command: str | int) -> bytes:
    link = await Link.open(RedisAddress(server.url), client_name="faults", timeout_seconds=PATIENCE_SECONDS)
    try:
        answer: bytes = await link.call(*command)
        return answer
    finally:
        await link.close()


def while_cut_off(inject: Inject) -> Inject:
    """No replica receives what is published, and then it cannot be read in the log either."""

    async def both(stage: OneServerStage) -> None:
        await cut(stage)
        await inject(stage)

    return both


async def flushall(stage: OneServerStage) -> None:
    await stage.admin(("FLUSHALL",))
    await stage.writes(SOME_WRITES)


async def log_deleted(stage: OneServerStage) -> None:
    await stage.admin(("DEL", names_of(NAMESPACE).log))
    await stage.writes(SOME_WRITES)


async def log_trimmed(stage: OneServerStage) -> None:
    await stage.writes(SOME_WRITES)
    await stage.admin(("XTRIM", names_of(NAMESPACE).log, "MAXLEN", "=", 5))


async def log_evicted(stage: OneServerStage) -> None:
    """Memory runs out, and the server throws away something: in the end the log, or its head, or both.

    At random, because by age it would spare them for long: every change uses both.
    """
    names = names_of(NAMESPACE)
    used = await _used_memory_bytes(stage)
    await stage.admin(
        ("CONFIG", "SET", "maxmemory-policy", "allkeys-random"), ("CONFIG", "SET", "maxmemory", used + 200_000)
    )
    # Looked for after each: the next change would put a new log in the place of the one that is gone.
    look = ("EXISTS", names.log, names.head)
    async with asyncio.timeout(PATIENCE_SECONDS):
        for number in itertools.count():
            fillers = [("SET", f"filler:{number}:{each}", "x" * FILLER_BYTES) for each in range(8)]
            answers = await stage.admin(*(command for filler in fillers for command in (filler, look)))
            if any(existing < 2 for existing in answers[1::2]):
                break
    await stage.writes(SOME_WRITES)


async def _used_memory_bytes(stage: OneServerStage) -> int:
    [info] = await stage.admin(("INFO", "memory"))
    assert isinstance(info, bytes)
    return int(info.partition(b"used_memory:")[2].split()[0])


# --- all of them -----------------------------------------------------------------------------------------------------


def _on_one_server() -> Iterator[Fault]:
    yield from (
        Fault("nothing", nothing),
        Fault("slow loads", nothing, BOTH, StageSettings(has_slow_loads=True)),
        Fault("client kill", client_kill, NAIVE),
        Fault("cut", cut, NAIVE),
        Fault("black hole", black_hole("both"), BOTH),
        Fault("black hole to client", black_hole("to_client"), BOTH),
        Fault("black hole to server", black_hole("to_server")),
        Fault("delay", delay, BOTH),
        Fault("buffer overflow", buffer_overflow, NAIVE),
        Fault("server stopped", server_stopped),
        Fault("replica stopped", replica_stopped),
        Fault("publisher stopped", publisher_stopped),
        Fault("loop blocked", loop_blocked, BOTH),
        Fault("wall clock +1 h", wall_clock(HOUR_SECONDS)),
        Fault("wall clock -1 h", wall_clock(-HOUR_SECONDS)),
        Fault("server killed", server_killed),
        Fault("tail lost", tail_lost, NAIVE, StageSettings(is_persistent=True)),
        Fault("promoted", promoted, NAIVE),
        Fault("flushall", flushall),
        Fault("flushall while cut off", while_cut_off(flushall), NAIVE),
        Fault("log deleted", while_cut_off(log_deleted), NAIVE),
        Fault("log trimmed", while_cut_off(log_trimmed), NAIVE),
        Fault("log evicted", while_cut_off(log_evicted), NAIVE),
        Fault(
            "backlog on a slow link",
            backlog_on_slow_link,
            NAIVE,
            StageSettings(link_bytes_per_second=SLOW_LINK_BYTES_PER_SECOND),
        ),
        Fault("raising mapping", raising_mapping, settings=StageSettings(has_raising_mapping=True)),
        Fault("tail lost without identity", tail_lost, NAIVE, StageSettings(is_persistent=True, hides_identity=True)),
    )
    for server in ("redis", "redis-6.2"):
        yield Fault("cut", cut, NAIVE, StageSettings(server=server))
        yield Fault("black hole", black_hole("both"), BOTH, StageSettings(server=server))
        yield Fault("tail lost", tail_lost, NAIVE, StageSettings(server=server, is_persistent=True))
        yield Fault("promoted", promoted, NAIVE, StageSettings(server=server))
        yield Fault("log trimmed", while_cut_off(log_trimmed), NAIVE, StageSettings(server=server))


FAULTS: Final = {fault.key: fault for fault in (*_on_one_server(), *foreign.FAULTS, *failovers.FAULTS)}

# One of each group at a time: the faults of one group would undo each other.
_LINK: Final = ("nothing", "client kill", "cut", "black hole", "black hole to client", "black hole to server", "delay")
_PROCESS: Final = ("nothing", "replica stopped", "loop blocked", "publisher stopped", "wall clock +1 h")
_SERVER: Final = ("nothing", "server stopped", "server killed", "tail lost", "flushall", "promoted")
_LOG: Final[tuple[Inject, ...]] = (nothing, log_deleted, log_trimmed, log_evicted)


def combination(chance: random.Random) -> tuple[str, Inject]:
    """Draw some faults that happen at once, each after a while of its own; return their names, and all of it."""
    names = [chance.choice(group) for group in (_LINK, _PROCESS, _SERVER)]
    log_fault = chance.choice(_LOG)
    injects = [*(FAULTS[name].inject for name in names), log_fault]
    pauses_seconds = [chance.uniform(0, 1.5) for _ in injects]

    async def inject(stage: OneServerStage) -> None:
        async with asyncio.TaskGroup() as tasks:
            for each, seconds in zip(injects, pauses_seconds, strict=True):
                tasks.create_task(_later(each, stage, seconds))

    described = [
        f"{name} after {seconds:.2f} s"
        for name, seconds in zip([*names, log_fault.__name__], pauses_seconds, strict=True)
        if name != "nothing"
    ]
    return ", ".join(described), inject


async def _later(inject: Inject, stage: OneServerStage, seconds: float) -> None:
    await asyncio.sleep(seconds)
    # One fault may be in the other's way: a server that is away cannot lose its log. That is no failure of ours.
    with suppress(BroadcacheError, Refused, TimeoutError):
        await inject(stage)
