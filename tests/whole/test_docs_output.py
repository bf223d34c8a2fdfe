"""The pages of docs/: the output they show is what the program prints, and their Python is whole."""

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
from cachetools import TTLCache
from redis import Redis
from tests.support.browser import replica
from tests.support.command_line import run
from tests.support.liars import RevivingCache
from tests.support.paths import ROOT
from tests.support.registry import make_registry_old
from tests.support.replicas import FAST
from tests.support.waiting import until

import broadcache.publisher
import broadcache.shared
import broadcache.subscriber
import broadcache.testing
from broadcache.cli.audit import _print_text
from broadcache.publisher import Auditor, Inconsistency, Publisher
from broadcache.shared import Keys
from broadcache.shared.transport.redis.embedded import EmbeddedServer
from broadcache.subscriber import LocalCache, Subscriber

PAGES = sorted(page for page in ROOT.glob("docs/**/*.md") if "```python" in page.read_text())
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLAIN = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARYING = re.compile(r"(?P<fingerprint>\b[0-9a-f]{16}\b)|(?P<number>\d[\d.]*)|(?P<word>\b(?:ahead of|behind)\b)")
"""What differs from run to run: fingerprints, numbers, and which of two clocks is ahead."""
PUBLIC = {
    name
    for package in (broadcache.publisher, broadcache.shared, broadcache.subscriber, broadcache.testing)
    for name in package.__all__
    if not name.startswith("_")
}


def shown_by(page: str, command: str) -> list[str]:
    """The lines of output below a command, in the first block that begins with it."""
    text = (ROOT / "docs" / page).read_text()
    block = next(block for block in PLAIN.findall(text) if block.removeprefix("$ ").startswith(command))
    return [line.rstrip() for line in str(block).splitlines()[1:]]


def pattern_of(line: str) -> str:
    """A pattern for a line that is shown, in which numbers and the like stand for any."""
    pattern, end = "", 0
    for match in VARYING.finditer(line):
        varying = {"fingerprint": r"[0-9a-f]{16}", "number": r"\d[\d.]*", "word": "(?:ahead of|behind)"}
        pattern += re.escape(line[end : match.start()]) + varying[str(match.lastgroup)]
        end = match.end()
    return pattern + re.escape(line[end:])


def assert_as_shown(shown: list[str], printed: str) -> None:
    """Compare line by line. The address of the server is another one."""
    lines = [
        re.sub(r"redis://127\.0\.0\.1:\d+", "redis://127.0.0.1:6379", line.rstrip()) for line in printed.splitlines()
    ]
    differing = [
        (line, real) for line, real in zip(shown, lines, strict=False) if re.fullmatch(pattern_of(line), real) is None
    ]
    assert differing == [], "the page shows the first of each pair, the program printed the second"
    assert len(lines) == len(shown), printed


@pytest.mark.timeout(120)
def test_the_output_of_the_doctor_is_as_shown(own_server: EmbeddedServer) -> None:
    def publish(key: str, *options: str) -> None:
        assert run("publish", "-n", "products", "--key", key, *options, BROADCACHE_REDIS_URL=url).returncode == 0

    def is_listed_at(sequence: int, name: str) -> bool:
        listed = run("replicas", "-n", "products", BROADCACHE_REDIS_URL=url).stdout
        return re.search(rf"^{name} +coherent +\S+ s +\S+ s +{sequence} ", listed, re.MULTILINE) is not None

    url = own_server.url
    with Redis.from_url(url, protocol=2) as client:
        for name, value in {"appendonly": "yes", "maxmemory": "256mb", "maxmemory-policy": "allkeys-lru"}.items():
            client.config_set(name, value)
    # Presences outlive the hang: their lease has the longest pause between two echoes in it.
    patient = {"echo_interval_seconds": 0.2, "echo_timeout_seconds": 60.0, "max_staleness_seconds": 120.0}
    with (
        replica(url, "products", "catalogue-1", **patient),
        replica(url, "products", "catalogue-2", **patient),
        replica(url, "products", "catalogue-3", **patient) as hung,
    ):
        publish("a", "--confirm", "--confirm-seconds", "30")
        while not is_listed_at(1, "catalogue-3"):
            pass
        hung.freeze()
        publish("b")
        publish("c")
        while not (is_listed_at(3, "catalogue-1") and is_listed_at(3, "catalogue-2")):
            pass
        ran = run("doctor", "--namespace", "products", BROADCACHE_REDIS_URL=url, COLUMNS="100")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert_as_shown(shown_by("doctor.md", "broadcache doctor"), ran.stdout)


@pytest.mark.anyio
async def test_the_output_of_the_audit_is_as_shown(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    source = {"product:41": 1, "product:42": 1}

    async def read(key: str) -> int:
        return source[key]

    async def at_once(seconds: float) -> None:
        """The time is the test's own."""

    caches: dict[str, LocalCache] = {"web-1": LocalCache(TTLCache(10, 600)), "web-2": RevivingCache(TTLCache(10, 600))}

    def heal(found: Inconsistency) -> None:
        caches[found.replica]["product:42"] = source["product:42"]

    def subscriber(name: str) -> Subscriber:
        options = {**FAST, "echo_timeout_seconds": 20.0}
        return Subscriber(redis_url, caches={"products": caches[name]}, replica_id=name, **options)

    async with subscriber("web-1") as one, subscriber("web-2") as two, Publisher(redis_url) as publisher:
        await make_registry_old(redis_url)
        auditor = Auditor(
            publisher,
            "products",
            sample=1.0,
            source=read,
            on_found=heal,
            clock=lambda: now,
            sleep=at_once,
            answer_seconds=20.0,
        )
        await auditor.step()
        caches["web-2"]["product:42"] = 1
        source["product:42"] = 2
        receipts = [await publisher.publish(Keys(key), namespace="products") for key in source]
        await until(lambda: one.position("products") == two.position("products") == receipts[-1].position)
        for now in (0.0, 1.0, 10.0):  # noqa: B007  (the auditor's clock reads it)
            await auditor.step()
        _print_text(auditor.stats(), auditor.findings, 60.0)
    assert_as_shown(shown_by("audit.md", "broadcache audit"), capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_compiles_and_imports_what_it_uses_of_the_package(page: Path) -> None:
    """Blocks of a page follow each other: a later one may use what an earlier one has imported or defined.

    A block runs if it has all that it uses, and waits for nothing. No block needs a server to be constructed.
    """
    bound = {*vars(builtins)}
    program = []
    for text in PYTHON.findall(page.read_text()):
        tree = ast.parse(text)
        code = compile(tree, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        unbound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - bound - {*_bound_by(tree)}
        assert unbound & PUBLIC == set(), f"used and not imported:\n{text}"
        if unbound or _waits(tree, code):  # it stands for a part of the user's program: only its imports run
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        bound |= {*_bound_by(tree)}
        program.append(ast.unparse(tree))
    # In a process of its own: a page may set up what holds for a whole process.
    ran = subprocess.run([sys.executable, "-c", "\n".join(program)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


def _bound_by(tree: ast.Module) -> Iterator[str]:
    """The names that a block binds, wherever in it."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=other):
                yield other or name.partition(".")[0]
            case _:
                pass


def _waits(tree: ast.Module, code: CodeType) -> bool:
    """Whether a block awaits, or calls a synchronous method that waits for a server."""
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    return (
        bool(code.co_flags & inspect.CO_COROUTINE)
        or "publish" in called
        or any(name.endswith("_sync") for name in called)
    )
