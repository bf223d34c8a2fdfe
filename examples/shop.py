"""A service with one subscriber for all its caches: `uvicorn examples.shop:app`, with BROADCACHE_REDIS_URL set."""

from cachetools import TTLCache
from fastapi import FastAPI

from broadcache.shared import Keys
from broadcache.subscriber import LocalCache, Subscriber

PRICES = {1: 100, 2: 250}  # the source: your database

products = LocalCache(TTLCache(maxsize=10_000, ttl=300))
subscriber = Subscriber.from_env(caches={"products": products})
app = FastAPI(lifespan=subscriber.lifespan)
app.include_router(subscriber.router)


@app.get("/prices/{product_id}")
async def price(product_id: int) -> int:
    return await products.get_or_load(f"product:{product_id}", lambda: PRICES[product_id])


@app.put("/prices/{product_id}/{cents}")
async def change_price(product_id: int, cents: int) -> None:
    PRICES[product_id] = cents
    await subscriber.invalidate(Keys(f"product:{product_id}"), namespace="products", reason="price change")
