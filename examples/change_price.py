"""Change the source first, then publish the invalidation: in the other order a load in between caches the old value."""

import asyncio
import os

from broadcache.publisher import Publisher
from broadcache.shared import Keys


async def change_price(publisher: Publisher, product_id: int) -> None:
    # The database commits here. Then:
    receipt = await publisher.publish(Keys(f"product:{product_id}"), namespace="products", reason="price change")
    print(f"invalidation {receipt.id} is in the log: {receipt.is_logged}")


async def main() -> None:
    async with Publisher(os.environ["BROADCACHE_REDIS_URL"]) as publisher:
        await change_price(publisher, 1)


if __name__ == "__main__":
    asyncio.run(main())
