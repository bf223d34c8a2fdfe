"""Credentials that change: read anew for each connection, retried when they cannot be had, and never shown."""

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.credentials import CredentialProvider
from tests.support.impostors import Impostor, impostor
from tests.support.receipts import position_of
from tests.support.replicas import FAST, FAST_START, fill, new_cache, reached
from tests.support.topologies import asked, cluster_of_three, watched
from tests.support.waiting import until

from broadcache.publisher import Publisher
from broadcache.shared import InvalidSettings, Keys, LinkLost
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.shared.transport.redis.link import Link
from broadcache.subscriber import CacheInvalidationMixin, Subscriber

pytestmark = pytest.mark.anyio

USER = "rotating"
SECRET = "hunter2-hunter3"


class Vault:
    """Where the password is read: the server's only one, until it is rotated."""

    def __init__(self, *ports: int) -> None:
        self.ports = ports
        self.reads = 0
        self.password = ""
        self.failure: Exception | None = None
        self.rotate("first-" + SECRET)

    def rotate(self, password: str) -> None:
        """Replace the password, and end the connections that were made with the old one."""
        self.password = password
        for port in self.ports:
            asked(port, "ACL", "SETUSER", USER, "reset", "on", f">{password}", "~*", "&*", "+@all")
            asked(port, "CLIENT", "KILL", "USER", USER)

    def read(self) -> tuple[str, str]:
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return USER, self.password

    def was_read_after(self, reads: int) -> bool:
        return self.reads > reads

    async def read_async(self) -> tuple[str, str]:
        await asyncio.sleep(0)
        return self.read()


class SyncProvider(CredentialProvider):
    def __init__(self, vault: Vault) -> None:
        self.vault = vault

    def get_credentials(self) -> tuple[str, str]:
        return self.vault.read()


class AsyncProvider(SyncProvider):
    def get_credentials(self) -> tuple[str, str]:
        raise AssertionError("expected the asynchronous one to be called")

    async def get_credentials_async(self) -> tuple[str, str]:
        return await self.vault.read_async()


FORMS: dict[str, Callable[[Vault], Any]] = {
    "a function": lambda vault: vault.read,
    "an asynchronous function": lambda vault: vault.read_async,
    "a function that returns an awaitable": lambda vault: lambda: asyncio.sleep(0, vault.read()),
    "a provider": SyncProvider,
    "an asynchronous provider": AsyncProvider,
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_password_is_rotated_while_replicas_and_publishers_run(own_server: EmbeddedServer, form: str) -> None:
    vault = Vault(own_server.port)
    credentials = FORMS[form](vault)
    cache = new_cache()
    async with (
        Subscriber(own_server.url, caches={"default": cache}, credentials=credentials, **FAST) as subscriber,
        Publisher(own_server.url, credentials=credentials) as publisher,
    ):
        for number in range(3):
            await until(lambda: subscriber.state == "coherent")
            fill(cache, "key", "other")
            await reached(subscriber, await publisher.publish(Keys("key")))
            assert "key" not in cache
            reads = vault.reads
            await asyncio.to_thread(vault.rotate, f"{number}-{SECRET}")
            await until(partial(vault.was_read_after, reads))


async def test_a_password_of_the_url_is_read_once_and_its_rotation_is_not_noticed(own_server: EmbeddedServer) -> None:
    """The negative control: with the password in the URL, the same rotation ends it."""
    vault = Vault(own_server.port)
    url = own_server.url.replace("redis://", f"redis://{USER}:{vault.password}@")
    async with Publisher(url, timeout_seconds=1) as publisher:
        await publisher.publish(Keys("key"))
        await asyncio.to_thread(vault.rotate, "second-" + SECRET)
        with pytest.raises(LinkLost, match="invalid username-password"):
            await publisher.publish(Keys("key"))


async def test_the_mixin_hands_credentials_on(own_server: EmbeddedServer) -> None:
    vault = Vault(own_server.port)

    class Catalogue(CacheInvalidationMixin):
        namespace = "products"

    async with Catalogue(own_server.url, cache={}, credentials=vault.read_async, **FAST) as catalogue:
        assert catalogue.cache.is_coherent
    assert vault.reads > 0


async def test_a_cluster_and_what_sentinels_name_are_given_the_credentials(tmp_path: Path) -> None:
    with watched(tmp_path) as servers:
        vault = Vault(servers.primary.port)
        async with Publisher(servers.url, credentials=vault.read) as publisher:
            assert position_of(await publisher.publish(Keys("key"))).sequence == 1
    with cluster_of_three() as cluster:
        namespaces = cluster.namespaces()
        vault = Vault(*[node.port for node in cluster.nodes])
        for node in cluster.nodes:
            asked(node.port, "ACL", "SETUSER", "default", "nopass", "-@all", "+acl", "+client", "+hello")
        async with Publisher(cluster.url, credentials=vault.read) as publisher:
            for namespace in namespaces:
                await publisher.publish(Keys("key"), namespace=namespace)
        async with Publisher(cluster.url, timeout_seconds=0.5) as publisher:
            with pytest.raises(LinkLost, match="no permissions"):
                await publisher.publish(Keys("key"))


async def test_credentials_that_cannot_be_read_are_a_lost_link_that_is_retried(
    own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    vault = Vault(own_server.port)
    vault.failure = ValueError(f"the vault answered {SECRET}")
    cache = new_cache()
    caplog.set_level(logging.DEBUG)
    async with (
        Subscriber(own_server.url, caches={"default": cache}, credentials=vault.read, **FAST_START),
        Publisher(own_server.url, credentials=vault.read, timeout_seconds=0.5) as publisher,
    ):
        with pytest.raises(
            LinkLost, match=r"credentials could not be read: it raised ValueError \(test_\w+\.py:\d+\)"
        ) as lost:
            await publisher.publish(Keys("key"))
        await until(lambda: vault.reads > 4)
        assert not cache.is_coherent
        vault.failure = None
        await until(lambda: cache.is_coherent)
        await publisher.publish(Keys("key"))
    assert "hunter2" not in "".join(traceback.format_exception(lost.value))
    assert "hunter2" not in caplog.text
    assert "the credentials could not be read" in caplog.text


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (SECRET, "expected (user, password), got str"),
        (("user", SECRET, "more"), "expected (user, password), got 3 values"),
        (("user", SECRET.encode()), "as two str, got str and bytes"),
        (("user", SECRET + "\ud800"), "characters that UTF-8 cannot encode"),
        ((None, ""), "got neither"),
        (None, "got NoneType"),
    ],
)
async def test_credentials_of_a_wrong_form_are_named_and_not_shown(redis_url: str, got: Any, text: str) -> None:
    async with Publisher(redis_url, credentials=lambda: got, timeout_seconds=0.3) as publisher:
        with pytest.raises(LinkLost) as lost:
            await publisher.publish(Keys("key"))
    shown = "".join(traceback.format_exception(lost.value))
    assert text in shown
    assert "hunter2" not in shown


