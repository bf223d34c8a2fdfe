"""The OpenAPI document against the servers that it describes, and both against whatever bytes may come."""

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.command_line import Running, ask, environment, running

# What a document cannot say: a key that was used for something else, a body of too many bytes, targets that exclude
# each other, a time that there is none of, and that the fan-out takes methods which OpenAPI has no word for.
CONFIGURATION = """
[[operations]]
include-operation-id = "publish"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422"]
checks.negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "413", "415", "422"]

[[operations]]
include-operation-id = "preview"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "422"]

[[operations]]
include-operation-id = "history"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "422"]

[[operations]]
include-tag = "fan-out"
checks.unsupported_method.enabled = false
"""


class _Replica(socketserver.StreamRequestHandler):
    """A replica that likes whatever it gets."""

    def handle(self) -> None:
        lines = iter(self.rfile.readline, b"\r\n")
        headers = dict(line.lower().split(b":", 1) for line in lines if b":" in line.partition(b" ")[0])
        self.rfile.read(int(headers.get(b"content-length", b"0")))
        self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n")


@pytest.fixture(scope="module")
def replica() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.2", 0), _Replica) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.2:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(replica: str, *arguments: str, **variables: str) -> Iterator[str]:
    """`broadcache serve`, with the service of the document's examples at one replica."""
    allowed = {"BROADCACHE_FANOUT_ALLOW": "cache-replicas:*", "BROADCACHE_FANOUT_LISTS": f"cache-replicas={replica}"}
    with running("serve", "--port", "0", *arguments, **allowed, **variables) as command:
        url = command.url()
        # It writes a line for each refusal, and stops when nobody reads them.
        reading = threading.Thread(target=_read_away, args=(command,))
        reading.start()
        try:
            yield url
        finally:
            command.kill()
            reading.join()


def _read_away(command: Running) -> None:
    with contextlib.suppress(ValueError):
        for _ in command.stderr:
            pass


