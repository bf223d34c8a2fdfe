"""Processes of one address, and others: which of them are told what is posted to one."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from typing import Any

import pytest
from tests.support.paths import ROOT

from broadcache.shared.transport.redis.embedded import dying_with_us

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="forks; reads /proc")]


async def seen_in(scene: str, url: str) -> Any:
    """Run a scene of tests/support/sibling_scenes.py, and return what it saw."""
    command = (sys.executable, "-m", "tests.support.sibling_scenes", scene, url)
    folder = tempfile.mkdtemp(prefix="b")  # of a path short enough for sockets
    process = await asyncio.create_subprocess_exec(
        *dying_with_us(command),
        cwd=ROOT,
        env={**os.environ, "XDG_RUNTIME_DIR": folder},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    shutil.rmtree(folder)
    assert output, errors.decode()
    assert b"Traceback" not in errors, errors.decode()
    return json.loads(output)


def told(*names: str, status: int = 200, **errors: str) -> dict[str, Any]:
    return {"status": status, "told": list(names), "errors": errors, "doubt": None}


async def test_children_that_share_a_listener_are_told_as_soon_as_they_may_store(
    redis_url: str,
) -> None:
    seen = await seen_in("family", redis_url)
    for each in seen.values():
        if isinstance(each, dict):
            each["told"] = sorted(each["told"])
    everyone = told("one", "other", "parent")
    assert seen == {
        # The children's subscribers have not started: they store nothing, and call no socket of their parent their own.
        "before they read": told("parent"),
        "read": ["old", "old", "old"],
        "all": everyone,
        "held": [None, None, None],
        "received": [1, 1],  # once each: none passes it on again
        "by a child": everyone,
        "held then": None,
        "one that ends": everyone,
        "sockets": 3,
        "after one was killed": told("other", "parent"),
        "sockets then": 2,  # the killed one's is removed
        "frozen": told("parent", status=500, other="it did not answer in time"),
        "the parent's subscriber has ended": told("other"),
        "sockets of the parent": None,
    }


async def test_another_service_of_the_same_user_is_not_told_and_spoils_nothing_when_frozen(
    redis_url: str,
) -> None:
    assert await seen_in("strangers", redis_url) == {
        "told": True,
        "other holds": "old",
        "frozen": [200, None],
    }


async def test_a_process_that_may_come_to_share_the_address_is_told(redis_url: str) -> None:
    assert await seen_in("starting", redis_url) == {"told": True, "held": None, "frozen": [500, True]}


async def test_a_process_whose_socket_was_removed_is_named_until_it_has_another_one(redis_url: str) -> None:
    removed = "its socket for other processes was removed, or may not be used; it binds another one within seconds"
    assert await seen_in("removed", redis_url) == {"first": [500, {"True": removed}], "told": True, "held": None}


async def test_a_process_that_listens_nowhere_says_that_it_cannot_know(redis_url: str) -> None:
    status, doubt = await seen_in("nowhere", redis_url)
    assert status == 200
    assert doubt.startswith("other processes may serve the same address, and it is not known whether they have applied")
    assert "this process has no socket that listens" in doubt
