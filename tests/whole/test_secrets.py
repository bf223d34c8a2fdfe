"""A sweep for secrets: odd and malformed URLs through every public entry point, and no part of a password anywhere.

The servers that are reached repeat what they are sent, as some servers and proxies do in their errors.
"""

import asyncio
import contextlib
import io
import logging
import os
import socketserver
import subprocess
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from cachetools import TTLCache
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.command_line import BROADCACHE, environment
from tests.support.command_line import run as run_command
from tests.support.replicas import FAST_START, new_cache
from tests.support.waiting import until
from tests.support.web_server import served

from broadcache import cli
from broadcache.publisher import Fanout, Publisher
from broadcache.publisher.api.app import create_app
from broadcache.publisher.api.settings import ApiSettings
from broadcache.publisher.doctor.diagnosis import Diagnosis
from broadcache.publisher.history.feed import Feed
from broadcache.shared import InvalidSettings, Keys
from broadcache.shared.errors import BroadcacheError
from broadcache.shared.process.settings import read_settings, variable_of
from broadcache.shared.process.tokens import Tokens
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.subscriber import CacheInvalidationMixin, Subscriber

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]

HEAD, TAIL = "Xk7qJ", "Pz9Wm4vRt"
PARTS: Final = {part[start : start + 4] for part in (HEAD, TAIL) for start in range(len(part) - 3)}
"""Each four characters of the secret: none of them is in any text of ours by chance."""
BETWEEN: Final = ("", "/", "#", "?", "@", ":", " ", "%")
BETWEEN_TOO: Final = ("%2F", "%zz", "[", "]", ",", "&", "=", "\\", "\n", "é", "+", ";", "'")
"""What stands between the two halves of the secret."""
WITH_HOST: Final = (
    "redis://user:{secret}@127.0.0.1:{port}/0",
    "redis://:{secret}@127.0.0.1:{port}",
    "redis://{secret}@127.0.0.1:{port}",
    "redis://{secret}:@127.0.0.1:{port}",
    "valkey://{secret}:more@127.0.0.1:{port}",
    "rediss://user:{secret}@[::1]:{port}/0?ssl_cert_reqs=CERT_NONE",
    "redis+cluster://user:{secret}@127.0.0.1:{port},[::1]:{port}",
    "redis+sentinel://user:{secret}@127.0.0.1:{port},127.0.0.1:{port}/orders",
    "redis+sentinel://127.0.0.1:{port}/orders?sentinel_username=user&sentinel_password={secret}",
    "redis://127.0.0.1:{port}?username=user&password={secret}",
    "rediss://127.0.0.1:{port}?ssl_password={secret}&ssl_cert_reqs=none",
    "unix://user:{secret}@/nowhere/redis.sock",
    "user:{secret}@127.0.0.1:{port}",
    "redis:user:{secret}@127.0.0.1:{port}",
    "redis:/user:{secret}@127.0.0.1:{port}",
    "http://user:{secret}@127.0.0.1:{port}",
    "redis://user:1234/{secret}@127.0.0.1:{port}",
    "redis://user:1234#{secret}@127.0.0.1:{port}",
    "redis+sentinel://user:1234/{secret}@127.0.0.1:{port}/orders",
)
WITHOUT_HOST: Final = (
    "redis://user:{secret}",
    "redis://127.0.0.1:{secret}",
    "redis://127.0.0.1:{port}/{secret}",
    "redis://127.0.0.1:{port}?db={secret}",
    "redis://127.0.0.1:{port}?{secret}",
    "rediss://127.0.0.1:{port}?ssl_keyfile={secret}",
    "redis+sentinel://127.0.0.1:{port}/orders/{secret}",
    "redis+cluster://127.0.0.1:{port},user:{secret}",
    "{secret}",
    "{secret}://127.0.0.1",
)
"""In these the secret stands where it cannot: behind an @ it would be a host, which errors name."""