async def test_credentials_that_hang_hold_up_one_thread_and_no_event_loop(redis_url: str) -> None:
    release, threads = threading.Event(), set[int]()

    def read() -> tuple[str, str]:
        threads.add(threading.get_ident())
        release.wait(30)
        return "default", "any"

    address = RedisAddress(redis_url, credentials=read)
    try:
        for _ in range(3):
            with pytest.raises(LinkLost, match="no answer from the credentials for redis://127"):
                await Link.open(address, client_name="test", timeout_seconds=0.1)
        assert len(threads) == 1
    finally:
        release.set()
    link = await Link.open(address, client_name="test", timeout_seconds=5)
    await link.close()


@pytest.mark.parametrize("credentials", [("user", SECRET), SECRET, {"user": SECRET}])
def test_credentials_that_are_no_function_are_refused_and_not_shown(credentials: Any) -> None:
    with pytest.raises(InvalidSettings, match="expected credentials= to be a function") as refused:
        Publisher("redis://127.0.0.1", credentials=credentials)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", [f"redis://user:{SECRET}@127.0.0.1", f"redis://127.0.0.1?password={SECRET}"])
def test_credentials_of_both_kinds_are_refused(url: str) -> None:
    with pytest.raises(InvalidSettings, match="got both") as refused:
        Subscriber(url, caches={"default": new_cache()}, credentials=lambda: ("user", SECRET))
    assert "hunter2" not in str(refused.value)


# Servers that repeat what they were sent


def repeats(heard: bytes) -> bytes:
    """Answer as a server that does not know HELLO, and repeats the begin of its arguments."""
    words = heard.split(b"\r\n")[2::2]
    shown = b" ".join(b"`%s`," % word for word in words[1:])
    return b"-ERR unknown command `%s`, with args beginning with: %s\r\n" % (words[0], shown)


def repeats_in_other_words(heard: bytes) -> bytes:
    """Answer as a proxy that repeats a part of what it was sent, in words of its own."""
    return b"-ERR cannot handle: %s...\r\n" % heard.split(b"\r\n")[2::2][4][:6]


@pytest.mark.parametrize("answers", [repeats, repeats_in_other_words])
@pytest.mark.parametrize("kind", ["server", "cluster", "sentinel", "credentials"])
async def test_a_server_that_repeats_the_password_gives_it_to_no_error(
    answers: Callable[[bytes], bytes], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    it: Impostor
    async with impostor(answers) as it:
        url, credentials = {
            "server": (f"redis://user:{SECRET}@127.0.0.1:{it.port}", None),
            "cluster": (f"redis+cluster://user:{SECRET}@127.0.0.1:{it.port}", None),
            "sentinel": (
                f"redis+sentinel://127.0.0.1:{it.port}/orders?sentinel_username=user&sentinel_password={SECRET}",
                None,
            ),
            "credentials": (f"redis://127.0.0.1:{it.port}", lambda: ("user", SECRET)),
        }[kind]
        cache = new_cache()
        async with (
            Publisher(url, credentials=credentials, timeout_seconds=0.3) as publisher,
            Subscriber(url, caches={"default": cache}, credentials=credentials, **FAST_START) as subscriber,
        ):
            with pytest.raises(LinkLost) as lost:
                await publisher.publish(Keys("key"))
            await until(lambda: subscriber.stats().lost)
        assert SECRET.encode() in it.heard
    for text in ("".join(traceback.format_exception(lost.value)), caplog.text):
        assert "hunt" not in text
        assert f"127.0.0.1:{it.port}" in text


def test_a_call_from_a_loop_that_has_ended_does_no_harm(redis_url: str) -> None:
    """A thread that still reads when its loop has ended: the next loop gets what it has read."""

    def read() -> tuple[str, str]:
        time.sleep(0.2)
        return "default", "any"

    address = RedisAddress(redis_url, credentials=read)

    async def connect(timeout_seconds: float) -> None:
        link = await Link.open(address, client_name="test", timeout_seconds=timeout_seconds)
        await link.close()

    with pytest.raises(LinkLost):
        asyncio.run(connect(0.02))
    asyncio.run(connect(5))
