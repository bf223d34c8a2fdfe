"""A service without an event loop, as with Flask, Django or Bottle: `python -m examples.wsgi_shop`.

With BROADCACHE_REDIS_URL set, `with subscriber` runs the subscriber in a thread of its own.
"""

from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import make_server

from cachetools import TTLCache

from broadcache.shared import Keys
from broadcache.subscriber import LocalCache, Subscriber

PRICES = {"1": 100, "2": 250}  # the source: your database

products = LocalCache(TTLCache(maxsize=10_000, ttl=300))
subscriber = Subscriber.from_env(caches={"products": products})


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """GET /1 reads a price, PUT /1?200 changes it."""
    product_id = environ["PATH_INFO"].strip("/")
    if environ["REQUEST_METHOD"] == "PUT":
        PRICES[product_id] = int(environ["QUERY_STRING"])
        subscriber.invalidate_sync(Keys(f"product:{product_id}"), namespace="products", reason="price change")
    price = products.get_or_load_sync(f"product:{product_id}", lambda: PRICES[product_id])
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(price).encode()]


def main() -> None:
    with subscriber, make_server("127.0.0.1", 8102, app) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
