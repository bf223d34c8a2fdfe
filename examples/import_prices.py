"""A script that changes many rows, and publishes each batch: `python -m examples.import_prices`."""

import os

from broadcache.publisher import SyncPublisher
from broadcache.shared import Keys

BATCHES = [{1: 110, 2: 260}, {1: 120}]


def main() -> None:
    with SyncPublisher(os.environ["BROADCACHE_REDIS_URL"]) as publisher:
        for batch in BATCHES:
            # The database commits the batch here. Then:
            keys = Keys(*(f"product:{product_id}" for product_id in batch))
            receipt = publisher.publish(keys, namespace="products", reason="nightly import")
            print(f"{len(batch)} prices: logged as number {receipt.position and receipt.position.sequence}")


if __name__ == "__main__":
    main()