def assert_does_what_its_document_says(url: str, directory: Path, *arguments: str) -> None:
    """Let schemathesis try all operations of the document at `url`."""
    configuration = directory / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    command = Path(sys.executable).with_name("schemathesis")
    finished = subprocess.run(
        [
            *(str(command), "--config-file", str(configuration), "run", f"{url}/openapi.json", "--seed", "1"),
            *("--generation-deterministic", "--max-examples", "8", "--phases", "examples,coverage,fuzzing"),
            *("--exclude-path", "/events", "--no-color", *arguments),  # whose answer never ends
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=directory,
        env=environment(NO_PROXY="*"),
    )
    assert finished.returncode == 0, finished.stdout[-8_000:] + finished.stderr[-2_000:]
    assert " generated, " in finished.stdout


@pytest.mark.timeout(180)
def test_the_publisher_does_what_its_document_says(redis_url: str, replica: str, tmp_path: Path) -> None:
    with serving(replica, "--redis-url", redis_url) as url:
        assert_does_what_its_document_says(url, tmp_path)
        assert ask("POST", f"{url}/cache-replicas/8889/cache-invalidation", {"everything": True})[0] == 200


@pytest.mark.timeout(180)
def test_the_fan_out_alone_does_what_its_document_says(replica: str, tmp_path: Path) -> None:
    tokens = {"BROADCACHE_TOKENS": "swordfish", "BROADCACHE_FANOUT_FAILURE_STATUS": "502"}
    with serving(replica, "--fanout-only", **tokens) as url:
        assert_does_what_its_document_says(url, tmp_path, "--header", "Authorization: Bearer swordfish")


# Whatever bytes


@pytest.fixture(scope="module", params=["with tokens", "without tokens"])
def fuzzed(request: pytest.FixtureRequest, replica: str) -> Iterator[str]:
    """The URL of a fan-out; it must still be well in the end."""
    tokens = {"BROADCACHE_TOKENS": "swordfish"} if request.param == "with tokens" else {}
    with serving(replica, "--fanout-only", **tokens) as url:
        yield url
        assert ask("GET", f"{url}/health/live") == (200, {"status": "live"})


def statuses_of(url: str, raw: bytes) -> list[int]:
    """Send these bytes and no more; return the status of each answer that comes."""
    parts = urlsplit(url)
    received = bytearray()
    with socket.create_connection((parts.hostname, parts.port)) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(raw)
        # Who is not answered now has said that more is to come: the server waits for that, and then for no more.
        connection.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            received += connection.recv(65_536)
        connection.settimeout(20)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(65_536):
            received += chunk
    lines = [line for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return [int(line.split(b" ")[1]) for line in lines]


def written(method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (method, target), *(b"%s: %s" % header for header in headers), b"", body]
    return b"\r\n".join(lines)


without_blanks = st.binary(max_size=40).map(lambda raw: bytes(byte for byte in raw if byte not in b" \r\n\t"))
visible = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40).map(str.encode)
segments = st.sampled_from(
    [b"cache-replicas", b"8889", b"..", b".", b"", b"%2F", b"%00", b"health", b"live", b"*", b"[::1]", b"http:"]
)
targets = st.one_of(
    st.lists(segments | visible, min_size=1, max_size=5).map(lambda parts: b"/" + b"/".join(parts)),
    st.lists(segments, min_size=1, max_size=3).map(b"/".join),
    without_blanks,
    visible,
)
methods = st.sampled_from([b"GET", b"POST", b"HEAD", b"BAN", b"TRACE", b"CONNECT", b"OPTIONS", b"PRI"]) | visible
names = st.sampled_from(
    [b"Host", b"Connection", b"Via", b"X-Forwarded-For", b"Content-Type", b"TE", b"Expect", b"Cookie", b"Upgrade"]
)
framing = st.sampled_from(
    [
        *((b"Content-Length", length) for length in (b"0", b"5", b"-1", b"99999999999999999999", b"5, 5", b"x")),
        *((b"Transfer-Encoding", coding) for coding in (b"chunked", b"gzip, chunked", b"identity", b"chunked, x")),
    ]
)
headers = st.lists(st.tuples(names | visible, without_blanks | visible) | framing, max_size=6)
authorized = (b"Authorization", b"Bearer swordfish")


@settings(max_examples=150, deadline=None)
@given(method=methods, target=targets)
def test_no_target_makes_the_server_fail(fuzzed: str, method: bytes, target: bytes) -> None:
    for given_headers in ([], [authorized]):
        host = (b"Host", b"broadcaster.test")
        assert 500 not in statuses_of(fuzzed, written(method, target, [host, *given_headers], b""))


@settings(max_examples=150, deadline=None)
@given(headers=headers, body=st.binary(max_size=20) | st.just(b"5\r\nhello\r\n0\r\n\r\n"))
def test_no_headers_make_the_server_fail(fuzzed: str, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    for path in (b"/cache-replicas/8889/x", b"/nothing", b"/health/live/"):
        raw = written(b"POST", path, [(b"Host", b"broadcaster.test"), authorized, *headers], body)
        assert 500 not in statuses_of(fuzzed, raw)
        assert 500 not in statuses_of(fuzzed, written(b"POST", path, [authorized, *headers], body))


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200) | st.binary(max_size=50).map(lambda raw: b"GET / HTTP/1.1\r\n" + raw))
def test_no_bytes_make_the_server_fail(fuzzed: str, raw: bytes) -> None:
    assert 500 not in statuses_of(fuzzed, raw + b"\r\n\r\n")


@pytest.mark.parametrize("target", ["*", "nothing", "web/80", "?", "#", "http://", "//", "http://[::1/x"])
@pytest.mark.parametrize("host", ["broadcaster.test", "[", "[::1", "a b", "a/b?c#d", "@", ""])
def test_no_odd_target_or_host_makes_the_server_fail(fuzzed: str, target: str, host: str) -> None:
    for path in (target, "/cache-replicas/8889/x", "/nothing"):
        for method in (b"GET", b"OPTIONS"):
            raw = written(method, path.encode(), [(b"Host", host.encode()), authorized], b"")
            statuses = statuses_of(fuzzed, raw)
            assert len(statuses) == 1
            assert statuses[0] in {200, 400, 401, 403, 404, 405, 422}
