"""The source of an audit is read in bounded space and time, and only where its URL says."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from tests.support.source import source_over_http

from broadcache.publisher.audit import source
from broadcache.publisher.audit.source import VALUE_BYTES_MAX, source_at

pytestmark = pytest.mark.anyio


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list[str]]]:
    """A source that answers so. Yields its URL, and the paths that were requested."""
    requested = list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            try:
                answer(self)
            except OSError:
                self.close_connection = True  # the reader has read enough

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{{key}}", requested
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(status: int) -> None:
    with source_over_http({"secret": 7}) as elsewhere:

        def redirect(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            request.send_header("Location", elsewhere.replace("{key}", "secret"))
            request.send_header("Content-Length", "0")
            request.end_headers()

        with answering(redirect) as (url, requested):
            with pytest.raises(ValueError, match=f"got a redirect \\({status}\\)"):
                await source_at(url, "products")("a")
            assert requested == ["/a"]
        # It leads to a value.
        assert await source_at(elsewhere, "products")("secret") == 7


@pytest.mark.parametrize("says_length", [True, False])
async def test_a_huge_value_is_not_read_to_its_end(says_length: bool) -> None:
    sent = 0
    chunk = b"1" * 65_536
    total = 64 * VALUE_BYTES_MAX

    def flood(request: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        request.send_response(200)
        if says_length:
            request.send_header("Content-Length", str(total))
        request.end_headers()
        while sent < total:
            request.wfile.write(chunk)
            sent += len(chunk)

    with answering(flood) as (url, _), pytest.raises(ValueError, match=f"at most {VALUE_BYTES_MAX} bytes"):
        await source_at(url, "products")("a")
    assert sent < total


async def test_a_value_of_the_greatest_length_is_read_and_a_cut_one_is_not() -> None:
    def exact(request: BaseHTTPRequestHandler) -> None:
        body = b'"' + b"x" * (VALUE_BYTES_MAX - 2) + b'"'
        request.send_response(200)
        request.send_header("Content-Length", str(len(body) + (1 if request.path == "/cut" else 0)))
        request.end_headers()
        request.wfile.write(body)

    with answering(exact) as (url, _):
        read = source_at(url, "products")
        assert len(await read("whole")) == VALUE_BYTES_MAX - 2
        with pytest.raises(Exception, match="IncompleteRead"):
            await read("cut")


async def test_a_value_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_READ_SECONDS", 0.2)
    gone = threading.Event()

    def drip(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while not gone.wait(0.01):
                request.wfile.write(b"1")
        finally:
            gone.set()

    with answering(drip) as (url, _):
        with pytest.raises(TimeoutError, match="the whole value"):
            await source_at(url, "products")("a")
        assert gone.wait(30)
