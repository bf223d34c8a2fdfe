"""A worker without an event loop (e.g. Flask, Django, Celery): `with` runs the subscriber in a thread."""

from cachetools import TTLCache

from broadcache.subscriber import LocalCache, Subscriber

products = LocalCache(TTLCache(maxsize=10_000, ttl=300), max_staleness_seconds=2.0)


def load_product() -> str:
    print("read from the database")
    return "teapot"


def main() -> None:
    with Subscriber.from_env(caches={"products": products}) as subscriber:
        for _ in range(3):
            print(products.get_or_load_sync("product:1", load_product, tags=("catalogue",)))
        print(subscriber.state, products.stats().hits)


if __name__ == "__main__":
    main()
