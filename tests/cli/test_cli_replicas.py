"""`broadcache replicas` and `broadcache publish --confirm`: what they print, and with which exit code they end."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest
from tests.support.child_replica import KEY, ChildReplica, child_replica
from tests.support.command_line import run
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST
from tests.support.topologies import asked
from tests.support.waiting import until, wait_until

from broadcache.publisher import Publisher
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.names import names_of

pytestmark = pytest.mark.anyio

NAMESPACE = "products"


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as running:
        yield running


@pytest.fixture
async def child(server: EmbeddedServer) -> AsyncIterator[ChildReplica]:
    """A replica that is seen to be coherent."""
    # Bypassed for long after it was frozen, and listed meanwhile.
    async with child_replica(server.url, NAMESPACE, "web-1", **{**FAST, "echo_timeout_seconds": 30.0}) as running:
        async with Publisher(server.url) as publisher:
            await until(partial(_are_coherent, publisher), "a coherent replica")
        await make_registry_old(server.url, NAMESPACE)
        yield running


async def _are_coherent(publisher: Publisher) -> bool:
    return all(each.is_coherent for each in await publisher.replicas(NAMESPACE))


async def _are_overdue(publisher: Publisher) -> bool:
    return not await _are_coherent(publisher)


def command(server: EmbeddedServer, *arguments: str) -> tuple[int, str, str]:
    finished = run(*arguments, "--namespace", NAMESPACE, BROADCACHE_REDIS_URL=server.url)
    return finished.returncode, finished.stdout, finished.stderr


def test_no_replica_is_no_success(server: EmbeddedServer) -> None:
    assert command(server, "replicas") == (1, "the namespace products has no registered replica\n", "")
    assert command(server, "replicas", "--json") == (1, "", "")


async def test_replicas_that_are_coherent_are_listed(server: EmbeddedServer, child: ChildReplica) -> None:
    code, output, errors = command(server, "replicas")
    assert (code, errors) == (0, "")
    heading, row = output.splitlines()
    assert heading.split()[:4] == ["replica", "state", "stale", "bound"]
    assert row.split()[:2] == ["web-1", "coherent"]
    assert str(child.pid) in row
    code, output, errors = command(server, "replicas", "--json")
    [replica] = map(json.loads, output.splitlines())
    assert (code, replica["replica"], replica["is_coherent"], replica["pid"]) == (0, "web-1", True, child.pid)


async def test_a_replica_that_has_proven_nothing_for_too_long_is_no_success(
    server: EmbeddedServer, child: ChildReplica
) -> None:
    child.freeze()
    async with Publisher(server.url) as publisher:
        await until(partial(_are_overdue, publisher), "a replica that is overdue")
    code, output, _ = command(server, "replicas")
    assert (code, output.splitlines()[1].split()[:2]) == (1, ["web-1", "overdue"])


async def test_a_publish_is_confirmed_replica_by_replica(server: EmbeddedServer, child: ChildReplica) -> None:
    code, output, errors = command(server, "publish", "--key", KEY, "--confirm-seconds", "20")
    assert (code, errors) == (0, "")
    published, web, verdict = output.splitlines()
    assert published.startswith("published ")
    assert "✓ web-1" in web
    assert "dropped 1" in web or "by echo" in web
    assert verdict == "confirmed by 1 of 1 replica"
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm-seconds", "20", "--json")
    answer = json.loads(output)
    assert (code, answer["confirmation"]["confirmed"], answer["sequence"]) == (0, ["web-1"], 2)


async def test_a_publish_that_is_not_confirmed_names_who_is_missing_and_is_no_success(
    server: EmbeddedServer, child: ChildReplica
) -> None:
    child.freeze()
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm-seconds", "0.2")
    assert code == 1
    assert "✗ web-1  missing" in output
    assert output.splitlines()[-1] == "confirmed by 0 of 1 replica"
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm", "--json")
    assert (code, json.loads(output)["confirmation"]["missing"]) == (1, ["web-1"])


def test_a_publish_that_no_replica_can_confirm_says_so_and_is_no_success(server: EmbeddedServer) -> None:
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm")
    assert (code, output.splitlines()[-1]) == (1, "no replica is registered; there may be others")
    assert "the registry of 'products' is missing" in output
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm", "--json")
    confirmation = json.loads(output)["confirmation"]
    assert (code, confirmation["is_complete"], confirmation["missing"]) == (1, False, [])
    assert "is missing" in confirmation["doubt"]


async def test_a_registry_that_was_lost_meanwhile_is_no_success_although_every_replica_confirms(
    server: EmbeddedServer, child: ChildReplica
) -> None:
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm-seconds", "20")
    assert (code, output.splitlines()[-1]) == (0, "confirmed by 1 of 1 replica")
    asked(server.port, "DEL", names_of(NAMESPACE).registry)
    wait_until(lambda: asked(server.port, "EXISTS", names_of(NAMESPACE).registry), "the registry")
    code, output, _ = command(server, "publish", "--key", KEY, "--confirm-seconds", "20")
    assert (code, output.splitlines()[-1]) == (1, "confirmed by 1 of 1 replica; there may be others")
    assert "has existed for only" in output
    code, output, _ = command(server, "publish", "--key", KEY, "--dry-run")
    assert (code, "there may be other replicas" in output) == (0, True)
    assert output.splitlines()[-1].startswith("nothing was dropped: 1 replica, about ")


def test_a_time_to_wait_that_makes_no_sense_is_typed_wrongly(server: EmbeddedServer) -> None:
    code, _, errors = command(server, "publish", "--key", KEY, "--confirm-seconds", "0")
    assert code == 2
    assert "timeout_seconds" in errors


async def test_a_replica_that_fell_silent_is_named_until_it_is_forgotten(server: EmbeddedServer) -> None:
    options = {**FAST, "max_staleness_seconds": 0.6}
    async with child_replica(server.url, NAMESPACE, "web-1", **options) as child:
        await make_registry_old(server.url, NAMESPACE)
        code, output, _ = command(server, "replicas", "--forget", "web-1")
        assert (code, output.partition(":")[0]) == (1, "replica web-1 of products is registered")
        child.freeze()
        async with Publisher(server.url) as publisher:
            await until(partial(_is_silent, publisher), "a silent replica")
        code, output, _ = command(server, "publish", "--key", KEY, "--confirm")
        assert re.search(r"– web-1  fell silent, last seen \d\d:\d\d:\d\d: it serves nothing from its caches", output)
        assert (code, output.splitlines()[-1]) == (0, "no replica is registered")
        code, output, _ = command(server, "replicas")
        assert code == 1
        assert output.splitlines()[1].split()[:2] == ["web-1", "silent"]
        said = r"web-1 fell silent: last seen \d\d:\d\d:\d\d, has not dropped #1; it serves nothing from its caches"
        assert re.fullmatch(said, output.splitlines()[2])
        code, output, _ = command(server, "doctor")
        assert "1 replica fell silent" in " ".join(output.split())
        code, output, _ = command(server, "replicas", "--forget", "web-1", "--json")
        assert (code, json.loads(output)["result"]) == (0, "forgotten")
        code, output, _ = command(server, "replicas", "--forget", "web-1")
        assert (code, output.partition(";")[0]) == (1, "replica web-1 of products is not listed")
        assert command(server, "replicas")[:2] == (1, "the namespace products has no registered replica\n")


async def _is_silent(publisher: Publisher) -> bool:
    return any(each.is_silent for each in await publisher.replicas(NAMESPACE))


def test_a_dry_run_and_an_audit_of_nothing_are_no_success(server: EmbeddedServer) -> None:
    code, output, _ = command(server, "publish", "--key", KEY, "--dry-run")
    assert (code, output.splitlines()[-1]) == (1, "nothing was dropped: 0 replicas, about 0 entries")
    code, output, _ = command(server, "audit", "--seconds", "0.1")
    assert code == 1
    assert "nothing was audited: no invalidation was sampled" in output
