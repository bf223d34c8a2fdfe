"""Forks: a child hangs on nothing, is served nothing that only its parent knows, and touches no connection of it."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.paths import ROOT
from tests.support.tls_proxy import new_authority, tls_proxy

from broadcache.shared.transport.redis.embedded import EmbeddedServer, dying_with_us

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")]

# From CPython 3.12 on, a fork with threads warns. Here it is the subject.
_PYTHON = (sys.executable, "-W", "ignore:This process:DeprecationWarning")


async def seen_in(scene: str, url: str, *options: str) -> Any:
    """Run a scene of tests/support/fork_scenes.py, and return what it saw."""
    command = (*_PYTHON, "-m", "tests.support.fork_scenes", scene, url, *options)
    process = await asyncio.create_subprocess_exec(
        *dying_with_us(command), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert output, errors.decode()
    assert b"Traceback" not in errors, errors.decode()
    assert b"was destroyed" not in errors, errors.decode()
    return json.loads(output)


# --- locks and loads --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
async def test_no_child_hangs_however_the_locks_and_loads_stand(redis_url: str) -> None:
    assert await seen_in("storm", redis_url) == {"ended": 300, "hung": 0, "state": "coherent", "lost": 0}


async def test_control_without_handlers_a_child_hangs(redis_url: str) -> None:
    assert (await seen_in("storm", redis_url, "without-handlers"))["hung"] == 1


async def test_a_child_that_was_forked_under_a_held_lock_has_a_new_mapping(redis_url: str) -> None:
    seen = await seen_in("held", redis_url)
    assert seen == {"inherited": [None, None], "coherent": True, "loaded": ["child", "child"], "warned": []}


async def test_a_mapping_that_cannot_be_made_anew_is_not_used_any_more(redis_url: str) -> None:
    seen = await seen_in("held", redis_url, "own-mapping")
    assert seen["loaded"] == ["child", None]
    assert [line.partition(":")[0] for line in seen["warned"]] == ["a local cache stores nothing in this process"]


# --- what a child is served, and as which replica ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bypass", "serve"])
async def test_a_child_is_served_nothing_until_it_is_a_replica_of_its_own(redis_url: str, mode: str) -> None:
    seen = await seen_in("bypassed", redis_url, mode)
    assert (seen["parent"], seen["still"]) == ("parent", "parent"), "the parent is not disturbed"
    child = seen["child"]
    assert child["first"] == {"coherent": False, "state": "closed", "value": None}
    assert (child["then"]["coherent"], child["then"]["value"]) == (True, "child")
    assert sorted(child["listed"]) == sorted([seen["id"], child["then"]["id"]])
    assert child["left"] == [seen["id"]], "the child deregisters itself alone"
    assert seen["warned"] == []


async def test_a_child_that_is_forked_within_a_hit_is_served_nothing(redis_url: str) -> None:
    assert await seen_in("within_a_hit", redis_url) == {"child": [None, None, 0, 0], "parent": ["parent", "parent", 5]}


async def test_control_without_handlers_a_child_goes_on_with_the_hit_of_its_parent(redis_url: str) -> None:
    assert (await seen_in("within_a_hit", redis_url, "without-handlers"))["child"][:2] == ["parent", "parent"]


async def test_a_child_that_waits_until_it_is_coherent_becomes_a_replica(redis_url: str) -> None:
    assert await seen_in("waited", redis_url) == [True, "coherent"]


async def test_a_child_serves_while_incoherent_only_while_it_is_a_replica(redis_url: str) -> None:
    assert await seen_in("set_to_serve", redis_url) == [None, True, "child", None]


async def test_a_child_without_a_thread_for_its_subscriber_serves_nothing(redis_url: str) -> None:
    assert await seen_in("without_threads", redis_url) == [None, "closed"]


async def test_a_child_that_reads_nothing_is_no_replica(redis_url: str) -> None:
    seen = await seen_in("short_lived", redis_url)
    assert seen["listed"] == [[seen["id"]]] * 3


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
async def test_a_child_that_ends_in_order_deregisters_itself_alone(redis_url: str, how: str) -> None:
    seen = await seen_in("at_exit", redis_url, how)
    for is_coherent, own_id, listed in seen["children"]:
        assert is_coherent
        assert listed == sorted([seen["id"], own_id])
    assert seen["left"] == [seen["id"]]


async def test_a_spawned_process_is_a_replica_until_it_ends(redis_url: str) -> None:
    seen = await seen_in("spawned", redis_url)
    assert sorted(seen["listed"]) == sorted([seen["id"], *seen["ids"]])
    assert len(seen["ids"]) == 2
    assert seen["left"] == [seen["id"]]


@pytest.mark.parametrize("how", ["in-the-loop", "thread", "debug", "uvloop"])
async def test_a_subscriber_of_an_event_loop_waits_to_be_entered_again(redis_url: str, how: str) -> None:
    if how == "uvloop":
        pytest.importorskip("uvloop")
    seen = await seen_in("in_a_loop", redis_url, how)
    child = seen["child"]
    assert child["values"] == [None, None, None]
    [warning] = child["warned"]
    assert "expected it to be entered again in the forked process" in warning
    state, own_id, value = child["entered"]
    assert (state, value, child["state"]) == ("coherent", "child", "closed")
    assert own_id.startswith("web-1-"), "a given id belongs to the parent, which goes on"
    assert (seen["value"], seen["id"], seen["lost"]) == ("parent", "web-1", 0)


async def test_a_cache_may_have_another_subscriber_in_a_child(redis_url: str) -> None:
    assert await seen_in("owners", redis_url) == "coherent"


# --- connections ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_child_does_not_touch_the_connection_of_its_parent(redis_url: str, loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    seen = await seen_in("inherited", redis_url, loop)
    assert seen == {"children": ["collected"] * 3, "lost": 0, "echoes": True}


async def test_a_child_does_not_end_the_tls_session_of_its_parent(own_server: EmbeddedServer, tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "authority")
    async with tls_proxy(authority.server_context(wants_client_certificate=False), own_server.port) as port:
        seen = await seen_in("inherited", f"rediss://127.0.0.1:{port}?ssl_ca_certs={authority.ca_file}")
    assert seen == {"children": ["collected"] * 3, "lost": 0, "echoes": True}


async def test_control_without_handlers_a_child_takes_its_parents_connection_away(redis_url: str) -> None:
    seen = await seen_in("inherited", redis_url, "without-handlers")
    assert seen["lost"] >= 1


async def test_parent_and_child_publish_over_connections_of_their_own(redis_url: str) -> None:
    seen = await seen_in("publisher", redis_url)
    (before, own), (from_child, childs), (after, still) = seen["before"], seen["child"], seen["after"]
    assert [position[1] for position in (before, from_child, after)] == [1, 2, 3]
    assert own == still != childs
