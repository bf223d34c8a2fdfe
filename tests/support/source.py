"""A source that answers over HTTP, for an audit to read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote


@contextmanager
def source_over_http(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the URL under which the values are, each at its key."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            key = unquote(self.path.removeprefix("/"))
            body = json.dumps(values.get(key)).encode()
            self.send_response(200 if key in values else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        # A daemon: a test that is given up never gets to end it, and the run would then wait for it for ever.
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{{key}}"
        finally:
            server.shutdown()
            thread.join()