class Repeats(socketserver.StreamRequestHandler):
    """Answers each command with an error that repeats its arguments."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while heard := self.request.recv(65_536):
                words = heard.split(b"\r\n")[2::2]
                self.request.sendall(b"-ERR unknown thing, you sent: %s\r\n" % b" ".join(words)[:300])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a server that repeats in its errors what it was sent."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Repeats) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()


def urls(port: int, *more: str) -> list[str]:
    """Each odd URL: more than 200."""
    found: list[str] = []
    for template in (*WITH_HOST, *WITHOUT_HOST):
        betweens = [each for each in (*BETWEEN, *more) if not ("@" in each and template in WITHOUT_HOST)]
        found += [template.format(secret=HEAD + between + TAIL, port=port) for between in betweens]
    assert len(found) > 200
    return found


def is_taken(url: str) -> bool:
    try:
        RedisAddress(url)
    except InvalidSettings:
        return False
    return True


def told(error: BaseException) -> str:
    """All that an error can show: also of those that it hides, which some reporters show."""
    texts, seen, ahead = [], set[int](), [error]
    while ahead:
        each = ahead.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        texts += [str(each), repr(each), repr(each.args), *getattr(each, "__notes__", [])]
        texts.append("".join(traceback.TracebackException.from_exception(each, limit=0).format()))
        ahead += [link for link in (each.__cause__, each.__context__) if link is not None]
        ahead += getattr(each, "exceptions", [])
    return "\n".join(texts)


def shown_parts(text: str) -> list[str]:
    return sorted(part for part in PARTS if part in text)


class Sweep:
    """Collects each text that shows a part of the secret."""

    def __init__(self) -> None:
        self.leaks: list[str] = []
        self.refused = self.failed = 0

    def look(self, url: str, *texts: object) -> None:
        for text in texts:
            if shown_parts(str(text)):
                self.leaks.append(f"{url!r} -> {str(text)[:300]!r}")

    def call(self, url: str, function: Callable[[], object]) -> Any:
        """Return what the function returns; None when it raises one of our errors."""
        try:
            got = function()
        except BroadcacheError as error:
            self.refused += 1
            self.look(url, told(error))
            return None
        self.look(url, repr(got))
        return got

    async def wait(self, url: str, awaitable: Awaitable[object]) -> None:
        try:
            self.look(url, repr(await awaitable))
        except BroadcacheError as error:
            self.failed += 1
            self.look(url, told(error))


@pytest.fixture
def sweep(caplog: pytest.LogCaptureFixture) -> Iterator[Sweep]:
    caplog.set_level(logging.DEBUG)
    it = Sweep()
    yield it
    formatter = logging.Formatter("%(name)s %(message)s")
    for record in caplog.records:
        # The client of the test's own requests logs their headers.
        if not record.name.startswith(("httpcore", "httpx", "hypothesis")):
            it.look("the log", formatter.format(record))
    assert not it.leaks, f"{len(it.leaks)} texts show a part of the secret:\n" + "\n".join(it.leaks[:20])


async def each(urls: list[str], function: Callable[[str], Awaitable[None]]) -> None:
    """Call the function with each URL, some of them at once."""
    limit = asyncio.Semaphore(16)

    async def one(url: str) -> None:
        async with limit:
            await function(url)

    async with asyncio.TaskGroup() as group:
        for url in urls:
            group.create_task(one(url))


def test_the_parts_are_recognised() -> None:
    """The negative control: what looks for the secret finds it in what used to be shown, and in what is hidden."""
    assert shown_parts(f"got 'redis://user:…/{TAIL}@host'")
    assert not shown_parts("got 'redis://…@host'")

    def hides() -> None:
        try:
            int(HEAD)
        except ValueError:
            raise InvalidSettings("not shown") from None

    with pytest.raises(InvalidSettings) as hidden:
        hides()
    assert shown_parts(told(hidden.value))


def test_addresses(port: int, sweep: Sweep) -> None:
    odd = urls(port, *BETWEEN_TOO)
    for url in odd:
        address: RedisAddress | None = sweep.call(url, partial(RedisAddress, url))
        if address is not None:
            sweep.look(url, address.label, address.of("products"), address.connect)
    assert sweep.refused > 200
    assert len(odd) - sweep.refused > 100


@given(
    between=st.text(max_size=6) | st.text(st.sampled_from("/#?@:%[]&=+;, \\"), max_size=6),
    template=st.sampled_from((*WITH_HOST, *WITHOUT_HOST)),
)
@settings(max_examples=500, deadline=None)
def test_addresses_of_any_text(between: str, template: str) -> None:
    if "@" in between and template in WITHOUT_HOST:
        return
    url = template.format(secret=HEAD + between + TAIL, port=1)
    try:
        address = RedisAddress(url)
        shown = repr(address) + address.label
    except InvalidSettings as error:
        shown = told(error)
    assert not shown_parts(shown)


async def test_publishers(port: int, sweep: Sweep) -> None:
    async def publish(url: str) -> None:
        publisher: Publisher | None = sweep.call(url, lambda: Publisher(url, timeout_seconds=0.05))
        if publisher is not None:
            async with publisher:
                await sweep.wait(url, publisher.publish(Keys("key")))
                await sweep.wait(url, publisher.replicas("default"))

    await each(urls(port), publish)
    assert sweep.failed > 50


async def test_subscribers_and_mixins(port: int, sweep: Sweep) -> None:
    class Catalogue(CacheInvalidationMixin):
        namespace = "products"

    async def follow(url: str) -> None:
        options: dict[str, Any] = {**FAST_START, "connect_timeout_seconds": 0.1}
        sweep.call(url, lambda: Subscriber(url, caches={"default": new_cache()}))
        catalogue: Catalogue | None = sweep.call(
            url, lambda: Catalogue(url, cache=TTLCache(maxsize=9, ttl=60), **options)
        )
        if catalogue is None:
            return
        app = FastAPI(lifespan=catalogue.lifespan)
        app.include_router(catalogue.router)
        async with catalogue, AsyncClient(transport=ASGITransport(app), base_url="http://replica") as client:
            await until(lambda: catalogue.subscriber.stats().lost)
            sweep.look(url, catalogue, catalogue.subscriber, catalogue.subscriber.stats())
            for path in ("/health/ready", "/cache-invalidation", "/metrics", "/openapi.json"):
                sweep.look(url, (await client.get(path)).text)
            await sweep.wait(url, catalogue.invalidate(Keys("key"), timeout_seconds=0.05))

    await each(urls(port), follow)
    assert sweep.refused > 100


class Observer:
    """Told of everything that a feed tells."""

    def __init__(self, sweep: Sweep, url: str) -> None:
        self._look = lambda *texts: sweep.look(url, *texts)
        self.is_lost = asyncio.Event()

    def on_lost(self, error: BaseException) -> None:
        self._look(told(error))
        self.is_lost.set()

    def __getattr__(self, name: str) -> Any:
        return self._look


async def test_feeds_and_the_doctor(port: int, sweep: Sweep) -> None:
    async def look(url: str) -> None:
        feed: Feed | None = sweep.call(url, lambda: Feed(url, "default"))
        diagnosis: Diagnosis | None = sweep.call(
            url, lambda: Diagnosis(url, namespaces=["default"], timeout_seconds=0.2, patience_seconds=0)
        )
        assert (feed is None) == (diagnosis is None)
        if feed is None or diagnosis is None:
            return
        observer: Any = Observer(sweep, url)
        following = asyncio.create_task(feed.follow(observer))
        await observer.is_lost.wait()
        following.cancel()
        await asyncio.wait([following])
        sweep.look(url, diagnosis.label, await diagnosis.findings())

    await each(urls(port), look)
    assert sweep.refused > 100


async def test_the_api(port: int, sweep: Sweep) -> None:
    async def serve(url: str) -> None:
        wanted: dict[str, Any] = {"publish_timeout_seconds": 0.05, "tokens": (f"{HEAD}{TAIL}",)}
        settings: ApiSettings | None = sweep.call(url, lambda: ApiSettings(redis_url=url, **wanted))
        variables = {"BROADCACHE_REDIS_URL": url, "BROADCACHE_TOKENS": f"{HEAD}{TAIL}"}
        sweep.call(url, lambda: read_settings(ApiSettings, variables))
        if settings is None:
            return
        app: FastAPI | None = sweep.call(url, lambda: create_app(settings))
        if app is None:
            return
        async with served(app) as client:
            headers = {"Authorization": f"Bearer {HEAD}{TAIL}"}
            for path in (
                "/",
                "/health/live",
                "/health/ready",
                "/openapi.json",
                "/replicas",
                "/invalidations",
                "/metrics",
            ):
                sweep.look(url, (await client.get(path, headers=headers)).text)
            for sent in (headers, {}, {"Authorization": f"Basic {HEAD}{TAIL}"}):
                answer = await client.post("/invalidations", json={"keys": ["k"]}, headers=sent)
                assert answer.status_code in {401, 503}
                sweep.look(url, answer.text, dict(answer.headers))

    taken = [url for url in urls(port) if is_taken(url)]
    await each([*taken[::8], *[url for url in urls(port) if url not in taken]], serve)
    assert sweep.refused > 100


# Settings


def test_settings_that_hold_a_secret_in_any_place(sweep: Sweep) -> None:
    fields = msgspec.structs.fields(ApiSettings)
    values = (
        f"redis://user:{HEAD}{TAIL}@127.0.0.1",
        f"redis://user:{HEAD}/{TAIL}@127.0.0.1",
        f"http://user:{HEAD}{TAIL}@127.0.0.1/{{key}}",
        f"ftp://user:{HEAD}{TAIL}@127.0.0.1/{{key}}",
    )
    for field in fields:
        for value in values:
            variable = variable_of(field.name)
            settings = sweep.call(variable, partial(read_settings, ApiSettings, {variable: value}))
            if settings is not None:
                sweep.call(variable, partial(create_app, settings))
    for value in (
        f"{HEAD} {TAIL}",
        f"{HEAD}\n{TAIL}",
        f"wr:{HEAD}",
        f"{HEAD}é{TAIL}",
        f"{HEAD},{HEAD}",
        f"rw:{HEAD}:{TAIL}",
    ):
        for name in ("BROADCACHE_TOKENS", "BROADCACHE_REPLICA_TOKEN"):
            more = {"BROADCACHE_DELIVERY": "both", "BROADCACHE_FANOUT_SERVICE": "web:80"}
            sweep.call(name, partial(read_settings, ApiSettings, {name: value, **more}))
        sweep.call("Tokens", partial(Tokens, [value, value]))
    assert sweep.refused > 100


@pytest.mark.parametrize("token", [f"{HEAD}\n{TAIL}", f"{HEAD} {TAIL} ", f"{HEAD}\ud800{TAIL}", f"{HEAD}é{TAIL}"])
async def test_a_token_that_no_header_can_hold(token: str, sweep: Sweep) -> None:
    sweep.call("Fanout", lambda: Fanout("web", 80, addresses=["127.0.0.1:1"], token=token))
    sweep.call("mixin", lambda: CacheInvalidationMixin("redis://127.0.0.1", cache={}, replica_token=token))
    assert sweep.refused == 2


# The command line


COMMANDS: Final = (
    ("publish", "--key", "k", "--timeout-seconds", "0.05"),
    ("publish", "--key", "k", "--confirm", "--timeout-seconds", "0.05"),
    ("publish", "--key", "k", "--dry-run", "--timeout-seconds", "0.05"),
    ("replicas", "--timeout-seconds", "0.05"),
    ("doctor", "--timeout-seconds", "0.1"),
    ("doctor", "--json", "--timeout-seconds", "0.1"),
    ("audit", "--seconds", "0.05", "--timeout-seconds", "0.05"),
)
THAT_STAY: Final = (("watch",), ("watch", "--json", "--since", "1h"), ("serve", "--port", "0"))
"""Commands that run on when the URL is one: they are called with those that are refused."""


def run(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], variables: Mapping[str, str] = {}
) -> tuple[Any, str]:
    """Run the command line in this process; return its exit code, and all that it printed."""
    out = io.StringIO()
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BROADCACHE_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", ["broadcache", *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as ended:
            cli.main()
    return ended.value.code, out.getvalue()


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(port: int, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    codes = set()
    for number, url in enumerate(urls(port)[COMMANDS.index(command) % 2 :: 2]):
        if number % 2:
            code, text = run(monkeypatch, (*command, "--redis-url", url))
        else:
            code, text = run(monkeypatch, command, {"BROADCACHE_REDIS_URL": url} if "\0" not in url else {})
        codes.add(code)
        sweep.look(f"{' '.join(command)} {url}", text)
    assert codes == {1, 2}


@pytest.mark.parametrize("command", [*THAT_STAY, ("replica", "--port", "0")], ids=" ".join)
def test_commands_that_stay(
    port: int, sweep: Sweep, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], tmp_path: Path
) -> None:
    if command[0] == "replica":
        command = (*command, "--source", str(tmp_path / "products.db"))
    for url in [url for url in urls(port) if not is_taken(url)][::2]:
        code, text = run(monkeypatch, (*command, f"--redis-url={url}"))
        assert code == 2
        sweep.look(f"{' '.join(command)} {url}", text)


SECRET_URL: Final = f"redis://user:{HEAD}{TAIL}@127.0.0.1:1"


@pytest.mark.parametrize(
    "arguments",
    [
        (SECRET_URL,),
        ("publish", SECRET_URL),
        ("publish", "--redis-ulr", SECRET_URL),
        ("publish", f"--redis-ulr={SECRET_URL}"),
        ("publish", "--everything", "-n", SECRET_URL),
        ("publish", "--everything", "--timeout-seconds", SECRET_URL),
        ("doctor", "--role", SECRET_URL),
        ("doctor", "--fanout-service", SECRET_URL, "--redis-url", "redis://127.0.0.1:1"),
        ("watch", "--since", SECRET_URL),
        ("watch", "-n", "products", SECRET_URL),
        ("serve", "--host", SECRET_URL),
        ("serve", "--port", SECRET_URL),
        ("serve", "--port", f"rw:{HEAD}{TAIL}"),
        ("serve", "--token", "first", f"{HEAD}{TAIL}"),
        ("serve", "--token", f"{HEAD} {TAIL}"),
        ("serve", f"--token=wr:{HEAD}{TAIL}"),
        ("fanout", SECRET_URL, "80"),
        ("fanout", "web", SECRET_URL),
        ("fanout", "web", "80", SECRET_URL),
        ("fanout", "web", "80", "--address", SECRET_URL),
        ("fanout", "web", "80", "-H", f"{HEAD}{TAIL}"),
        ("fanout", "web", "80", "-H", f"Authorization: Bearer {HEAD}é{TAIL}"),
        ("fanout", "web", "80", f"-HAuthorization Bearer {HEAD}{TAIL}"),
        ("audit", "--source-url", f"ftp://user:{HEAD}{TAIL}@127.0.0.1/{{key}}"),
        ("audit", "--source-url", f"http://user:{HEAD}{TAIL}@127.0.0.1/{{key}}"),
        ("replica", "--source", "/nowhere/x", "--when-incoherent", SECRET_URL),
    ],
    ids=lambda arguments: " ".join(arguments).replace(HEAD, "").replace(TAIL, ""),
)
def test_a_secret_that_is_typed_in_the_wrong_place(
    arguments: tuple[str, ...], sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = run(monkeypatch, arguments)
    assert code in {1, 2}
    sweep.look(" ".join(arguments), text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("publish", "--everything", "--redis-url", f"redis://user:{HEAD}/{TAIL}@127.0.0.1"),
        ("publish", "--everything", "--redis-url", f"redis://user:{HEAD}#{TAIL}@127.0.0.1"),
        ("doctor", "--redis-url", f"redis://user:{HEAD}?{TAIL}@127.0.0.1"),
        ("doctor", "--timeout-seconds", "0.2", "--redis-url", f"redis://user:{HEAD}{TAIL}@127.0.0.1:1"),
        ("publish", f"redis://user:{HEAD}{TAIL}@127.0.0.1"),
        ("serve", "--port", "0", "--redis-url", f"redis://{HEAD}{TAIL}"[:-4] + ":x"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_real_processes(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*BROADCACHE, *arguments],
        capture_output=True,
        check=False,
        env=environment(PYTHONASYNCIODEBUG="1", PYTHONDEVMODE="1"),
    )
    text = (done.stdout + done.stderr).decode()
    assert done.returncode in {1, 2}
    assert not shown_parts(text), text
    assert "Traceback" not in text


def test_a_url_of_bytes_that_are_no_text() -> None:
    """As the environment of a process may hold it."""
    done = run_command("publish", "--everything", BROADCACHE_REDIS_URL=f"redis://user:{HEAD}\udcff{TAIL}@127.0.0.1:1")
    text = done.stdout + done.stderr
    assert (done.returncode, shown_parts(text)) == (2, []), text
